"""How a scene is painted: the ground, and on it each thing's marks, body, material and eyes.

A color, a shape, a material and a category are each plain to see, so that a small model can learn to read
them: a cup is a cup by its handle, whatever the shape of its body.

Example:
    >>> draw_scene(scene).size
    (224, 224)
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from miniature.world import COLORS, Scene, Thing

__all__ = ["draw_scene"]

Number = float | int
Point = tuple[Number, Number]  # x and y, in pixels of the picture
Color = tuple[int, int, int]
INK = (40, 40, 48)  # outlines, handles, legs
WHITE, BLACK, ORANGE, LEAF = (255, 255, 255), (0, 0, 0), (250, 140, 20), (30, 130, 50)
WALLS = {"indoors": (226, 214, 196), "outdoors": (190, 222, 240)}
GROUNDS = {"indoors": (178, 148, 120), "outdoors": (150, 190, 130)}
BOARD, GRASS = (165, 135, 108), (120, 165, 100)
EYES = {"cat": (-0.25, 0.25), "fish": (-0.3,), "bird": (0.3,)}  # across the body, in halves of its side


def draw_scene(scene: Scene) -> Image.Image:
    """Paint a scene as an RGB picture, as large as its frame says."""
    picture = Image.new("RGB", scene.frame, WALLS[scene.place])
    _draw_ground(picture, scene)
    for thing in scene.things:
        _draw_marks(ImageDraw.Draw(picture), thing)
        _draw_body(picture, thing)
        _draw_eyes(ImageDraw.Draw(picture), thing)
    return picture


def _draw_ground(picture: Image.Image, scene: Scene) -> None:
    """Paint boards or grass below a horizon at a random height."""
    rng, pen = np.random.default_rng(scene.seed), ImageDraw.Draw(picture)
    width, height = scene.frame
    horizon = int(rng.uniform(0.5, 0.75) * height)
    pen.rectangle((0, horizon, width, height), fill=GROUNDS[scene.place])
    if scene.place == "indoors":
        for y in range(horizon + 12, height, 18):
            pen.line((0, y, width, y), fill=BOARD, width=2)
    else:
        for x, y in zip(rng.uniform(0, width, 60), rng.uniform(horizon, height, 60), strict=True):
            pen.line((x, y, x + 1, y - 5), fill=GRASS, width=2)


def _draw_marks(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    """Paint what tells the category; the body comes over it. The marks reach as far as `world.REACH`."""
    r = thing.size / 2

    def at(across: Number, down: Number) -> Point:
        return thing.x + across * r, thing.y + down * r

    line, polygon = partial(pen.line, fill=INK, width=5), partial(pen.polygon, fill=INK)
    match thing.category:
        case "cup":
            _ring(pen, at(1, 0), 0.42 * r)
        case "bag":
            _ring(pen, at(0, -1), 0.42 * r)
        case "clock":
            for side in (-1, 1):
                _dot(pen, at(side * 0.8, -1), 9, INK)
        case "lamp":
            (x, y), foot = at(0, 1.38), 16  # pixels
            line((at(0, 0), at(0, 1.4)))
            line((x - foot, y, x + foot, y))
        case "table":
            for side in (-1, 1):
                line((at(side * 0.8, 0.8), at(side * 0.8, 1.42)))
        case "cat":
            for side in (-1, 1):
                polygon((at(side * 0.2, -0.7), at(side * 0.7, -1.4), at(side, -0.5)))
        case "fish":
            polygon((at(0.7, 0), at(1.42, -0.6), at(1.42, 0.6)))
        case "bird":
            polygon((at(0.5, -0.35), at(1.42, 0), at(0.5, 0.35)), fill=ORANGE)
            for side in (-1, 1):
                line((at(side * 0.3, 0.8), at(side * 0.3, 1.4)), width=4)
        case "car":
            for side in (-1, 1):
                _dot(pen, at(side * 0.6, 1.1), 0.33 * r, INK)
        case "boat":
            polygon((at(-1.4, 0.9), at(1.4, 0.9), at(0.9, 1.42), at(-0.9, 1.42)))
        case "cake":
            (x, top), (_, bottom) = at(0, -1.3), at(0, -0.2)
            for across in (-14, 0, 14):  # pixels
                line((x + across, top, x + across, bottom))
                _dot(pen, (x + across, top), 4, ORANGE)
        case "apple":
            (x, top), (_, bottom) = at(0, -1.42), at(0, -1.08)
            line((at(0, -1.4), at(0, -0.5)))
            pen.ellipse((x + 2, top, x + 24, bottom), fill=LEAF)


def _draw_body(picture: Image.Image, thing: Thing) -> None:
    """Paint the body in its color and material, and its outline."""
    r = thing.size / 2
    corner, side = (round(thing.x - r), round(thing.y - r)), round(2 * r)
    inside, frame = Image.new("L", (side, side), 0), Image.new("L", (side, side), 0)
    _outline(inside, thing.shape)(fill=255)
    _outline(frame, thing.shape)(outline=255, width=3)
    picture.paste(_swatch(side, COLORS[thing.color], thing.material), corner, inside)
    picture.paste(Image.new("RGB", (side, side), INK), corner, frame)


def _outline(stencil: Image.Image, shape: str) -> Callable[..., None]:
    """Return the call that draws a shape as large as the stencil."""
    pen, end = ImageDraw.Draw(stencil), stencil.width - 1
    if shape == "round":
        return partial(pen.ellipse, (0, 0, end, end))
    if shape == "square":
        inset = round(0.06 * stencil.width)
        return partial(pen.rectangle, (inset, inset, end - inset, end - inset))
    return partial(pen.polygon, ((end / 2, 0), (end, end), (0, end)))


def _swatch(side: int, color: Color, material: str) -> Image.Image:
    """Make a square of a material: wood has level grain, metal rivets, wool a weave, plastic nothing."""
    swatch = Image.new("RGB", (side, side), color)
    pen, dark = ImageDraw.Draw(swatch), tuple(int(0.52 * c) for c in color)
    if material == "wood":
        for y in range(5, side, 11):
            pen.line((0, y, side, y), fill=dark, width=4)
    elif material == "metal":
        for row, y in enumerate(range(7, side, 12)):
            for x in range(7 + 6 * (row % 2), side, 13):
                _dot(pen, (x, y), 3, dark)
    elif material == "wool":
        for x in range(-side, side, 12):
            pen.line((x, side, x + side, 0), fill=dark, width=4)
    return swatch


def _draw_eyes(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    for across in EYES.get(thing.category, ()):
        middle = (thing.x + across * thing.size / 2, thing.y)
        _dot(pen, middle, 5, WHITE)
        _dot(pen, middle, 3, BLACK)


def _dot(pen: ImageDraw.ImageDraw, middle: Point, radius: Number, fill: Color) -> None:
    pen.ellipse(_around(middle, radius), fill=fill)


def _ring(pen: ImageDraw.ImageDraw, middle: Point, radius: Number) -> None:
    pen.ellipse(_around(middle, radius), outline=INK, width=5)


def _around(middle: Point, radius: Number) -> tuple[Number, Number, Number, Number]:
    x, y = middle
    return x - radius, y - radius, x + radius, y + radius
