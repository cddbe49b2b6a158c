"""What the picture encoder is taught: for each image patch, which thing it shows and what that is like."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from miniature.views import Window
from miniature.world import ATTRIBUTES, CATEGORIES, PLACES, Scene

__all__ = ["HEADS", "patch_truth", "tower_loss"]

COLUMNS = 6  # of equal width, over where the middle of a thing can lie
EDGE = 0.175  # of a square picture's width: no thing is small enough to come nearer to its sides
# What is read off a patch, and of how many classes; category 0 is the background.
HEADS = {"category": len(CATEGORIES) + 1, "place": len(PLACES)} | {k: len(v) for k, v in ATTRIBUTES.items()}
HEADS["column"] = COLUMNS
# Weights in the loss: most patches show nothing, the place is easy, and the center counts in picture widths.
BACKGROUND, PLACE, CENTER = 0.15, 0.2, 5


def patch_truth(scenes: list[Scene], side: int, windows: Sequence[Window] | None = None) -> dict[str, Tensor]:
    """Return what each of `side` x `side` image patches shows.

    Args:
        scenes: The scene that each view shows.
        side: Patches in a row of a view, and rows.
        windows: The part of the picture that each view shows; None for the whole.

    Returns:
        For each of `HEADS` the class, [n_views, side²], and as `center` the middle of the thing that the
        patch shows, [n_views, side², 2], in widths and heights of the view. Where it shows none, only
        `category` (0) and `place` mean anything.
    """
    windows = windows or [(0, 0, *scene.frame) for scene in scenes]
    middles = (np.arange(side) + 0.5) / side  # of the patches, in widths of the view; so is all below
    truth = {name: np.zeros((len(scenes), side, side), dtype=np.int64) for name in HEADS}
    center = np.zeros((len(scenes), side, side, 2), dtype=np.float32)
    for i, (scene, (left, top, width, height)) in enumerate(zip(scenes, windows, strict=True)):
        truth["place"][i] = PLACES.index(scene.place)
        for thing in scene.things:
            x, y = (thing.x - left) / width, (thing.y - top) / height
            across, down = (0.55 * thing.size / length + 0.25 / side for length in (width, height))
            here = np.ix_(np.abs(middles - y) <= down, np.abs(middles - x) <= across)
            truth["category"][i][here] = 1 + CATEGORIES.index(thing.category)
            for kind, values in ATTRIBUTES.items():
                truth[kind][i][here] = values.index(thing.attribute(kind))
            truth["column"][i][here] = min(max(int((x - EDGE) / (1 - 2 * EDGE) * COLUMNS), 0), COLUMNS - 1)
            center[i][here] = (x, y)
    tensors = {name: torch.from_numpy(classes).flatten(1) for name, classes in truth.items()}
    return tensors | {"center": torch.from_numpy(center).flatten(1, 2)}


def tower_loss(logits: dict[str, Tensor], truth: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Add up the heads' cross-entropies; attributes and center count on patches that show a thing."""
    shown = truth["category"] > 0
    weight = torch.ones(HEADS["category"])
    weight[0] = BACKGROUND
    loss = F.cross_entropy(logits["category"].flatten(0, 1), truth["category"].flatten(), weight)
    loss = loss + PLACE * F.cross_entropy(logits["place"].flatten(0, 1), truth["place"].flatten())
    for kind in (*ATTRIBUTES, "column"):
        loss = loss + F.cross_entropy(logits[kind][shown], truth[kind][shown])
    return loss + CENTER * F.mse_loss(logits["center"][shown], truth["center"][shown])
