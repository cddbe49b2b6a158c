"""A question before it is written as GQA's JSON: its words, the things that they name, and its operations.

Example:
    >>> fill("Is the {t} {a} or {b}?", t=scene.things[0], a="red", b="blue")
    Wording(text='Is the boat red or blue?', mentions={'2': '000'})
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from miniature.world import ATTRIBUTES, CATEGORIES, Scene, Thing

__all__ = [
    "Draft",
    "Named",
    "Rng",
    "Wording",
    "absent",
    "fill",
    "gqa_record",
    "is_unique",
    "other_value",
    "pick",
    "put_article",
    "select",
    "shared_kinds",
    "shuffled",
    "that_is",
    "two",
    "yes_no",
]

Rng = np.random.Generator
Step = tuple[str, tuple[int, ...], str]  # operation, dependencies (indices of earlier steps), argument
Item = TypeVar("Item")
PLURALS = {"fish": "fish"}  # what doesn't just take an s


@dataclass(frozen=True)
class Named:
    """A thing of the scene under another word than its category: "animal", or just "thing"."""

    word: str
    thing: Thing


@dataclass(frozen=True)
class Wording:
    """A question's text and where it names a thing of the scene: word index -> object id, as GQA has it."""

    text: str
    mentions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A question with its answer and the operations on the scene graph that lead there."""

    types: tuple[str, str, str]  # GQA's structural, semantic and detailed type
    wording: Wording
    answer: str
    full_answer: str
    operations: tuple[Step, ...]

    @property
    def text(self) -> str:
        """The question itself."""
        return self.wording.text

    @property
    def detailed(self) -> str:
        """GQA's `types.detailed`, which tells the task."""
        return self.types[2]


def gqa_record(draft: Draft, scene: Scene) -> dict:
    """Write a draft as the value that GQA's question file holds under a question id."""
    structural, semantic, detailed = draft.types
    steps = [dict(operation=o, dependencies=list(d), argument=a) for o, d, a in draft.operations]
    return {
        "semantic": steps,
        "entailed": [],
        "equivalent": [],
        "question": draft.text,
        "imageId": scene.scene_id,
        "isBalanced": True,
        "groups": {"global": None, "local": None},
        "answer": draft.answer,
        "semanticStr": "->".join(f"{s['operation']}: {s['argument']}".strip() for s in steps),
        "annotations": {"answer": {}, "question": draft.wording.mentions, "fullAnswer": {}},
        "types": {"detailed": detailed, "semantic": semantic, "structural": structural},
        "fullAnswer": draft.full_answer,
    }


# ---- words and operations ------------------------------------------------------------------------------


def fill(template: str, **parts: Thing | Named | str) -> Wording:
    """Fill a template and note at which words the things stand, as GQA's annotations do.

    A part may stand as {name}, or {name_s} for its plural. A string is a value, or a thing that isn't there.
    """
    names = {key: _word(part) for key, part in parts.items()}
    names |= {f"{key}_s": PLURALS.get(name, f"{name}s") for key, name in names.items()}
    words, mentions = [], {}
    for piece in template.split():
        for key, part in parts.items():
            if not isinstance(part, str) and ("{" + key + "}" in piece or "{" + key + "_s}" in piece):
                thing = part.thing if isinstance(part, Named) else part
                mentions[str(len(words))] = thing.object_id
        words += piece.format(**names).split()
    return Wording(put_article(" ".join(words)), mentions)


def _word(part: Thing | Named | str) -> str:
    if isinstance(part, Thing):
        return part.category
    return part.word if isinstance(part, Named) else part


def put_article(text: str) -> str:
    """Write "an apple" where it says "a apple", the only one of the categories to begin with a vowel."""
    return text.replace(" a apple", " an apple")


def that_is(kind: str, value: str) -> str:
    """Say that a thing has a property: "red", but "made of wood"."""
    return f"made of {value}" if kind == "material" else value


def select(thing: Thing | Named | str) -> Step:
    """Return the operation that finds a thing: its name and id, or "-" for one that isn't there."""
    if isinstance(thing, str):
        return "select", (), f"{thing} (-) "
    of_scene = thing.thing if isinstance(thing, Named) else thing
    return "select", (), f"{_word(thing)} ({of_scene.object_id}) "


def yes_no(types: tuple[str, str, str], wording: Wording, yes: bool, operations: tuple[Step, ...]) -> Draft:
    """Make the draft of a question that is answered with yes or no."""
    answer = "yes" if yes else "no"
    full_answer = f"{answer.capitalize()}."
    return Draft(types=types, wording=wording, answer=answer, full_answer=full_answer, operations=operations)


# ---- random choices ------------------------------------------------------------------------------------


def pick(rng: Rng, items: Iterable[Item]) -> Item:
    """Pick one of some items."""
    items = tuple(items)
    return items[int(rng.integers(len(items)))]


def two(rng: Rng, things: tuple[Thing, ...]) -> tuple[Thing, Thing]:
    """Pick two different things."""
    i, j = rng.permutation(len(things))[:2]
    return things[i], things[j]


def shuffled(rng: Rng, a: Item, b: Item) -> tuple[Item, Item]:
    """Put two items in random order."""
    return (a, b) if rng.random() < 0.5 else (b, a)


def other_value(rng: Rng, kind: str, *taken: str) -> str:
    """Pick a value of an attribute that isn't among those taken."""
    return pick(rng, (value for value in ATTRIBUTES[kind] if value not in taken))


def absent(scene: Scene) -> list[str]:
    """List the categories that don't stand in the scene."""
    present = {thing.category for thing in scene.things}
    return [category for category in CATEGORIES if category not in present]


def is_unique(scene: Scene, thing: Thing, kind: str) -> bool:
    """Return whether a thing alone has its color, shape or material."""
    return sum(t.attribute(kind) == thing.attribute(kind) for t in scene.things) == 1


def shared_kinds(thing: Thing, other: Thing) -> list[str]:
    """List what two things have in common: "color", "shape", "material"."""
    return [kind for kind in ATTRIBUTES if thing.attribute(kind) == other.attribute(kind)]
