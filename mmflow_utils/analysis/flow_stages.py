"""Which layers are a stage, by a rule and not by eye, and how sure its beginning and end are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from mmflow_utils.analysis.sentences import TIE, format_number, layer_ranges
from mmflow_utils.analysis.stats import curves, resample_means, summarize, sums_and_counts

SHARE = 0.2  # of a curve's strongest effect: what lies below is its tail, not its stage
NEGLIGIBLE = 5.0  # % or percentage points: a smaller effect counts as none
MIDDLE = 0.25, 0.75  # how deep the middle layers lie, see `depth_of`

Draws = Float[np.ndarray, "draws n_layers"]
Measured = tuple[float, float, float]
"""A value with the lower and upper end of its 95 % interval."""


def stage_layers(
    effects: pd.DataFrame,
    by: Sequence[str] = ("model", "line"),
    *,
    share: float = SHARE,
    negligible: float = NEGLIGIBLE,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Say which layers of each curve belong to its stage.

    They are those where the 95 % band that holds for all layers at once lies above `negligible` and the effect is
    at least `share` of the curve's strongest.

    Args:
        effects: from `collect_effects`.
        by: the columns that make a curve.
        share: between 0 and 1.
        negligible: an effect below it (unit of the effect) counts as none.
        n_boot, seed: of the bootstrap over images.

    Returns:
        `summarize`'s frame with that band, over `by` and layer, and `in_stage`.

    Raises:
        ValueError: no rows, a column of `by` that isn't there, a share or an effect out of range.
    """
    if not 0 <= share <= 1 or not negligible >= 0:
        raise ValueError(f"expected a share of 0 to 1 and negligible >= 0, got {share} and {negligible}")
    by = list(by)
    band = summarize(effects, "effect", [*by, "layer"], n_boot=n_boot, seed=seed, simultaneous_over="layer")
    strongest = band.groupby(by, dropna=False)["mean"].transform("max")
    return band.assign(in_stage=(band["ci_low"] > negligible) & (band["mean"] >= share * strongest))


