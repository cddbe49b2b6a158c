"""The drawn world: scenes of a few things with colour, shape, material and place, as picture, scene graph and caption.

A scene is made in three steps that know nothing of each other: `sample_scene` draws the facts, `draw_scene` paints them,
`scene_graph` writes them down in GQA's own format. Every attribute is plain to see in the picture, so that a small
model can learn to read it, and every fact that a question may ask about stands in the scene graph.

Example:
    >>> scene = sample_scene(np.random.default_rng(0))
    >>> draw_scene(scene).size
    (224, 224)
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["Scene", "Thing", "caption", "draw_scene", "sample_scene", "scene_graph"]

SIZE = 224  # pixels, width and height of every picture
MARGIN = 6  # pixels kept free between two things and at the edge
CATEGORIES = ("cup", "bag", "clock", "lamp", "table", "cat", "fish", "bird", "car", "boat", "cake", "apple")
KINDS = {  # the super-categories that "Which kind of animal is this" asks for
    "animal": ("cat", "fish", "bird"),
    "vehicle": ("car", "boat"),
    "food": ("cake", "apple"),
    "furniture": ("lamp", "table", "clock"),
}
COLORS = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (45, 105, 220),
    "yellow": (247, 203, 45),
    "purple": (146, 72, 190),
    "white": (250, 250, 250),
}
SHAPES = ("round", "square", "triangular")
MATERIALS = ("wood", "metal", "wool", "plastic")
ATTRIBUTES = {"color": tuple(COLORS), "shape": SHAPES, "material": MATERIALS}
PLACES = ("indoors", "outdoors")
INK = (40, 40, 48)  # outlines, handles, legs
GROUNDS = {"indoors": ((226, 214, 196), (178, 148, 120)), "outdoors": ((190, 222, 240), (150, 190, 130))}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object of a scene; its body is a square of side `size` pixels around (`x`, `y`), in pixels of the picture."""

    object_id: str
    category: str
    color: str
    shape: str
    material: str
    x: float
    y: float
    size: float

    def attribute(self, kind: str) -> str:
        """Return the value of "color", "shape" or "material"."""
        return getattr(self, kind)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Bounding box (x, y, w, h) in pixels, handles and legs included."""
        reach = self.size * 0.5 * 1.45
        left, top = max(0, self.x - reach), max(0, self.y - reach)
        right, bottom = min(SIZE, self.x + reach), min(SIZE, self.y + reach)
        return round(left), round(top), round(right - left), round(bottom - top)

    @property
    def side(self) -> str | None:
        """ "left" or "right" half of the picture, None too near the middle to tell."""
        if abs(self.x - SIZE / 2) < 0.08 * SIZE:
            return None
        return "left" if self.x < SIZE / 2 else "right"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture's facts: where it is and what stands in it (distinct categories)."""

    scene_id: str
    place: str
    things: tuple[Thing, ...]
    seed: int  # of the speckles on the ground, which carry no fact


def sample_scene(rng: np.random.Generator, *, scene_id: str = "0", n_things: int | None = None) -> Scene:
    """Draw a scene of 2 to 4 things of distinct categories that don't touch each other."""
    n_things = n_things or int(rng.integers(2, 5))
    categories = rng.choice(CATEGORIES, n_things, replace=False)
    while True:
        spots = _place(rng, n_things)
        if spots is not None:
            break
    things = tuple(
        Thing(
            object_id=f"{scene_id}{i:02d}",
            category=str(category),
            color=str(rng.choice(ATTRIBUTES["color"])),
            shape=str(rng.choice(SHAPES)),
            material=str(rng.choice(MATERIALS)),
            x=spot[0],
            y=spot[1],
            size=spot[2],
        )
        for i, (category, spot) in enumerate(zip(categories, spots, strict=True))
    )
    return Scene(scene_id=scene_id, place=str(rng.choice(PLACES)), things=things, seed=int(rng.integers(2**31)))


