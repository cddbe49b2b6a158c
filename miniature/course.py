"""A training run stage by stage: its learning curves, and checkpoints that it goes on from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from miniature.optimize import Weights, copy_weights, optimizer_step, set_rate, update_average

__all__ = ["Course"]


class Course:
    """Train parts of a model, keep the learning curves, and go on from where a checkpoint left off.

    Attributes:
        stages: The stages' names; their order seeds the data.
        curves: A row for each measurement: stage, step, metric (loss, accuracy_pct), task and value.
    """

    stages: tuple[str, ...] = ()
    note_every = 50  # steps from one note of the loss to the next

    def __init__(self, model: nn.Module, recipe: Any, folder: Path | str):
        self.model, self.recipe, self.folder = model, recipe, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.curves: list[dict] = []

    def fit(
        self,
        stage: str,
        parts: nn.Module,
        steps: int,
        loss_of: Callable[[np.random.Generator], Tensor],
        evaluate: Callable[[], dict[str, float]],
        *,
        optimizers: list[torch.optim.Optimizer],
        rates: Sequence[Sequence[int]] = (),
        before: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Run one stage from its last checkpoint to its end; afterwards `parts` hold the averaged weights.

        The rate rises and falls once, or as `rates` say: from which step on, begun where, how long. `before`
        is called before each step.
        """
        self.model.requires_grad_(False)
        parts.requires_grad_(True)
        average = copy_weights(parts)
        first = self._resume(stage, parts, average, optimizers)
        bar = tqdm(range(first, steps), desc=stage, unit="step", initial=first, total=steps)
        for step in bar:
            _, begun, length = max(rate for rate in (rates or [(0, 0, steps)]) if rate[0] <= step)
            self.set_rate(stage, optimizers, step - begun, length)
            before(step)
            # The data of a step depend on nothing before it: resuming changes nothing.
            loss = loss_of(np.random.default_rng([self.recipe.seed, self.stages.index(stage), step]))
            optimizer_step(loss, parts, optimizers)
            update_average(average, parts, min(self.recipe.ema, (step + 1) / (step + 10)))
            ended = step + 1 == steps
            if step % self.note_every == 0 or ended:
                self.note(stage, step + 1, "loss", {"all": float(loss.detach())})
                bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
            if (step + 1) % self.recipe.eval_every == 0 or ended:
                raw = copy_weights(parts)
                parts.load_state_dict(average)
                self.note(stage, step + 1, "accuracy_pct", evaluate())
                parts.load_state_dict(raw)
                self._save(stage, step + 1, raw, average, optimizers)
        parts.load_state_dict(average)

    def set_rate(self, stage: str, optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
        """Set the learning rate of a step."""
        set_rate(optimizers, step, steps)

    def note(self, stage: str, step: int, metric: str, values: dict[str, float]) -> None:
        """Add a measurement to the curves."""
        at = dict(stage=stage, step=step, metric=metric)
        self.curves += [at | dict(task=task, value=round(value, 4)) for task, value in values.items()]

    def _resume(self, stage: str, parts: nn.Module, average: Weights, optimizers: list) -> int:
        """Load a stage's checkpoint if there is one; return the number of steps already taken."""
        path = self._checkpoint(stage)
        if not path.exists():
            return 0
        saved = torch.load(path, weights_only=True)
        parts.load_state_dict(saved["parts"])
        average.update(saved["average"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.curves = [row for row in self.curves if row["stage"] != stage] + saved["curves"]
        return saved["step"]

    def _save(self, stage: str, step: int, raw: Weights, average: Weights, optimizers: list) -> None:
        """Write a stage's checkpoint, whole or not at all."""
        path = self._checkpoint(stage)
        saved = dict(step=step, parts=raw, average=average)
        saved["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        saved["curves"] = [row for row in self.curves if row["stage"] == stage]
        torch.save(saved, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def _checkpoint(self, stage: str) -> Path:
        return self.folder / f"{stage}.pt"
