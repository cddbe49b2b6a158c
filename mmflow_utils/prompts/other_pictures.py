"""A second picture for each question: what its values are exchanged for by the intervention `resample`.

knockout_sweep(model, with_other_pictures(model, samples), FLOW_TO_LAST, window=9, intervention="resample")
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmflow_utils.data.sample import Sample
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import encode, image_positions

__all__ = ["with_other_pictures"]


def with_other_pictures(model: VLM, samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples, each with another one's picture as its `other_image`.

    Of the pictures whose tokens stand at the same positions it is the one half the list away, in the order of image
    ids. A sample without such a picture is left out.

    Example:
        >>> [sample.other_image != sample.image for sample in with_other_pictures(model, samples)]
        [True, True, True, True]
    """
    first = {sample.image_id: sample for sample in reversed(samples)}
    alike: dict[tuple, list[str]] = defaultdict(list)
    for image_id in sorted(first):
        encoded = encode(model, first[image_id])
        alike[*image_positions(encoded), None, *encoded.positions.get("image_newline")].append(image_id)
    other: dict[str, Path] = {}
    for ids in alike.values():
        shifted = ids[len(ids) // 2 :] + ids[: len(ids) // 2]
        other |= {a: first[b].image for a, b in zip(ids, shifted, strict=True) if a != b}
    return [replace(sample, other_image=other[sample.image_id]) for sample in samples if sample.image_id in other]
