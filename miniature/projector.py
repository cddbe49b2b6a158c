"""How loud each thing that the tower sees reaches the decoder: set at the projector's start, and again later.

The decoder learns what is loud first, and the projector lets grow what the decoder already uses: color, a
fiftieth of the features' variance, stayed at chance while shape and place were learned.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from miniature.tower import HEADS, patch_truth
from miniature.views import Views

__all__ = ["KINDS", "boost_attribute", "share_of_variance", "shown_features", "warm_projector"]

KINDS = tuple(kind for kind in HEADS if kind != "place")  # told by patches that show a thing


@torch.no_grad()
def warm_projector(model: nn.Module, heads: nn.ModuleDict, pixels: Float[Tensor, "scene 3 h w"], seed: int) -> None:
    """Begin the projector with a random mixture of what the tower's heads read, at equal variance.

    The tower's features are large, and some attributes make up a few per cent of their variance: from a
    random start the projector passed on the loud ones alone, and colors stayed at chance.
    """
    projector = model.model.multi_modal_projector.linear_1
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
    weight = torch.cat([head.weight for head in heads.values()])
    weight = weight / (states @ weight.T).std(0, keepdim=True).T
    mixture = np.random.default_rng([seed, 3000]).normal(size=(len(projector.weight), len(weight)))
    mixture = torch.from_numpy(mixture).float() / len(weight) ** 0.5
    projector.weight.copy_(mixture @ weight)
    projector.bias.copy_(-(mixture @ weight) @ states.mean(0))


@torch.no_grad()
def boost_attribute(model: nn.Module, views: Views, kind: str, *, share: float, seed: int) -> None:
    """Say one kind of fact a second time, louder, in directions of its own.

    It is read off the projector's output by least squares, and added to it again along random directions,
    with `share` times the output's variance. Both steps are linear, so they go into the projector's last
    layer.
    """
    features, truth = shown_features(model, views)
    mean, total = features.mean(0), features.var(0).sum()
    classes = F.one_hot(truth[kind].unique(return_inverse=True)[1]).float()
    read_out = torch.linalg.lstsq(features - mean, classes - classes.mean(0)).solution
    read_out = read_out / ((features - mean) @ read_out).std(0)
    directions = np.random.default_rng([seed, 3001, KINDS.index(kind)]).normal(size=(len(read_out.T), len(mean)))
    directions = F.normalize(torch.from_numpy(directions).float(), dim=-1)
    again = (share * total / classes.shape[1]) ** 0.5 * read_out @ directions
    last = model.model.multi_modal_projector.linear_2
    last.bias.add_((last.bias - mean) @ again)
    last.weight.add_(again.T @ last.weight)


def shown_features(model: nn.Module, views: Views) -> tuple[Float[Tensor, "patches d"], dict[str, Tensor]]:
    """Return what the projector says of the patches that show a thing, and what is true of them."""
    states = model.model.vision_tower(views.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    truth = patch_truth(views.scenes, round(states.shape[1] ** 0.5), views.windows)
    shown = truth["category"] > 0
    return model.model.multi_modal_projector(states)[shown], {k: v[shown] for k, v in truth.items()}


def share_of_variance(features: Float[Tensor, "patches d"], classes: Tensor) -> float:
    """Return the share of the features' variance that lies between the means of the classes.

    >>> share_of_variance(torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0, 1]))
    1.0
    """
    centered = features - features.mean(0)
    between = torch.zeros(())
    for one in classes.unique():
        part = centered[classes == one]
        between = between + len(part) * part.mean(0).square().sum()
    return float(between / centered.square().sum())
