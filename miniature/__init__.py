"""The miniature: a drawn world, questions about it in GQA's format, and small models trained on it."""

from miniature.after_text import AFTER_TEXT_RECIPE
from miniature.build import PROMPT, build_model, build_processor, build_tokenizer
from miniature.dataset import write_split
from miniature.drawing import draw_scene
from miniature.facts import write_factual
from miniature.next import NEXT_RECIPE, begin
from miniature.save import save_miniature, save_text_miniature
from miniature.score import task_accuracy
from miniature.train import Recipe, Trainer
from miniature.world import FRAMES, Scene, Thing, sample_scene

__all__ = [
    "AFTER_TEXT_RECIPE",
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