def _place(rng: np.random.Generator, n: int) -> list[tuple[float, float, float]] | None:
    """Try to place `n` bodies (x, y, size) without overlap; None if this try got stuck."""
    spots: list[tuple[float, float, float]] = []
    for _ in range(40):
        size = float(rng.uniform(50, 64))
        reach = size * 0.725 + MARGIN / 2
        x, y = rng.uniform(reach, SIZE - reach, 2)
        if all(max(abs(x - u), abs(y - v)) > reach + s * 0.725 + MARGIN / 2 for u, v, s in spots):
            spots.append((float(x), float(y), size))
        if len(spots) == n:
            return spots
    return None


def draw_scene(scene: Scene) -> Image.Image:
    """Paint a scene as an RGB picture of SIZE x SIZE pixels."""
    rng = np.random.default_rng(scene.seed)
    wall, ground = GROUNDS[scene.place]
    picture = Image.new("RGB", (SIZE, SIZE), wall)
    pen = ImageDraw.Draw(picture)
    horizon = int(rng.uniform(0.5, 0.75) * SIZE)
    pen.rectangle((0, horizon, SIZE, SIZE), fill=ground)
    if scene.place == "outdoors":
        for x, y in zip(rng.uniform(0, SIZE, 60), rng.uniform(horizon, SIZE, 60), strict=True):
            pen.line((x, y, x + 1, y - 5), fill=(120, 165, 100), width=2)
    else:
        for y in range(horizon + 12, SIZE, 18):
            pen.line((0, y, SIZE, y), fill=(165, 135, 108), width=2)
    for thing in scene.things:
        _draw_thing(picture, thing)
    return picture


def _draw_thing(picture: Image.Image, thing: Thing) -> None:
    """Paint the marks of the category, then the body with its material over them."""
    pen = ImageDraw.Draw(picture)
    r = thing.size / 2
    MARKS[thing.category](pen, thing.x, thing.y, r)
    left, top = round(thing.x - r), round(thing.y - r)
    side = round(2 * r)
    body = Image.new("L", (side, side), 0)
    outline = _outline(thing.shape, side)
    outline(ImageDraw.Draw(body), fill=255)
    picture.paste(_textured(side, COLORS[thing.color], thing.material), (left, top), body)
    frame = Image.new("L", (side, side), 0)
    outline(ImageDraw.Draw(frame), outline=255, width=3)
    picture.paste(Image.new("RGB", (side, side), INK), (left, top), frame)
    if thing.category in ("cat", "fish", "bird"):  # animals look at you
        for dx in (-0.25, 0.25) if thing.category == "cat" else ((-0.3,) if thing.category == "fish" else (0.3,)):
            _dot(pen, thing.x + dx * r, thing.y, 5, (255, 255, 255))
            _dot(pen, thing.x + dx * r, thing.y, 3, (0, 0, 0))


def _outline(shape: str, side: int):
    """Return the ImageDraw call that draws the body's outline in a `side` x `side` square."""
    end = side - 1
    if shape == "round":
        return lambda pen, **kw: pen.ellipse((0, 0, end, end), **kw)
    if shape == "square":
        inset = round(0.06 * side)
        return lambda pen, **kw: pen.rectangle((inset, inset, end - inset, end - inset), **kw)
    return lambda pen, **kw: pen.polygon(((end / 2, 0), (end, end), (0, end)), **kw)


def _textured(side: int, color: tuple[int, int, int], material: str) -> Image.Image:
    """A `side` x `side` swatch: wood has level grain, metal rivets, wool a slanted weave, plastic nothing."""
    swatch = Image.new("RGB", (side, side), color)
    pen = ImageDraw.Draw(swatch)
    dark = tuple(int(0.52 * c) for c in color)
    if material == "wood":
        for y in range(5, side, 11):
            pen.line((0, y, side, y), fill=dark, width=4)
    elif material == "metal":
        for row, y in enumerate(range(7, side, 12)):
            for x in range(7 + 6 * (row % 2), side, 13):
                _dot(pen, x, y, 3, dark)
    elif material == "wool":
        for x in range(-side, side, 12):
            pen.line((x, side, x + side, 0), fill=dark, width=4)
    return swatch


def _dot(pen, x, y, r, fill):
    pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _ring(pen, x, y, r):
    pen.ellipse((x - r, y - r, x + r, y + r), outline=INK, width=5)


def _line(pen, *xy, width=5):
    pen.line(xy, fill=INK, width=width)


