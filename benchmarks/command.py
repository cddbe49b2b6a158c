"""What the benchmarks' commands have in common: arguments that every one takes, and where its numbers go."""

import argparse
from pathlib import Path

import pandas as pd


def parser_of(
    doc: str | None, name: str, *, rounds: int, d_model: int = 512, heads: int = 8
) -> argparse.ArgumentParser:
    """Return a parser that knows the model's shape, the rounds and the file; the rest is each benchmark's own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--d-model", type=int, default=d_model)
    parser.add_argument("--heads", type=int, default=heads)
    parser.add_argument("--out", type=Path, default=Path(f"outputs/bench/{name}.csv"))
    return parser


def store(frame: pd.DataFrame, out: Path) -> None:
    """Write a benchmark's numbers, and say where they are."""
    out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out, index=False, float_format="%.6g")
    print(f"written to {out}")
