"""A second picture for each question, whose values the intervention `resample` takes.

knockout_sweep(model, with_other_pictures(model, samples), FLOW_TO_LAST, window=9, intervention="resample")
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from mmflow_utils.data.sample import Sample, exchange_pictures
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import encode, image_positions

__all__ = ["with_other_pictures"]


def with_other_pictures(model: VLM, samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples, each with another one's picture (`exchange_pictures`) as its `other_image`.

    Only a picture whose tokens stand at the same positions will do: a sample without one is left out.
    """
    alike: dict[tuple, list[Sample]] = defaultdict(list)
    for sample in samples:
        encoded = encode(model, sample)
        alike[*image_positions(encoded), None, *encoded.positions.get("image_newline")].append(sample)
    groups = [some for some in alike.values() if len({sample.image_id for sample in some}) > 1]
    other = {sample.sample_id: sample.image for some in groups for sample in exchange_pictures(some, some)}
    return [replace(sample, other_image=other[sample.sample_id]) for sample in samples if sample.sample_id in other]
