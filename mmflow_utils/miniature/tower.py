"""What the picture encoder is taught: for each image patch, which thing it shows and what that is like."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mmflow_utils.miniature.world import ATTRIBUTES, CATEGORIES, PLACES, SIZE, Scene, Thing

__all__ = ["HEADS", "patch_truth", "tower_loss"]

COLUMNS = 6  # of equal width, over where the middle of a thing can lie
# What is read off a patch, and of how many classes; category 0 is the background.
HEADS = {"category": len(CATEGORIES) + 1, "place": len(PLACES)} | {k: len(v) for k, v in ATTRIBUTES.items()}
HEADS["column"] = COLUMNS
# Weights in the loss: most patches show nothing, the place is easy, and the centre counts in picture widths.
BACKGROUND, PLACE, CENTRE = 0.15, 0.2, 5


def patch_truth(scenes: list[Scene], side: int) -> dict[str, Tensor]:
    """Tell what each of `side` x `side` image patches shows.

    Returns:
        For each of `HEADS` the class, [n_scenes, side²], and as `centre` the middle of the thing that the
        patch shows, [n_scenes, side², 2], in widths of the picture. Where it shows none, only `category` (0)
        and `place` mean anything.
    """
    centres = (np.arange(side) + 0.5) * SIZE / side
    truth = {name: np.zeros((len(scenes), side, side), dtype=np.int64) for name in HEADS}
    centre = np.zeros((len(scenes), side, side, 2), dtype=np.float32)
    for i, scene in enumerate(scenes):
        truth["place"][i] = PLACES.index(scene.place)
        for thing in scene.things:
            reach = 0.55 * thing.size + 0.25 * SIZE / side
            here = np.ix_(np.abs(centres - thing.y) <= reach, np.abs(centres - thing.x) <= reach)
            truth["category"][i][here] = 1 + CATEGORIES.index(thing.category)
            for kind, values in ATTRIBUTES.items():
                truth[kind][i][here] = values.index(thing.attribute(kind))
            truth["column"][i][here] = _column(thing)
            centre[i][here] = (thing.x / SIZE, thing.y / SIZE)
    tensors = {name: torch.from_numpy(classes).flatten(1) for name, classes in truth.items()}
    return tensors | {"centre": torch.from_numpy(centre).flatten(1, 2)}


def _column(thing: Thing) -> int:
    """Number the column of the picture in which a thing's middle lies, from 0 at the left."""
    edge = 0.175 * SIZE  # no thing is small enough to come nearer
    return min(max(int((thing.x - edge) / (SIZE - 2 * edge) * COLUMNS), 0), COLUMNS - 1)


def tower_loss(logits: dict[str, Tensor], truth: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Add up the heads' cross-entropies; attributes and centre count on patches that show a thing."""
    shown = truth["category"] > 0
    weight = torch.ones(HEADS["category"])
    weight[0] = BACKGROUND
    loss = F.cross_entropy(logits["category"].flatten(0, 1), truth["category"].flatten(), weight)
    loss = loss + PLACE * F.cross_entropy(logits["place"].flatten(0, 1), truth["place"].flatten())
    for kind in (*ATTRIBUTES, "column"):
        loss = loss + F.cross_entropy(logits[kind][shown], truth[kind][shown])
    return loss + CENTRE * F.mse_loss(logits["centre"][shown], truth["centre"][shown])
