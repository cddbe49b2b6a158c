"""What a model is shown of scenes: the whole picture and, where its processor cuts them, tiles.

Example:
    >>> views = look_at([scene], model.processor.image_processor)
    >>> views.pixels.shape, views.windows
    (torch.Size([1, 3, 112, 112]), [(0.0, 0.0, 224.0, 224.0)])
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, select_best_resolution

from miniature.drawing import draw_scene
from miniature.world import Frame, Scene

__all__ = ["Views", "Window", "look_at", "windows_of"]

Window = tuple[float, float, float, float]  # left, top, width and height, in pixels of the picture


@dataclass(frozen=True, kw_only=True)
class Views:
    """Pictures as the vision tower receives them: each view's pixels, scene, and part of the picture."""

    pixels: Float[Tensor, "view 3 h w"]
    scenes: list[Scene]
    windows: list[Window]


def look_at(scenes: list[Scene], images: BaseImageProcessor) -> Views:
    """Draw scenes and send them through an image processor; all views of a scene stand together."""
    grid = getattr(images, "image_grid_pinpoints", None)
    windows = [windows_of(scene.frame, grid, images.crop_size["height"]) for scene in scenes]
    pixels = images([draw_scene(scene) for scene in scenes], return_tensors="pt")["pixel_values"]
    if grid:  # the processor fills up to the most tiles of any picture
        pixels = torch.cat([tiles[: len(own)] for tiles, own in zip(pixels, windows, strict=True)])
    return Views(
        pixels=pixels,
        scenes=[scene for scene, own in zip(scenes, windows, strict=True) for _ in own],
        windows=[window for own in windows for window in own],
    )


def windows_of(frame: Frame, grid: list[list[int]] | None, side: int) -> list[Window]:
    """Return the windows of a picture: the whole of it, then LLaVA-NeXT's tiles of `side` pixels, row by row.

    Args:
        frame: Width and height of the picture.
        grid: The heights and widths that it may be enlarged or reduced to; None where no tiles are cut.
        side: Of a tile, in pixels.

    Returns:
        Windows in pixels of the picture. A tile's may reach beyond it: there is padding.
    """
    width, height = frame
    whole = (0.0, 0.0, float(width), float(height))
    if grid is None:
        return [whole]
    full_height, full_width = select_best_resolution((height, width), grid)
    scale = min(full_width / width, full_height / height)
    left, top = (full_width - width * scale) // 2, (full_height - height * scale) // 2
    corners = [(x, y) for y in range(0, full_height, side) for x in range(0, full_width, side)]
    return [whole] + [((x - left) / scale, (y - top) / scale, side / scale, side / scale) for x, y in corners]
