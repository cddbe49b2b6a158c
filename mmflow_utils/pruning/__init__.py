"""Image tokens removed from the last layers: what it saves, counted and timed, and what it costs (App. F)."""

from mmflow_utils.pruning.measure import WAY_COLOURS, picture_sweep, prune_sweep
from mmflow_utils.pruning.remove import (
    Pruning,
    compare_to_knockout,
    greedy_decode,
    image_tokens_removed,
    read_prompt,
)
from mmflow_utils.pruning.timing import PARTS, cost_curves, measure_times, plan_times, summarise_times
from mmflow_utils.pruning.work import Work, count_work, equal_work, prompt_lengths, work_of

__all__ = [
    "PARTS",
    "Pruning",
    "WAY_COLOURS",
    "Work",
    "compare_to_knockout",
    "cost_curves",
    "count_work",
    "equal_work",
    "greedy_decode",
    "image_tokens_removed",
    "measure_times",
    "picture_sweep",
    "plan_times",
    "prompt_lengths",
    "prune_sweep",
    "read_prompt",
    "summarise_times",
    "work_of",
]
