"""A process whose children compute in parts, to be killed or to run side by side (see test_parts).

It imports once and forks: a child begins at once, and a SIGKILL hits it in the middle of its work.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow as pa

from mmflow_utils.parts import compute_in_parts
from mmflow_utils.samples import Sample

MADE_FROM = {"depends_on": {"model": "tiny", "window": 3}, "made_by": {"device": "cpu"}}


def make_sample(name):
    text = dict.fromkeys(("image_id", "question", "answer", "structural", "semantic", "detailed"), "")
    return Sample(sample_id=name, image=Path(), task=None, **text)


SAMPLES = [make_sample(f"q{n:03}") for n in range(400)]


def measure(samples):
    """Give rows that follow from the samples' ids, with what real measures leave behind."""
    rows = []
    for sample in samples:
        number = int(sample.sample_id[1:])
        for layer in range(number % 3):
            rows.append({"sample_id": sample.sample_id, "layer": layer, "p": 1 / (7 * number + layer + 1)})
    frame = pd.DataFrame(rows, columns=["sample_id", "layer", "p"])
    frame.attrs["skipped"] = [s.sample_id for s in samples if int(s.sample_id[1:]) % 3 == 0]
    frame.attrs["max_check_diff"] = max((int(s.sample_id[1:]) for s in samples), default=None)
    return frame


def slow_measure(log):
    """Make a measure that takes 2 ms a sample and notes each one as it begins."""

    def measure_slowly(samples):
        with open(log, "a", buffering=1) as lines:
            for sample in samples:
                lines.write(f"{sample.sample_id}\n")
                time.sleep(0.002)
        return measure(samples)

    return measure_slowly


def start(folder, *, shard=None):
    """Fork a child that computes in parts."""
    if child := os.fork():
        return child
    try:
        slowly = slow_measure(str(folder / "measured.log"))
        path = folder / "flow.parquet"
        compute_in_parts(slowly, SAMPLES, path, MADE_FROM, part_size=8, shard=shard, progress=False)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def kill_often(folder, n_kills):
    """Kill a run at random moments and resume it, then let it come to its end."""
    log, moment = folder / "measured.log", random.Random(0)
    log.touch()
    for _ in range(n_kills):
        goal = log.stat().st_size + 5 * moment.randrange(19)
        child = start(folder)
        while log.stat().st_size < goal:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
            time.sleep(0.0005)
        time.sleep(moment.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    return [os.waitpid(start(folder), 0)[1]]


def run_together(folder, shards):
    """Run children at once, one for each shard, or without shard where it is None."""
    children = [start(folder, shard=shard) for shard in shards]
    return [os.waitpid(child, 0)[1] for child in children]


if __name__ == "__main__":
    pa.set_cpu_count(1)
    job, folder, given = sys.argv[1:]
    run = {"kill": kill_often, "together": run_together}[job]
    sys.exit(any(run(Path(folder), json.loads(given))))
