"""The drawn world: scenes of a few things with color, shape, material and place.

`sample_scene` draws the facts of a scene at random. What is made of them, knows nothing of the rest: a
picture (`draw_scene`), a scene graph in GQA's own format, a caption, and questions. Every fact that a
question may ask about stands in the scene graph.

Example:
    >>> scene = sample_scene(np.random.default_rng(0))
    >>> [thing.category for thing in scene.things]
    ['boat', 'clock', 'lamp', 'cat']
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["FRAMES", "SQUARE", "Frame", "Scene", "Thing", "beside", "caption", "sample_scene", "scene_graph"]

Frame = tuple[int, int]  # width and height of a picture, in pixels

SIZE = 224  # pixels, width and height of a square picture
SQUARE = (SIZE, SIZE)
# Widths and heights of the pictures that a model with tiles is shown, all of about the same area.
FRAMES = (SQUARE, (256, 192), (192, 256), (320, 160), (160, 320))
MARGIN = 6  # pixels kept free between two things and at the edge
REACH = 1.45  # how far a thing's marks reach from its middle, in halves of its body's side
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


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object of a scene: a body of `size` pixels a side around (`x`, `y`), in the picture's pixels."""

    object_id: str
    category: str
    color: str
    shape: str
    material: str
    x: float
    y: float
    size: float
    frame: Frame = SQUARE  # of the picture it is in

    def attribute(self, kind: str) -> str:
        """Return the value of "color", "shape" or "material"."""
        return getattr(self, kind)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Bounding box (x, y, w, h) in pixels, handles and legs included but for 2 pixels of a line."""
        reach = self.size * 0.5 * REACH
        left, top = max(0, self.x - reach), max(0, self.y - reach)
        right, bottom = min(self.frame[0], self.x + reach), min(self.frame[1], self.y + reach)
        return round(left), round(top), round(right - left), round(bottom - top)

    @property
    def side(self) -> str | None:
        """Half of the picture, "left" or "right"; None too near the middle to tell."""
        width = self.frame[0]
        if abs(self.x - width / 2) < 0.08 * width:
            return None
        return "left" if self.x < width / 2 else "right"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture's facts: where it is and what stands in it (distinct categories)."""

    scene_id: str
    place: str
    things: tuple[Thing, ...]
    seed: int  # of the speckles on the ground, which carry no fact
    frame: Frame = SQUARE


def sample_scene(
    rng: np.random.Generator,
    *,
    scene_id: str = "0",
    n_things: int | None = None,
    frames: Sequence[Frame] = (SQUARE,),
) -> Scene:
    """Draw a scene of 2 to 4 things of distinct categories that don't touch each other.

    Its frame is one of `frames`, each as likely as the others.
    """
    frame = frames[int(rng.integers(len(frames)))] if len(frames) > 1 else frames[0]
    n_things = n_things or int(rng.integers(2, 5))
    categories = rng.choice(CATEGORIES, n_things, replace=False)
    while (spots := _try_spots(rng, n_things, frame)) is None:
        pass
    things = tuple(
        Thing(
            object_id=f"{scene_id}{i:02d}",
            category=str(category),
            color=str(rng.choice(ATTRIBUTES["color"])),
            shape=str(rng.choice(SHAPES)),
            material=str(rng.choice(MATERIALS)),
            x=x,
            y=y,
            size=size,
            frame=frame,
        )
        for i, (category, (x, y, size)) in enumerate(zip(categories, spots, strict=True))
    )
    place = str(rng.choice(PLACES))
    seed = int(rng.integers(2**31))
    return Scene(scene_id=scene_id, place=place, things=things, seed=seed, frame=frame)


def _try_spots(rng: np.random.Generator, n: int, frame: Frame) -> list[tuple[float, float, float]] | None:
    """Try to place `n` bodies (x, y, size) without overlap; None if this try got stuck.

    A body is as large, beside the shorter side of the picture, in every frame.
    """
    half = REACH / 2
    spots: list[tuple[float, float, float]] = []
    for _ in range(40):
        size = float(rng.uniform(50, 64)) * min(frame) / SIZE
        reach = size * half + MARGIN / 2
        x, y = rng.uniform(reach, np.subtract(frame, reach))
        if all(max(abs(x - u), abs(y - v)) > reach + s * half + MARGIN / 2 for u, v, s in spots):
            spots.append((float(x), float(y), size))
        if len(spots) == n:
            return spots
    return None


def beside(one: Thing, other: Thing) -> bool:
    """Return whether one thing is plainly left or right of the other: centers 0.16 of the width apart."""
    return one is not other and abs(one.x - other.x) >= 0.16 * one.frame[0]


def scene_graph(scene: Scene) -> dict:
    """Write a scene as an entry of GQA's scene-graph file: objects with box, attributes and relations."""
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
    width, height = scene.frame
    return {"width": width, "height": height, "location": scene.place, "objects": objects}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Write a caption in the manner of Visual Genome's regions: things in random order, then their row."""
    sentences = []
    for i in rng.permutation(len(scene.things)):
        thing = scene.things[i]
        where = f"on the {thing.side} side" if thing.side else "in the middle"
        sentences.append(f"a {thing.color} {thing.shape} {thing.category} made of {thing.material} {where}.")
    row = [thing.category for thing in sorted(scene.things, key=lambda t: t.x)]
    sentences.append("from left to right: " + ", ".join(row) + ".")
    sentences.append(f"it is {scene.place}.")
    return " ".join(sentences)
