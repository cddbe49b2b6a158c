"""Image tokens removed from the last layers: what it saves, counted and timed, and what it costs (App. F)."""

from mmflow_utils.pruning.measure import WAY_COLOURS, picture_sweep, prune_sweep
from mmflow_utils.pruning.remove import (
    Pruning,
    compare_to_knockout,
    greedy_decode,
    image_tokens_removed,
    read_prompt,
)
from mmflow_utils.pruning.timing import PARTS, measure_times, summarise_times
from mmflow_utils.pruning.work import Work, count_work, kept_for_work, prompt_lengths

__all__ = [
    "PARTS",
    "Pruning",
    "WAY_COLOURS",
    "Work",
    "compare_to_knockout",
    "count_work",
    "greedy_decode",
    "image_tokens_removed",
    "kept_for_work",
    "measure_times",
    "picture_sweep",
    "prompt_lengths",
    "prune_sweep",
    "read_prompt",
    "summarise_times",
]
