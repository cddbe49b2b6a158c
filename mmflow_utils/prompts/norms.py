"""Attention sinks in the image encoder: image patches whose features have an unusual norm (App. E).

norms = measure_norms(model, samples)
cut = find_norm_threshold(norms["norm"])
result = knockout_sweep(model, samples, SINK_FLOWS, encoder=partial(encode_by_norm, threshold=cut.value), ...)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float
from tqdm.auto import tqdm

from mmflow_utils.data.sample import Sample
from mmflow_utils.models.adapter import VLM, picture_features
from mmflow_utils.prompts.encoding import Encoded, encode, image_positions
from mmflow_utils.prompts.flows import IMAGE_PATCHES_TO_QUESTION, Flow

__all__ = ["SINK_FLOWS", "NormThreshold", "encode_by_norm", "find_norm_threshold", "measure_norms", "patch_norms"]

_BY_NORM = ("image_related_low_norm", "image_other_low_norm", "image_high_norm")
SINK_FLOWS = (*IMAGE_PATCHES_TO_QUESTION, *(Flow(source=name, target="question") for name in _BY_NORM))
"""App. E, Fig. 16: Fig. 5 with and without the patches of high norm, and these patches alone."""


@dataclass(frozen=True, kw_only=True)
class NormThreshold:
    """A norm above which an image patch counts as high-norm, the rule that it comes from, and whether any is above."""

    value: float
    rule: str
    has_outliers: bool


def patch_norms(model: VLM, encoded: Encoded) -> Float[np.ndarray, " image_patches"]:
    """Return the norm of each image patch's features, as the projector receives them (App. E).

    In the order of `encoded.positions["image"]`; newline tokens have no features.

    Raises:
        ValueError: The prompt shows no picture, or the model's image tokens are not its patches in order.
    """
    image_positions(encoded)
    norms = picture_features(model, encoded.inputs).float().norm(dim=-1, keepdim=True).cpu()
    ordered = model.in_token_order(norms, encoded.inputs)[:, 0].numpy()
    image_positions(encoded, len(ordered))
    return ordered[~np.isnan(ordered)]


def measure_norms(model: VLM, samples: Iterable[Sample], *, progress: bool = True) -> pd.DataFrame:
    """Measure the norms of all image patches, each picture once.

    Returns:
        One row per picture and patch: image_id, image_patch (its number in the prompt, from 0), norm.
    """
    first = {sample.image_id: sample for sample in reversed(list(samples))}
    parts = []
    for image_id, sample in tqdm(first.items(), desc="Norms", unit="picture", disable=not progress):
        norms = patch_norms(model, encode(model, sample))
        parts.append(pd.DataFrame({"image_id": image_id, "image_patch": np.arange(len(norms)), "norm": norms}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["image_id", "image_patch", "norm"])


def find_norm_threshold(norms: Sequence[float] | np.ndarray | pd.Series, *, given: float = 0.0) -> NormThreshold:
    """Find the norm above which patches are outliers, or take the one `given`.

    The paper reads 57 off its distribution for CLIP-L-336. Without such a reading: Tukey's outer fence of the log
    norms, log Q3 + 3 (log Q3 - log Q1).

    Args:
        norms: Of all patches.
        given: A threshold to use as it is; 0 to find one.

    Raises:
        ValueError: No norms, norms that aren't positive numbers, or a negative threshold.

    Example:
        >>> find_norm_threshold([9.0, 10.0, 10.0, 11.0] * 99 + [80.0]).rule
        "Tukey's outer fence of the log norms"
    """
    norms = np.sort(np.asarray(norms, dtype=float))
    if not len(norms) or not np.isfinite(norms).all() or norms[0] <= 0:
        raise ValueError(f"Expected positive finite norms, got {len(norms)}, the first of them {norms[:3]}.")
    if given < 0:
        raise ValueError(f"A norm's threshold is above 0, or 0 to find one; got {given}.")
    if given:
        return NormThreshold(value=float(given), rule="given", has_outliers=bool(norms[-1] > given))
    low, high = np.quantile(np.log(norms), [0.25, 0.75])
    fence = float(np.exp(high + 3 * (high - low)))
    # Norms that are all alike have no outliers, but for rounding.
    found, rule = bool(norms[-1] > fence * (1 + 1e-6)), "Tukey's outer fence of the log norms"
    if not found:
        fence, rule = max(fence, float(norms[-1])), f"no patch beyond {rule}"
    return NormThreshold(value=fence, rule=rule, has_outliers=found)


def encode_by_norm(model: VLM, sample: Sample, *, threshold: float) -> Encoded:
    """Encode a sample and divide its image patches by norm (App. E).

    Adds the sets `image_high_norm` (norm above `threshold`), `image_related_low_norm` and
    `image_other_low_norm`; where one is empty it is missing, with the reason.
    """
    encoded = encode(model, sample)
    positions, norms = encoded.positions, patch_norms(model, encoded)
    high = {p for p, norm in zip(positions["image"], norms, strict=True) if norm > threshold}
    found = {"image_high_norm": sorted(high)}
    missing = {"image_high_norm": f"no image patch has a norm above {threshold:.1f}"}
    for name in ("image_related", "image_other"):
        found[f"{name}_low_norm"] = [p for p in positions.get(name) if p not in high]
        missing[f"{name}_low_norm"] = positions.missing.get(name, "all its image patches have a high norm")
    empty = {name: reason for name, reason in missing.items() if not found[name]}
    return replace(encoded, positions=positions.with_(**found).with_missing(**empty))
