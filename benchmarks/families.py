"""How exactly the sweep gives what plain passes give in each family, measured, and written to docs/models.md.

    python -m benchmarks.families            # measure; write the CSV and the table
    python -m benchmarks.families --write    # the table alone, from the CSV

The models are random and tiny, of each family's own classes (tests/helpers/tiny_families.py): exactness is a matter of
the code that runs, not of the weights. Plain is a full forward pass for each knockout, by the kernel of the row; the
sweep's own attention is fused, whatever the row's kernel.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mmflow_utils.engine.closeness import probabilities
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.models.adapter import FAMILIES
from mmflow_utils.params import ROOT
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import EDGE_INTERVENTIONS, FLOW_TO_LAST, IMAGE_TO_QUESTION, variants

RECORDED, PAGE = ROOT / "benchmarks" / "recorded" / "families.csv", ROOT / "docs" / "models.md"
KERNELS, DTYPES = ("sdpa", "eager"), ("float32", "bfloat16", "float16")
N_LAYERS, WINDOW = 4, 2
TABLE = re.compile(r"(?<=<!-- families -->\n).*?(?=<!-- end -->)", re.DOTALL)


def measure() -> pd.DataFrame:
    """Block all flows to the last position and into the question in each way, in every family, kernel and dtype."""
    return pd.DataFrame(row for family in FAMILIES for row in measure_family(family))


def measure_family(family: str) -> Iterator[dict[str, Any]]:
    """Give for each kernel and dtype the largest differences in probability."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from tiny import tiny_pair, tiny_vlm

    exact = None
    for dtype, kernel in product(DTYPES, KERNELS):
        model = tiny_vlm(family, n_layers=N_LAYERS, n_kv_heads=2, dtype=getattr(torch, dtype))
        with tempfile.TemporaryDirectory() as folder:
            encoded = encode(model, tiny_pair(Path(folder)))
        where: dict[str, Any] = {"window": WINDOW, "n_layers": N_LAYERS}
        flows = (*FLOW_TO_LAST, *IMAGE_TO_QUESTION)
        some = [v for i in EDGE_INTERVENTIONS for v in variants(encoded.positions, flows, intervention=i, **where)]
        with model.attention_kernel(kernel):
            plain = probabilities(run_reference(model, encoded, some).variants)
        fast = probabilities(run_sweep(model, encoded, some).variants)
        exact = plain if exact is None else exact
        pairs = {"sweep_plain": (fast, plain), "plain_float32": (plain, exact), "sweep_float32": (fast, exact)}
        apart = {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}
        yield {"family": family, "kernel": kernel, "dtype": dtype, "n_knockouts": len(some), **apart}


def as_table(frame: pd.DataFrame) -> str:
    """Write the differences as the table of docs/models.md: a row for each family and kernel."""
    lines = [["family", "kernel", *DTYPES], ["---"] * (2 + len(DTYPES))]
    for names, part in frame.groupby(["family", "kernel"], sort=False):
        exact, *halves = part.set_index("dtype").loc[list(DTYPES)].itertuples()
        cells = [f"{half.sweep_float32:.0e} (plain {half.plain_float32:.0e})" for half in halves]
        lines.append([*names, f"{exact.sweep_plain:.0e}", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(frame: pd.DataFrame) -> None:
    """Put the table in its place on the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda _: as_table(frame), text), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Measure, unless only the page is to be written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table from the CSV, without measuring")
    if not parser.parse_args(arguments).write:
        measure().to_csv(RECORDED, index=False, float_format="%.2e")
    write(pd.read_csv(RECORDED))


if __name__ == "__main__":
    main()