# The marks that tell a category: (pen, x, y, r) with r half the body's side; they reach at most 1.45 r from the middle.
MARKS = {
    "cup": lambda p, x, y, r: _ring(p, x + r, y, 0.42 * r),
    "bag": lambda p, x, y, r: _ring(p, x, y - r, 0.42 * r),
    "clock": lambda p, x, y, r: (_dot(p, x - 0.8 * r, y - r, 9, INK), _dot(p, x + 0.8 * r, y - r, 9, INK)),
    "lamp": lambda p, x, y, r: (_line(p, x, y, x, y + 1.4 * r), _line(p, x - 16, y + 1.38 * r, x + 16, y + 1.38 * r)),
    "table": lambda p, x, y, r: [_line(p, x + s * 0.8 * r, y + 0.8 * r, x + s * 0.8 * r, y + 1.42 * r) for s in (-1, 1)],
    "cat": lambda p, x, y, r: [
        p.polygon(((x + s * 0.2 * r, y - 0.7 * r), (x + s * 0.7 * r, y - 1.4 * r), (x + s * r, y - 0.5 * r)), fill=INK)
        for s in (-1, 1)
    ],
    "fish": lambda p, x, y, r: p.polygon(
        ((x + 0.7 * r, y), (x + 1.42 * r, y - 0.6 * r), (x + 1.42 * r, y + 0.6 * r)), fill=INK
    ),
    "bird": lambda p, x, y, r: (
        p.polygon(((x + 0.5 * r, y - 0.35 * r), (x + 1.42 * r, y), (x + 0.5 * r, y + 0.35 * r)), fill=(250, 140, 20)),
        [_line(p, x + s * 0.3 * r, y + 0.8 * r, x + s * 0.3 * r, y + 1.4 * r, width=4) for s in (-1, 1)],
    ),
    "car": lambda p, x, y, r: [_dot(p, x + s * 0.6 * r, y + 1.1 * r, 0.33 * r, INK) for s in (-1, 1)],
    "boat": lambda p, x, y, r: p.polygon(
        ((x - 1.4 * r, y + 0.9 * r), (x + 1.4 * r, y + 0.9 * r), (x + 0.9 * r, y + 1.42 * r), (x - 0.9 * r, y + 1.42 * r)),
        fill=INK,
    ),
    "cake": lambda p, x, y, r: [
        (_line(p, x + s, y - 1.3 * r, x + s, y - 0.2 * r), _dot(p, x + s, y - 1.3 * r, 4, (250, 140, 20)))
        for s in (-14, 0, 14)
    ],
    "apple": lambda p, x, y, r: (
        _line(p, x, y - 1.4 * r, x, y - 0.5 * r),
        p.ellipse((x + 2, y - 1.42 * r, x + 24, y - 1.08 * r), fill=(30, 130, 50)),
    ),
}


def scene_graph(scene: Scene) -> dict:
    """Write a scene down as one entry of GQA's scene-graph file: size, objects with box, attributes and relations."""
    objects = {}
    for thing in scene.things:
        x, y, w, h = thing.box
        relations = [
            {"name": f"to the {'left' if thing.x < other.x else 'right'} of", "object": other.object_id}
            for other in scene.things
            if beside(thing, other)
        ]
        attributes = [thing.color, thing.shape, thing.material]
        objects[thing.object_id] = dict(
            name=thing.category, x=x, y=y, w=w, h=h, attributes=attributes, relations=relations
        )
    return {"width": SIZE, "height": SIZE, "location": scene.place, "objects": objects}


def beside(one: Thing, other: Thing) -> bool:
    """Whether one thing is plainly to the left or to the right of the other: centres 0.16 of the width apart."""
    return one is not other and abs(one.x - other.x) >= 0.16 * SIZE


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A dense caption in the manner of Visual Genome's regions: every thing in random order, then their row."""
    sentences = []
    for i in rng.permutation(len(scene.things)):
        thing = scene.things[i]
        where = f"on the {thing.side} side" if thing.side else "in the middle"
        sentences.append(f"a {thing.color} {thing.shape} {thing.category} made of {thing.material} {where}.")
    row = [thing.category for thing in sorted(scene.things, key=lambda t: t.x)]
    sentences.append("from left to right: " + ", ".join(row) + ".")
    sentences.append(f"it is {scene.place}.")
    return " ".join(sentences)
