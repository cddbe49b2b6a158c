"""What it costs to cut a flow to the last position in every head of every layer, one at a time and exactly.

    python benchmarks/head_speed.py --layers 32 --heads 32 --image-tokens 576

One thread, float32, random weights; the ways take turns in one run, in this process's own CPU time.
"""

import os
from collections.abc import Callable, Sequence
from itertools import product
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pandas as pd  # noqa: E402
import torch  # noqa: E402

from benchmarks.command import parser_of, store
from benchmarks.speed import _peak_bytes, _seconds, random_llava, random_prompt
from mmflow_utils.engine.plan import count_rows
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded
from mmflow_utils.prompts.flows import FLOW_TO_LAST, Flow, Variant


def every_head(model: VLM, encoded: Encoded, flow: Flow) -> list[Variant]:
    """List the cuts of a flow in one head of one layer each."""
    source, target = encoded.positions[flow.source], encoded.positions[flow.target]
    return [
        Variant(layers=range(layer, layer + 1), heads=((layer, head),), source=source, target=target)
        for layer, head in product(range(model.n_layers), range(model.n_heads))
    ]


@torch.inference_mode()
def measure_heads(
    *,
    n_layers: int = 32,
    n_heads: int = 32,
    n_image: int = 576,
    chunks: Sequence[int | None] = (None,),
    n_rounds: int = 3,
    n_checked: int = 5,
    progress: Callable[[str], None] = lambda line: None,
    **shape: int,
) -> pd.DataFrame:
    """Measure the clean pass and the sweep of every head, in turns, for each flow from question or image to last.

    Args:
        n_layers, n_heads, n_image: Of the model; heads are query heads.
        chunks: Heads that share a clean pass; None: all.
        n_rounds: How often each way runs; the frame holds medians of ratios within a round.
        n_checked: Cuts that are held against full passes.
        shape: More of `random_llava`.

    Returns:
        A row for each flow and chunk: `clean_passes`, the time of clean run and all cuts, `beside`, that without the
        clean run's own pass; `counted`, rows x layers beside it, in clean passes; `memory` at its peak, in clean
        passes; and `max_diff`, the largest difference to full passes in probability.
    """
    model = random_llava(n_layers=n_layers, n_image=n_image, n_heads=n_heads, **{"n_kv_heads": n_heads} | shape)
    encoded, rows = random_prompt(model, n_image=n_image), []
    n_tokens = encoded.positions.n_tokens

    def clean() -> None:
        model.hf(**encoded.inputs, use_cache=False, logits_to_keep=1)

    own = _peak_bytes(clean)
    for flow, chunk in product(FLOW_TO_LAST[:2], chunks):
        cuts = every_head(model, encoded, flow)
        some = cuts[:: -(-len(cuts) // n_checked) | 1]

        def sweep(cuts=cuts, chunk=chunk) -> torch.Tensor:
            return run_sweep(model, encoded, cuts, chunk=chunk).variants

        found, plain = run_sweep(model, encoded, some).variants, run_reference(model, encoded, some).variants
        ratios = []
        for n in range(n_rounds + 1):
            around = [_seconds(clean), _seconds(sweep), _seconds(clean)]
            if n:  # the first round warms up
                ratios.append(2 * around[1] / (around[0] + around[2]))
        counts = count_rows(cuts, n_tokens=n_tokens, n_layers=n_layers)
        numbers = {"clean_passes": median(ratios), "beside": median(ratios) - 1}
        numbers |= {"counted": counts["computed"] / counts["clean"], "memory": _peak_bytes(sweep) / own}
        numbers["max_diff"] = (found.softmax(-1) - plain.softmax(-1)).abs().max().item()
        labels = {"flow": str(flow), "n_layers": n_layers, "n_heads": n_heads, "n_tokens": n_tokens}
        rows.append(labels | {"n_cuts": len(cuts), "chunk": chunk or len(cuts)} | numbers)
        progress(f"{flow}, {rows[-1]['chunk']} at a time: {numbers['beside']:.2f} passes beside the clean one")
    return pd.DataFrame(rows)


def main() -> None:
    read = parser_of(__doc__, "head_speed", rounds=3, d_model=1024, heads=32)
    read.add_argument("--layers", type=int, default=32)
    read.add_argument("--kv-heads", type=int)
    read.add_argument("--image-tokens", type=int, default=576)
    args = read.parse_args()
    torch.set_num_threads(1)
    frame = measure_heads(
        n_layers=args.layers,
        n_heads=args.heads,
        n_image=args.image_tokens,
        n_rounds=args.rounds,
        d_model=args.d_model,
        n_kv_heads=args.kv_heads or args.heads,
        progress=lambda line: print(line, flush=True),
    )
    print(frame.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    store(frame.assign(d_model=args.d_model), args.out)


if __name__ == "__main__":
    main()
