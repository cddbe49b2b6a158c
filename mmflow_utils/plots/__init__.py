"""Figures from tidy frames: curves over layers, accuracy, costs, learning curves, pictures, prompts.

Every function takes data, returns one Figure (or HTML) and leaves matplotlib as it was. A flow has one colour
in all figures; the colours stay apart under the common kinds of colour blindness. Never imports torch.
"""

from mmflow_utils.plots.costs import plot_costs
from mmflow_utils.plots.curves import plot_curves, plot_flow, plot_learning_curves
from mmflow_utils.plots.explorer import plot_choice
from mmflow_utils.plots.image_patches import plot_image_patches, plot_norms
from mmflow_utils.plots.maps import plot_map
from mmflow_utils.plots.pictures import plot_accuracy, plot_contact_sheet, plot_sample
from mmflow_utils.plots.prompt import plot_prompt
from mmflow_utils.plots.stages import plot_stages
from mmflow_utils.plots.style import (
    FLOW_COLOURS,
    MODULE_COLOURS,
    SET_COLOURS,
    TASK_ORDER,
    WORD_COLOURS,
    flow_colour,
    set_style,
)

__all__ = [
    "FLOW_COLOURS",
    "MODULE_COLOURS",
    "SET_COLOURS",
    "TASK_ORDER",
    "WORD_COLOURS",
    "flow_colour",
    "plot_accuracy",
    "plot_choice",
    "plot_contact_sheet",
    "plot_costs",
    "plot_curves",
    "plot_flow",
    "plot_image_patches",
    "plot_learning_curves",
    "plot_map",
    "plot_norms",
    "plot_prompt",
    "plot_sample",
    "plot_stages",
    "set_style",
]
