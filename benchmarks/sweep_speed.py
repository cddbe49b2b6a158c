"""Measure the layer sweep against the other ways and write a tidy frame: `make bench`.

    python benchmarks/sweep_speed.py --layers 8 16 32 --image-tokens 576

One thread, float32, random weights. Ratios come from ways that take turns in one run: on a shared machine
times alone say little.
"""

import os
import platform

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from pathlib import Path  # noqa: E402

import pandas as pd  # noqa: E402
import torch  # noqa: E402

from benchmarks.baselines import BASELINES
from benchmarks.command import parser_of, store
from benchmarks.speed import measure_speed


def _cpu() -> str:
    """Name the processor: its instruction set if the system doesn't tell more."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def main() -> None:
    read = parser_of(__doc__, "sweep_speed", rounds=5)
    read.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    read.add_argument("--image-tokens", type=int, nargs="+", default=[576])
    read.add_argument("--baselines", nargs="*", default=list(BASELINES), choices=list(BASELINES))
    read.add_argument("--kv-heads", type=int, default=8)
    args = read.parse_args()
    torch.set_num_threads(1)
    frame = measure_speed(
        n_layers=args.layers,
        n_image=args.image_tokens,
        baselines=args.baselines,
        n_rounds=args.rounds,
        d_model=args.d_model,
        n_heads=args.heads,
        n_kv_heads=args.kv_heads,
        progress=lambda line: print(line, flush=True),
    )
    frame = frame.assign(d_model=args.d_model, cpu=_cpu(), torch=torch.__version__)
    with pd.option_context("display.width", 200, "display.max_columns", None):
        print(frame.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    store(frame, args.out)


if __name__ == "__main__":
    main()
