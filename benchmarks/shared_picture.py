"""What it saves to read a picture once: sweeps of, and answers to, several questions about it.

    python benchmarks/shared_picture.py --shapes 32x576 8x2809 --questions 1 2 5 13

One thread, float32, random weights; the ways take turns in one run, in this process's own CPU time.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


import pandas as pd  # noqa: E402
import torch  # noqa: E402

from benchmarks.command import parser_of, store
from benchmarks.speed import N_AFTER, N_QUESTION, SIX_FLOWS, _seconds, random_llava, random_prompt
from mmflow_utils.engine.answers import answer_together, greedy_answer
from mmflow_utils.engine.prefix import Prefix
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded
from mmflow_utils.prompts.flows import variants

N_NEW = 3  # tokens of an answer: a word or two, and its end


def questions_about_a_picture(model: VLM, *, n_image: int, n: int) -> list[Encoded]:
    """Make prompts that differ in the random tokens of their question only."""
    first, prompts = random_prompt(model, n_image=n_image), []
    for seed in range(n):
        ids = first.inputs["input_ids"].clone()
        start = ids.shape[1] - N_QUESTION - N_AFTER
        ids[0, start : start + N_QUESTION] = torch.randint(
            5, 2048, (N_QUESTION,), generator=torch.Generator().manual_seed(seed)
        )
        prompts.append(replace(first, inputs={**first.inputs, "input_ids": ids}))
    return prompts


@torch.inference_mode()
def measure_sharing(
    shapes: Iterable[tuple[int, int]] = ((32, 576), (8, 2809)),
    n_questions: Sequence[int] = (1, 2, 5, 13),
    *,
    window: int = 9,
    n_rounds: int = 3,
    progress: Callable[[str], None] = lambda line: None,
    **shape: int,
) -> pd.DataFrame:
    """Measure sweeps and answers with and without a shared picture.

    Args:
        shapes: Layers and image tokens of each model.
        n_questions: How many questions are asked about the picture.
        window: Of the six flows' knockouts.
        n_rounds: How often each way runs; the frame holds medians of ratios within a round.
        shape: More of `random_llava`.

    Returns:
        A row for each model, number of questions and way: `clean_passes`, the time of one question in clean passes
        of the whole prompt: of a sweep of the six flows, or of an answer.
    """
    rows = []
    for n_layers, n_image in shapes:
        model = random_llava(n_layers=n_layers, n_image=n_image, **shape)
        prompts = questions_about_a_picture(model, n_image=n_image, n=max(n_questions))
        planned = variants(prompts[0].positions, SIX_FLOWS, window=window, n_layers=n_layers)
        found: dict[tuple[int, str], list[float]] = {}
        for turn in range(n_rounds + 1):
            for (n, way), ratio in _round(model, prompts, planned, n_questions).items():
                if turn:  # the first round warms up
                    found.setdefault((n, way), []).append(ratio)
        n_tokens = prompts[0].positions.n_tokens
        for (n, way), ratios in found.items():
            row = {"n_layers": n_layers, "n_tokens": n_tokens, "n_questions": n, "way": way}
            rows.append(row | {"clean_passes": median(ratios)})
            progress(f"{n_layers} layers, {n_tokens} tokens, {n} questions, {way}: {rows[-1]['clean_passes']:.3f}")
    return pd.DataFrame(rows)


def _round(model: VLM, prompts: list[Encoded], planned: list, n_questions: Sequence[int]) -> dict:
    """Run each way once, and return its time for one question in clean passes, taken just before and after."""

    def passes(way: Callable) -> float:
        def clean() -> float:
            return _seconds(lambda: model.hf(**prompts[0].inputs, use_cache=False, logits_to_keep=1))

        before, taken = clean(), _seconds(way)
        return taken / ((before + clean()) / 2)

    def sweep(encoded: Encoded, prefix: Prefix | None) -> float:
        return passes(lambda: run_sweep(model, encoded, planned, prefix=prefix))

    def answers(some: Sequence[Encoded]) -> float:
        return passes(lambda: answer_together(model, some, Prefix(), max_new_tokens=N_NEW))

    prefix = Prefix()
    found = {(1, "sweep alone"): sweep(prompts[0], None)}
    found[1, "answers alone"] = passes(lambda: greedy_answer(model, prompts[0], max_new_tokens=N_NEW))
    first, *later = [sweep(encoded, prefix) for encoded in prompts]
    if later:
        found[len(prompts), "sweep, from the second on"] = sum(later) / len(later)
    for n in n_questions:
        found[n, "sweep shared"] = (first + sum(later[: n - 1])) / n
        found[n, "answers together"] = answers(prompts[:n]) / n
    return found


def main() -> None:
    read = parser_of(__doc__, "shared_picture", rounds=3)
    read.add_argument("--shapes", nargs="+", default=["32x576", "8x2809"], help="layers x image tokens")
    read.add_argument("--questions", type=int, nargs="+", default=[1, 2, 5, 13])
    args = read.parse_args()
    torch.set_num_threads(1)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    frame = measure_sharing(
        shapes,
        args.questions,
        n_rounds=args.rounds,
        d_model=args.d_model,
        n_heads=args.heads,
        n_kv_heads=args.heads,
        progress=lambda line: print(line, flush=True),
    )
    store(frame, args.out)


if __name__ == "__main__":
    main()