def find_stages(
    effects: pd.DataFrame,
    by: Sequence[str] = ("model", "line"),
    *,
    share: float = SHARE,
    negligible: float = NEGLIGIBLE,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Find where each stage begins, where it is strongest and where it ends, with intervals (Fig. 1).

    The rule of `stage_layers` is applied to the data, and again to every resample of the images: there the
    band keeps its width and moves with the mean.

    Args:
        effects, by, share, negligible, n_boot, seed: as for `stage_layers`.

    Returns:
        One row per curve: `by`; layers of the stage, such as "0-3, 7", "" if there is none; begins, strongest
        and ends (layers), each with _low and _high, a 95 % bootstrap interval over images, NaN without a
        stage; effect at the strongest layer, with ci_low and ci_high of the band; n_layers, n, n_clusters.

    Raises:
        ValueError: as `stage_layers`.
    """
    by, rule = list(by), {"share": share, "negligible": negligible}
    table = stage_layers(effects, by, **rule, n_boot=n_boot, seed=seed)
    curve, (layer, mean, low) = curves(table, by).ngroup().to_numpy(), table[["layer", "mean", "ci_low"]].to_numpy().T
    found, tops = [], []
    for number, mine in with_image_numbers(effects).groupby(curves(effects, by).ngroup()):
        at = np.flatnonzero(curve == number)
        draws = resample(mine, n_boot=n_boot, seed=seed)
        row: dict[str, object] = {"layers": layer_ranges(layer[at[table["in_stage"].to_numpy()[at]]])}
        for name, edge in _edges(draws, (mean - low)[at], layer[at], **rule).items():
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), with_interval(edge), strict=True))
        found.append(row | {"n_layers": int(mine["n_layers"].max())})
        tops.append(at[strongest_index(mean[at][None])[0]])
    strongest = table[[*by, "mean", "ci_low", "ci_high", "n", "n_clusters"]].iloc[tops].reset_index(drop=True)
    return pd.concat([strongest.rename(columns={"mean": "effect"}), pd.DataFrame(found)], axis=1)


def tabulate_stages(stages: pd.DataFrame, by: Sequence[str] = ("model", "line")) -> pd.DataFrame:
    """Write `find_stages` as a table to read: "3 (2 to 4)" is layer 3 with its 95 % interval."""
    table = stages[[*by, "layers"]]
    for name in ("begins", "strongest", "ends", "effect"):
        ends, digits = (("ci_low", "ci_high"), 1) if name == "effect" else ((f"{name}_low", f"{name}_high"), 0)
        at, low, high = (stages[column].map(lambda x, d=digits: format_number(x, d)) for column in (name, *ends))
        table = table.assign(**{name: (at + " (" + low + " to " + high + ")").where(stages[name].notna(), "")})
    return table.assign(n=stages["n"], images=stages["n_clusters"]).set_index(list(by))


def _edges(
    draws: Draws, half_width: np.ndarray, layers: np.ndarray, *, share: float, negligible: float
) -> dict[str, Float[np.ndarray, " draws"]]:
    """First, strongest and last layer of the stage in every draw; NaN where there is none."""
    strongest = draws.max(1, keepdims=True)
    inside = (draws >= share * strongest) & (draws > half_width + negligible)
    index = {
        "begins": inside.argmax(1),
        "strongest": strongest_index(draws),
        "ends": len(layers) - 1 - inside[:, ::-1].argmax(1),
    }
    return {name: np.where(inside.any(1), layers[at].astype(float), np.nan) for name, at in index.items()}


def depth_of(layer: Any, n_layers: Any) -> Any:
    """Say how deep the middle of a layer lies, or of each in a column: 0 where the first begins, 1 where the last ends.

    >>> depth_of(np.array([0, 39]), 40).tolist()
    [0.0125, 0.9875]
    """
    return (layer + 0.5) / n_layers


def strongest_index(draws: Draws) -> Int[np.ndarray, " draws"]:
    """Return where each draw is strongest: of layers that print alike the first, whichever rounding lifts."""
    with np.errstate(invalid="ignore"):
        return (draws >= draws.max(1, keepdims=True) - TIE).argmax(1)


def with_image_numbers(effects: pd.DataFrame) -> pd.DataFrame:
    """Return what `resample` needs, in numbers alone: curve by curve, texts would cost more than all the rest."""
    return effects[["layer", "effect", "n_layers"]].assign(image_id=pd.factorize(effects["image_id"], sort=True)[0])


def resample(effects: pd.DataFrame, *, images: Sequence | None = None, n_boot: int, seed: int) -> Draws:
    """Average the effect at each layer: over the data (draw 0), then over each resample of the images.

    Args:
        images: the images to draw from, by default those of `effects`. Curves that are given the same ones
            share their draws and can be compared draw by draw; a draw without any image of a curve is NaN.
    """
    values = effects["effect"].to_numpy(float, na_value=np.nan)
    kept = ~np.isnan(values)  # arrays from here on: this is called for every curve, and a frame's own ways take longer
    layer, layers = pd.factorize(effects["layer"].to_numpy()[kept], sort=True)
    image, names = pd.factorize(effects["image_id"].to_numpy()[kept], sort=True)
    if images is not None:
        names, image = images, pd.Index(images).get_indexer(names)[image]
    sums, counts = sums_and_counts(layer, image, values[kept], (len(layers), len(names)))
    return np.vstack([sums.sum(1) / counts.sum(1), resample_means(sums, counts, n_boot, seed)])


def with_interval(draws: Float[np.ndarray, " draws"]) -> Measured:
    """Give the value (draw 0) and the 95 % interval of the other draws; NaN where nothing was found."""
    others = draws[1:][np.isfinite(draws[1:])]
    if not np.isfinite(draws[0]) or not len(others):
        return float("nan"), float("nan"), float("nan")
    low, high = np.quantile(others, [0.025, 0.975])
    return float(draws[0]), float(low), float(high)
