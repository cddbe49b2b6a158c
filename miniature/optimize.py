"""One step of training: the optimizers, their learning rate, and the running average of the weights."""

import torch
from torch import Tensor, nn

from miniature.precision import AsHalf

__all__ = ["Weights", "copy_weights", "optimizer_step", "update_average", "make_optimizers", "set_rate"]

Weights = dict[str, Tensor]


def make_optimizers(parts: nn.Module, *, lr: float, lr_rest: float) -> list[torch.optim.Optimizer]:
    """Make AdamW, and Muon for the weight matrices inside the layers where there are any.

    In a trial, AdamW on all of them stayed at chance on ChooseRel and LogicalObj.
    """
    matrices, entrance, rest = [], [], []
    for name, weight in parts.named_parameters():
        in_layers = weight.ndim == 2 and "embed" not in name and ".layers." in name
        # The projector's first layer takes in the tower's features, which are large: its steps must be small.
        (matrices if in_layers else entrance if "linear_1" in name else rest).append(weight)
    groups = [dict(params=rest)] + ([dict(params=entrance, lr=0.1 * lr_rest)] if entrance else [])
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=lr_rest, betas=(0.9, 0.98), weight_decay=0.01)
    ]
    if matrices:
        optimizers += [torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_rate(optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    """Warm up over 100 steps, hold, and fall linearly to nothing over the last 40 %."""
    share = max(0.0, min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share


def optimizer_step(loss: Tensor, parts: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Take one step of every optimizer, with the gradient clipped to norm 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
    for optimizer in optimizers:
        with AsHalf():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def copy_weights(parts: nn.Module) -> Weights:
    """Copy all weights and buffers, by name."""
    return {name: weight.detach().clone() for name, weight in parts.state_dict().items()}


def update_average(average: Weights, parts: nn.Module, decay: float) -> None:
    """Move the running average of the weights a little towards where they are now."""
    for name, weight in parts.state_dict().items():
        if weight.is_floating_point():
            average[name].lerp_(weight, 1 - decay)
        else:
            average[name].copy_(weight)
