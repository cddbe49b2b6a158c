"""The one loop over samples that all experiments share: encode, plan, skip with a reason, run, check.

Questions are visited picture by picture, so that what they share is run once (`Prefix`); rows come in the given order.

loop = Loop(model, n_check=2)
result = loop.over(samples, measure, columns, name="Knockout")    # measure: a prompt -> its rows
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from mmflow_utils.data.sample import Sample, picture_by_picture
from mmflow_utils.engine.closeness import check_close
from mmflow_utils.engine.prefix import Prefix
from mmflow_utils.engine.reference import Run
from mmflow_utils.engine.sweep import engine
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded, encode
from mmflow_utils.prompts.flows import MODULE_INTERVENTIONS, Flow, Intervention, Variant, flow_problem, variants
from mmflow_utils.results.record import Result

__all__ = ["Loop"]

N_PLAIN = 12  # variants of a checked sample that are run in full passes, too: of hundreds
Engine = Callable[..., Run]
Found = TypeVar("Found")
Wanted = tuple[str, Flow, Intervention]  # a label, and what is to be done


@dataclass
class Loop:
    """A loop over samples, and what it leaves beside rows.

    Attributes:
        model: the model.
        encoder: makes the prompt and its positions.
        method: the engine's name, `sweep` or `reference`.
        n_check: how many samples the sweep is compared with the reference on, of those that can be measured.
        skipped: what a prompt lacked, with the reason.
        differences: the largest one on each sample checked.
        prefix: what the prompt before left for the next one.
    """

    model: VLM
    encoder: Callable[[VLM, Sample], Encoded] = encode
    method: str = "sweep"
    n_check: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    prefix: Prefix = field(default_factory=Prefix)

    def __post_init__(self) -> None:
        engine(self.method)  # refuses an unknown one

    def over(
        self,
        samples: Iterable[Sample],
        measure: Callable[[Encoded], Sequence[dict[str, Any]]],
        columns: Sequence[str],
        *,
        name: str,
        progress: bool = True,
    ) -> Result:
        """Measure each sample's prompt, and return the rows with what was skipped and checked."""
        samples = list(samples)
        rows = []
        for n in tqdm(picture_by_picture(samples), desc=name, unit="question", disable=not progress):
            sample = samples[n]
            labels = {"sample_id": sample.sample_id, "image_id": sample.image_id, "task": sample.task}
            rows += [labels | row for row in measure(self.encoder(self.model, sample))]
        frame = pd.DataFrame(rows, columns=list(columns))
        return Result(frame, self.skipped, max(self.differences, default=None)).in_order_of(samples)

    def plan(
        self,
        encoded: Encoded,
        wanted: Iterable[Wanted],
        *,
        window: int,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        needs: Sequence[str] = (),
        kind: str = "flow",
    ) -> list[tuple[str, Variant]]:
        """List the variants of what this prompt has, labeled; skip the rest, each as a `kind`, with its reason.

        Raises:
            ValueError: a position set, of a flow or among `needs`, that no prompt has.
        """
        held, planned = encoded.positions, []
        for label, flow, intervention in wanted:
            source = () if intervention in MODULE_INTERVENTIONS else (flow.source,)
            for name in (*source, flow.target, *needs):
                if name not in held and name not in held.missing:
                    raise ValueError(f"{label}: {held.why_missing(name)}.")
            problem = flow_problem(held, flow, intervention=intervention)
            if reason := problem or next((held.why_missing(name) for name in needs if name not in held), None):
                self.skip(encoded, reason, **{kind: label})
                continue
            where: Any = {"window": window, "n_layers": self.model.n_layers, "layers": layers, "heads": heads}
            planned += [(label, variant) for variant in variants(held, [flow], intervention=intervention, **where)]
        return planned

    def skip(self, encoded: Encoded, reason: str, **what: str) -> None:
        """Note what is left out of a sample, and why."""
        self.skipped.append({"sample_id": encoded.sample.sample_id, **what, "reason": reason})

    @property
    def checks(self) -> bool:
        """Whether a sample measured now is to be checked."""
        return self.method == "sweep" and len(self.differences) < self.n_check

    def run(
        self,
        encoded: Encoded,
        planned: Sequence[Variant],
        compute: Callable[[Engine, Sequence[Variant]], Found],
        values: Callable[[Found, slice], Tensor],
        *,
        tolerance: float,
        unit: str = "probability",
    ) -> Found:
        """Compute by the loop's method; on the first samples, in some variants, the plain way too: both must agree.

        `compute` takes an engine and variants. `values` gives numbers to compare, of those variants of what it found;
        `N_PLAIN` are compared, spread over flows and layers, others in each sample.
        """
        plain_way = engine("reference")
        # The sweep takes up what the prompt before this one left.
        way = plain_way if self.method == "reference" else partial(engine(self.method), prefix=self.prefix)
        found = compute(way, planned)
        if self.checks:
            step = -(-len(planned) // N_PLAIN) | 1  # odd, so that it meets one head or layer after the other
            some = slice(len(self.differences) % min(step, len(planned)), None, step)
            plain = values(compute(plain_way, planned[some]), slice(None))
            self.differences.append(check_close(encoded, values(found, some), plain, tolerance=tolerance, unit=unit))
        return found
