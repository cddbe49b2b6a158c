"""The miniature: a drawn world, questions about it in GQA's format, and small models trained on it."""

from mmflow_utils.miniature.build import PROMPT, build_model, build_processor, build_tokenizer
from mmflow_utils.miniature.dataset import write_split
from mmflow_utils.miniature.drawing import draw_scene
from mmflow_utils.miniature.facts import write_factual
from mmflow_utils.miniature.next import NEXT_RECIPE, begin
from mmflow_utils.miniature.save import save_miniature, save_text_miniature
from mmflow_utils.miniature.score import task_accuracy
from mmflow_utils.miniature.train import Recipe, Trainer
from mmflow_utils.miniature.world import FRAMES, Scene, Thing, sample_scene

__all__ = [
    "FRAMES",
    "NEXT_RECIPE",
    "PROMPT",
    "Recipe",
    "Scene",
    "Thing",
    "Trainer",
    "begin",
    "build_model",
    "build_processor",
    "build_tokenizer",
    "draw_scene",
    "sample_scene",
    "save_miniature",
    "save_text_miniature",
    "task_accuracy",
    "write_factual",
    "write_split",
]
