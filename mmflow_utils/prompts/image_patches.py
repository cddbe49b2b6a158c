"""Where image tokens lie in the picture, and a control: boxes of the same size elsewhere in it (§6, Fig. 5).

encoded = encode_random_patches(model, sample, n_draws=5)
locate_image_patches(model, encoded)                   # draw it with plot_image_patches
result = knockout_sweep(model, samples, control_flows(5), window=9, encoder=encode_random_patches)
merge_draws(frame)                                     # the draws as one flow, beside the others
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil, floor
from zlib import crc32

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from mmflow_utils.data.sample import Box, Sample, picture_size
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded, encode, find_image_patches, image_positions, processed_drawing
from mmflow_utils.prompts.flows import IMAGE_PATCHES_TO_QUESTION, Flow
from mmflow_utils.prompts.positions import PositionSets

__all__ = [
    "control_flows",
    "count_image_patches",
    "encode_random_patches",
    "locate_image_patches",
    "merge_draws",
    "random_boxes",
]

_DRAW = re.compile(r"image_random_\d+")
_N_TRIES, _CLOSE, _LOOSEST = 500, 0.1, 0.25  # shares of the number of patches that random boxes should reach


def locate_image_patches(
    model: VLM, encoded: Encoded, sets: Sequence[str] = ("image_related", "image_other")
) -> pd.DataFrame:
    """Return which piece of the stored picture each image token stands for.

    A drawing whose colors are its own coordinates goes through the model's picture processor: where a color comes
    out, there that pixel went, through any resizing, cropping, padding and tiling.

    Args:
        encoded: A prompt with a picture.
        sets: Position sets to name; where a position is in several, the first one counts.

    Returns:
        One row per image token, newlines left out: position; view (0: the whole picture, 1: its tiles); x, y, w, h in
        pixels of the stored picture, w or h 0 in the padding; set, None if in none of `sets`.

    Raises:
        ValueError: The prompt shows no picture, or the model's image tokens are not its patches in order.
    """
    image_positions(encoded)
    edges = _patch_edges(model, picture_size(encoded.sample))
    overview = range(len(edges))[model.overview_tile]
    views = torch.tensor([[[float(tile != overview)]] * edges.shape[1] for tile in range(len(edges))])
    values = model.in_token_order(torch.cat([views, edges], dim=-1), encoded.inputs).numpy()
    seen = ~np.isnan(values[:, 0])
    position = np.array(image_positions(encoded, len(values)))[seen]
    view, left, top, right, bottom = values[seen].astype(float).T
    names = {p: name for name in reversed(sets) for p in encoded.positions.get(name)}
    sides = {"x": left, "y": top, "w": right - left, "h": bottom - top}
    named = [names.get(p) for p in position]
    return pd.DataFrame({"position": position, "view": view.astype(int), **sides, "set": named})


def random_boxes(
    boxes: Iterable[Box], patches: pd.DataFrame, size: tuple[int, int], *, rng: np.random.Generator
) -> tuple[Box, ...] | None:
    """Move boxes to random places of the same picture, beside the image patches that they lie on now.

    The first try counts whose boxes reach as many *other* image patches as the boxes do now, to within a tenth; if
    none of 500 does, the nearest one to within a quarter.

    Args:
        boxes: In pixels of the stored picture of width and height `size`; each moves on its own.
        patches: From `locate_image_patches`.
        rng: Draws the places.

    Returns:
        The moved boxes in the same order; None where the picture has no room for them.

    Example:
        >>> patches = pd.DataFrame({"x": [0.0, 8.0], "y": [0.0, 0.0], "w": [8.0, 8.0], "h": [8.0, 8.0]})
        >>> random_boxes([Box(x=1.0, y=1.0, w=5.0, h=5.0)], patches, (16, 8), rng=np.random.default_rng(0))[0].x >= 8
        True
    """
    boxes = tuple(boxes)
    edges = patches[["x", "y", "w", "h"]].to_numpy(dtype=float)
    wanted = int((taken := _touched(edges, boxes)).sum())
    best, least = None, floor(_LOOSEST * wanted) + 1
    for _ in range(_N_TRIES if wanted else 0):
        moved = tuple(_move(box, size, rng) for box in boxes)
        off = abs(int((_touched(edges, moved) & ~taken).sum()) - wanted)
        if off <= _CLOSE * wanted:
            return moved
        if off < least:
            best, least = moved, off
    return best


def encode_random_patches(model: VLM, sample: Sample, *, n_draws: int = 5, seed: int = 0) -> Encoded:
    """Encode a sample and name the image patches under random boxes, for a control that the paper lacks.

    The sets `image_random_1` to `image_random_<n_draws>` hold the patches under boxes of the size and shape of the
    question's own, elsewhere in the same picture (`random_boxes`), without the related patches. The places depend on
    `seed` and the sample alone. Where a picture has no room, all draws are missing, with the reason.
    """
    encoded = encode(model, sample)
    names, positions = [f"image_random_{draw}" for draw in range(1, n_draws + 1)], encoded.positions
    if reason := positions.missing.get("image_related") or positions.missing.get("image_other"):
        return replace(encoded, positions=positions.with_missing(**dict.fromkeys(names, reason)))
    patches, size = locate_image_patches(model, encoded), picture_size(sample)
    boxes = [thing.box for thing in sample.objects if thing.box]
    rng = np.random.default_rng([seed, crc32(sample.sample_id.encode())])
    related, found = set(positions["image_related"]), {}
    for name in names:
        moved = random_boxes(boxes, patches, size, rng=rng)
        found[name] = set(find_image_patches(model, encoded, moved or ())) - related
    if not all(found.values()):
        reason = "the picture has no room for boxes of that size beside the related image patches"
        return replace(encoded, positions=positions.with_missing(**dict.fromkeys(names, reason)))
    return replace(encoded, positions=positions.with_(**found))


def control_flows(n_draws: int) -> tuple[Flow, ...]:
    """Return the flows of Fig. 5 and, beside them, those of the random image patches.

    >>> [str(flow) for flow in control_flows(1)][1:]
    ['Other image patches -> Question', 'Image random 1 -> Question']
    """
    draws = (Flow(source=f"image_random_{draw}", target="question") for draw in range(1, n_draws + 1))
    return (*IMAGE_PATCHES_TO_QUESTION, *draws)


def merge_draws(frame: pd.DataFrame) -> pd.DataFrame:
    """Average each sample's draws at each layer into the one flow of Random image patches.

    Numbers are averaged, `correct_pct` among them; other rows stay as they are. A sample's draws are no more data than
    its one related set, so that averaging comes before any interval or test.
    """
    draws = frame["source"].str.fullmatch(_DRAW)
    if not draws.any():
        return frame.copy()
    numbers = ["p_knockout", "rel_change_pct", "logprob_change", "logit_diff_change", *{"correct_pct"} & {*frame}]
    keys = [c for c in frame if c not in (*numbers, "flow", "source")]
    merged = frame[draws].groupby(keys, dropna=False, sort=False, as_index=False)[numbers].mean()
    merged["source"] = "image_random"
    merged["flow"] = [str(Flow(source="image_random", target=target)) for target in merged["target"]]
    return pd.concat([frame[~draws], merged[list(frame.columns)]], ignore_index=True)


def count_image_patches(positions: PositionSets) -> dict[str, float]:
    """Count the image patches of each set of a prompt; the random draws are averaged, and NaN if absent.

    >>> positions = PositionSets(n_tokens=4, sets={"image": (0, 1, 2), "image_random_1": (2,)})
    >>> count_image_patches(positions)["image_random"]
    1.0
    """
    counts = {name: float(len(positions.get(name))) for name in ("image", "image_related", "image_other")}
    draws = [len(positions[name]) for name in positions.sets if _DRAW.fullmatch(name)]
    return counts | {"image_random": float(np.mean(draws)) if draws else np.nan}


def _move(box: Box, size: tuple[int, int], rng: np.random.Generator) -> Box:
    """Put a box anywhere in the picture, at whole pixels."""
    x, y = (rng.integers(max(1, floor(s - w) + 1)) for s, w in zip(size, (box.w, box.h), strict=True))
    return Box(x=float(x), y=float(y), w=box.w, h=box.h)


def _touched(edges: Float[np.ndarray, "patches 4"], boxes: Iterable[Box]) -> Bool[np.ndarray, " patches"]:
    """Return which patches a box reaches into; boxes cover whole pixels, as in `find_image_patches`."""
    x, y, w, h = edges.T
    hit = np.zeros(len(edges), dtype=bool)
    slack = 0.01 * np.minimum(w, h)  # edges are measured, not known: touching is not reaching in
    for box in boxes:
        across = np.minimum(x + w, ceil(box.x + box.w)) - np.maximum(x, floor(box.x))
        down = np.minimum(y + h, ceil(box.y + box.h)) - np.maximum(y, floor(box.y))
        hit |= (across > slack) & (down > slack)
    return hit


def _patch_edges(model: VLM, size: tuple[int, int]) -> Float[Tensor, "tiles patches 4"]:
    """Find left, top, right and bottom of every patch in the stored picture; equal ones in the padding."""
    width, height = size
    drawing = np.full((height, width, 3), 255, dtype=np.uint8)  # blue tells the picture from padding
    drawing[:, :, 0] = np.round(255 * (np.arange(width) + 0.5) / width)
    drawing[:, :, 1] = np.round(255 * (np.arange(height) + 0.5) / height)[:, None]
    side, found = model.image_patch_size, []
    for red, green, blue in processed_drawing(model, Image.fromarray(drawing)).double().numpy():
        inside = blue > 0.999
        x = _edges(red, inside, side=side, length=width)
        y = _edges(green.T, inside.T, side=side, length=height)
        (left, top), (right, bottom) = np.meshgrid(x[:-1], y[:-1]), np.meshgrid(x[1:], y[1:])
        found.append(np.stack([left, top, right, bottom], axis=-1).reshape(-1, 4))
    return torch.from_numpy(np.stack(found)).float()


def _edges(
    shade: Float[np.ndarray, "across along"], inside: Bool[np.ndarray, "across along"], *, side: int, length: int
) -> Float[np.ndarray, " patches_plus_1"]:
    """Fit the line from processed to stored pixels along the second axis, and read it at the patches' edges."""
    # Colors have 256 steps, which is coarser than a pixel in a large picture; the line is not.
    n_pixels = shade.shape[1]
    used = np.flatnonzero(inside.any(0))
    if len(used) < 2:
        return np.zeros(n_pixels // side + 1)  # nothing of the picture is here
    middle = np.where(inside, shade, 0).sum(0)[used] / inside.sum(0)[used]
    slope, start = np.polyfit(used, middle * length, 1)
    return np.clip(slope * (np.arange(0, n_pixels + 1, side) - 0.5) + start, 0, length)
