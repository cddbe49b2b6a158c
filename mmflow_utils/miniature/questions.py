"""Questions about a drawn scene, in GQA's wording and record format, from all of its 15 structural x semantic groups.

Each generator takes a scene and a random generator and returns one question as a `Draft`, or None where the scene
doesn't allow it. Answers are balanced by construction: the true value is drawn after the form of the question, so that
the words of a question say nothing about its answer. `gqa_record` turns a draft into GQA's own JSON entry.

Example:
    >>> draft = positionQuery(scene, np.random.default_rng(0))
    >>> draft.text, draft.answer
    ('On which side of the photo is the cup?', 'left')
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .world import ATTRIBUTES, CATEGORIES, KINDS, PLACES, Scene, Thing, beside

__all__ = ["BRIDGES", "FACTS", "GENERATORS", "TASK_GENERATORS", "Draft", "ask", "factual", "gqa_record"]

Rng = np.random.Generator
PLURALS = {c: c + "s" for c in CATEGORIES} | {"fish": "fish"}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A question before it is written as GQA's JSON."""

    detailed: str  # GQA's types.detailed
    structural: str
    semantic: str
    text: str
    answer: str
    full_answer: str
    operations: tuple[tuple[str, tuple[int, ...], str], ...]  # (operation, dependencies, argument)
    mentions: dict[str, str] = field(default_factory=dict)  # word index or range -> object id


def fill(template: str, things: dict[str, Thing | str], **values: str) -> tuple[str, dict[str, str]]:
    """Fill a template and note at which words the things stand, as GQA's annotations do.

    A name of `things` may stand as {a} (its category) or {a_s} (plural); a plain string is a thing that isn't there.
    """
    names = {key: t if isinstance(t, str) else t.category for key, t in things.items()}
    words, mentions = [], {}
    for word in template.split():
        for key, thing in things.items():
            if "{" + key + "}" in word or "{" + key + "_s}" in word:
                if isinstance(thing, Thing):
                    mentions[str(len(words))] = thing.object_id
        plural = {f"{key}_s": PLURALS[name] for key, name in names.items()}
        words += word.format(**names, **plural, **values).split()
    return " ".join(words), mentions


def _pick(rng: Rng, items) -> object:
    return items[int(rng.integers(len(items)))]


def _two(rng: Rng, things: tuple[Thing, ...]) -> tuple[Thing, Thing]:
    i, j = rng.permutation(len(things))[:2]
    return things[i], things[j]


def _other(rng: Rng, kind: str, *taken: str) -> str:
    """Another value of an attribute than those taken."""
    return str(_pick(rng, [v for v in ATTRIBUTES[kind] if v not in taken]))


def _shuffled(rng: Rng, a: str, b: str) -> tuple[str, str]:
    return (a, b) if rng.random() < 0.5 else (b, a)


def _select(thing: Thing | str, name: str | None = None) -> tuple[str, tuple[int, ...], str]:
    if isinstance(thing, str):
        return "select", (), f"{thing} (-) "
    return "select", (), f"{name or thing.category} ({thing.object_id}) "


def _unique(scene: Scene, thing: Thing, kind: str) -> bool:
    return sum(t.attribute(kind) == thing.attribute(kind) for t in scene.things) == 1


def _that_is(kind: str, value: str) -> str:
    """ "that is red" or "that is made of wood"."""
    return f"made of {value}" if kind == "material" else value


# ---- the six tasks -------------------------------------------------------------------------------------------------


def chooseAttr(scene: Scene, rng: Rng) -> Draft:
    thing = _pick(rng, scene.things)
    kind = _pick(rng, ("color", "shape"))
    true = thing.attribute(kind)
    a, b = _shuffled(rng, true, _other(rng, kind, true))
    template = _pick(rng, ("Is the {t} {a} or {b}?", "Which " + kind + " is the {t}, {a} or {b}?"))
    text, mentions = fill(template, {"t": thing}, a=a, b=b)
    return Draft(
        detailed="chooseAttr", structural="choose", semantic="attr", text=text, answer=true, mentions=mentions,
        full_answer=f"The {thing.category} is {true}.",
        operations=(_select(thing), (f"choose {kind}", (0,), f"{a}|{b}")),
    )  # fmt: skip


def materialChoose(scene: Scene, rng: Rng) -> Draft:
    thing = _pick(rng, scene.things)
    a, b = _shuffled(rng, thing.material, _other(rng, "material", thing.material))
    template = _pick(rng, ("What was used to make the {t}, {a} or {b}?", "Is the {t} made of {a} or {b}?"))
    text, mentions = fill(template, {"t": thing}, a=a, b=b)
    return Draft(
        detailed="materialChoose", structural="choose", semantic="attr", text=text, answer=thing.material,
        mentions=mentions, full_answer=f"The {thing.category} is made of {thing.material}.",
        operations=(_select(thing), ("choose material", (0,), f"{a}|{b}")),
    )  # fmt: skip


def categoryThatChoose(scene: Scene, rng: Rng) -> Draft | None:
    """The thing with a property that it alone has; the other option stands in the picture in half of the questions."""
    thing, other = _two(rng, scene.things)
    kind = _pick(rng, tuple(ATTRIBUTES))
    if not _unique(scene, thing, kind):
        return None
    absent = [c for c in CATEGORIES if c not in {t.category for t in scene.things}]
    false = other.category if rng.random() < 0.5 else _pick(rng, absent)
    a, b = _shuffled(rng, thing.category, false)
    value = _that_is(kind, thing.attribute(kind))
    text, _ = fill(_pick(rng, ("Which thing is {v}, the {a} or the {b}?", "What is {v}, the {a} or the {b}?")),
                   {}, v=value, a=a, b=b)  # fmt: skip
    mentions = {str(text.rstrip("?").replace(",", "").split().index(thing.category)): thing.object_id}
    return Draft(
        detailed="categoryThatChoose", structural="choose", semantic="cat", text=text, answer=thing.category,
        mentions=mentions, full_answer=f"The {thing.category} is {value}.",
        operations=(_select(thing, "thing"), (f"filter {kind}", (0,), thing.attribute(kind)),
                    ("choose name", (1,), f"{a}|{b}")),
    )  # fmt: skip


def categoryThisChoose(scene: Scene, rng: Rng) -> Draft | None:
    kind = _pick(rng, tuple(KINDS))
    members = [t for t in scene.things if t.category in KINDS[kind]]
    if len(members) != 1:
        return None
    thing = members[0]
    a, b = _shuffled(rng, thing.category, str(_pick(rng, [c for c in KINDS[kind] if c != thing.category])))
    article = {x: ("an " if x[0] in "aeiou" else "a ") + x for x in (a, b)}
    text, _ = fill("Which kind of {k} is this, {a} or {b}?", {}, k=kind, a=article[a], b=article[b])
    return Draft(
        detailed="categoryThisChoose", structural="choose", semantic="cat", text=text, answer=thing.category,
        mentions={"3": thing.object_id}, full_answer=f"The {kind} is {article[thing.category]}.",
        operations=(_select(thing, kind), ("choose name", (0,), f"{a}|{b}")),
    )  # fmt: skip


def relChooser(scene: Scene, rng: Rng) -> Draft | None:
    thing, other = _two(rng, scene.things)
    if not beside(thing, other):
        return None
    true = "left" if thing.x < other.x else "right"
    a, b = _shuffled(rng, "left", "right")
    text, mentions = fill(f"Is the {{t}} to the {a} or to the {b} of the {{o}}?", {"t": thing, "o": other})
    relations = f"to the {true} of|to the {'right' if true == 'left' else 'left'} of"
    return Draft(
        detailed="relChooser", structural="choose", semantic="rel", text=text, answer=true, mentions=mentions,
        full_answer=f"The {thing.category} is to the {true} of the {other.category}.",
        operations=(_select(other), ("choose rel", (0,), f"{thing.category},{relations},s ({thing.object_id})")),
    )  # fmt: skip


def twoCommon(scene: Scene, rng: Rng) -> Draft | None:
    """Two things that share exactly one of colour, shape and material."""
    thing, other = _two(rng, scene.things)
    common = [k for k in ATTRIBUTES if thing.attribute(k) == other.attribute(k)]
    if len(common) != 1 or rng.random() > {"color": 1.0, "material": 0.6, "shape": 0.4}[common[0]]:
        return None  # a shape is shared more often than a colour: keep the three answers even
    template = _pick(rng, ("What do the {t} and the {o} have in common?", "What do both the {t} and the {o} have in common?"))
    text, mentions = fill(template, {"t": thing, "o": other})
    return Draft(
        detailed="twoCommon", structural="compare", semantic="attr", text=text, answer=common[0], mentions=mentions,
        full_answer=f"The {common[0]} is common to the {thing.category} and the {other.category}.",
        operations=(_select(thing), _select(other), ("common", (0, 1), "")),
    )  # fmt: skip


def existThatOr(scene: Scene, rng: Rng) -> Draft | None:
    """One thing of the picture and one that may not be there: does either have the property?"""
    thing = _pick(rng, scene.things)
    present = [t for t in scene.things if t is not thing]
    absent = [c for c in CATEGORIES if c not in {t.category for t in scene.things}]
    other = _pick(rng, present) if rng.random() < 0.5 else str(_pick(rng, absent))
    kind = _pick(rng, tuple(ATTRIBUTES))
    pair = [t for t in (thing, other) if isinstance(t, Thing)]
    yes = rng.random() < 0.5
    value = _pick(rng, pair).attribute(kind) if yes else _other(rng, kind, *(t.attribute(kind) for t in pair))
    one, two = (thing, other) if rng.random() < 0.5 else (other, thing)
    singular = rng.random() < 0.5
    template = ("Is there either a {a} or a {b} that is {v}?" if singular else "Are there any {a_s} or {b_s} that are {v}?")  # fmt: skip
    text, mentions = fill(template, {"a": one, "b": two}, v=_that_is(kind, value))
    text = text.replace(" a apple", " an apple")
    answer = "yes" if yes else "no"
    steps = (_select(one), (f"filter {kind}", (0,), value), ("exist", (1,), "?"),
             _select(two), (f"filter {kind}", (3,), value), ("exist", (4,), "?"), ("or", (2, 5), ""))  # fmt: skip
    return Draft(
        detailed="existThatOrC" if singular else "existThatOr", structural="logical", semantic="obj", text=text,
        answer=answer, mentions=mentions, full_answer=f"{answer.capitalize()}, there is {'one' if yes else 'none'}.",
        operations=steps,
    )  # fmt: skip


def positionQuery(scene: Scene, rng: Rng) -> Draft | None:
    thing = _pick(rng, scene.things)
    if thing.side is None:
        return None
    template = _pick(rng, ("On which side of the photo is the {t}?", "In which part of the image is the {t}?",
                           "Which side of the picture is the {t} on?"))  # fmt: skip
    text, mentions = fill(template, {"t": thing})
    return Draft(
        detailed="positionQuery", structural="query", semantic="attr", text=text, answer=thing.side, mentions=mentions,
        full_answer=f"The {thing.category} is on the {thing.side} of the image.",
        operations=(_select(thing), ("query", (0,), "hposition")),
    )  # fmt: skip


# ---- the other groups: what GQA also asks, and what the six tasks build on ------------------------------------------


def _yes_no(rng: Rng, detailed: str, structural: str, semantic: str, text: str, mentions, yes: bool, operations) -> Draft:
    answer = "yes" if yes else "no"
    return Draft(detailed=detailed, structural=structural, semantic=semantic, text=text, answer=answer,
                 full_answer=f"{answer.capitalize()}.", mentions=mentions, operations=operations)  # fmt: skip


def verifyAttr(scene: Scene, rng: Rng) -> Draft:
    thing, yes = _pick(rng, scene.things), rng.random() < 0.5
    kind = _pick(rng, tuple(ATTRIBUTES))
    value = thing.attribute(kind) if yes else _other(rng, kind, thing.attribute(kind))
    text, mentions = fill("Is the {t} {v}?", {"t": thing}, v=_that_is(kind, value))
    return _yes_no(rng, "verifyAttr", "verify", "attr", text, mentions, yes,
                   (_select(thing), (f"verify {kind}", (0,), value)))  # fmt: skip


def exist(scene: Scene, rng: Rng) -> Draft:
    yes = rng.random() < 0.5
    absent = [c for c in CATEGORIES if c not in {t.category for t in scene.things}]
    thing = _pick(rng, scene.things) if yes else str(_pick(rng, absent))
    text, mentions = fill("Are there any {t_s} in the picture?", {"t": thing})
    return _yes_no(rng, "exist", "verify", "obj", text, mentions, yes, (_select(thing), ("exist", (0,), "?")))


def relVerify(scene: Scene, rng: Rng) -> Draft | None:
    thing, other = _two(rng, scene.things)
    if not beside(thing, other):
        return None
    side = _pick(rng, ("left", "right"))
    text, mentions = fill(f"Is the {{t}} to the {side} of the {{o}}?", {"t": thing, "o": other})
    operations = (_select(other), ("verify rel", (0,), f"{thing.category},to the {side} of,s ({thing.object_id})"))
    return _yes_no(rng, "relVerify", "verify", "rel", text, mentions, (side == "left") == (thing.x < other.x), operations)


def locationVerify(scene: Scene, rng: Rng) -> Draft:
    place = _pick(rng, PLACES)
    operations = (("select", (), "scene"), ("verify location", (0,), place))
    return _yes_no(rng, "locationVerify", "verify", "global", f"Is it {place}?", {}, place == scene.place, operations)


def locationChoose(scene: Scene, rng: Rng) -> Draft:
    a, b = _shuffled(rng, *PLACES)
    return Draft(
        detailed="locationChoose", structural="choose", semantic="global", text=f"Is it {a} or {b}?",
        answer=scene.place, full_answer=f"It is {scene.place}.",
        operations=(("select", (), "scene"), ("choose location", (0,), f"{a}|{b}")),
    )  # fmt: skip


def location(scene: Scene, rng: Rng) -> Draft:
    return Draft(
        detailed="location", structural="query", semantic="global", text="Where was the photo taken?",
        answer=scene.place, full_answer=f"It was taken {scene.place}.",
        operations=(("select", (), "scene"), ("query", (0,), "location")),
    )  # fmt: skip


def directOf(scene: Scene, rng: Rng) -> Draft:
    thing, kind = _pick(rng, scene.things), _pick(rng, tuple(ATTRIBUTES))
    template = "What is the {t} made of?" if kind == "material" else f"What {kind} is the {{t}}?"
    text, mentions = fill(template, {"t": thing})
    return Draft(
        detailed="material" if kind == "material" else "directOf", structural="query", semantic="attr", text=text,
        answer=thing.attribute(kind), mentions=mentions,
        full_answer=f"The {thing.category} is {_that_is(kind, thing.attribute(kind))}.",
        operations=(_select(thing), ("query", (0,), kind)),
    )  # fmt: skip


def categoryThat(scene: Scene, rng: Rng) -> Draft | None:
    thing, kind = _pick(rng, scene.things), _pick(rng, tuple(ATTRIBUTES))
    if not _unique(scene, thing, kind):
        return None
    value = thing.attribute(kind)
    text = f"What is the thing that is {_that_is(kind, value)}?"
    return Draft(
        detailed="categoryThat", structural="query", semantic="cat", text=text, answer=thing.category,
        mentions={"3": thing.object_id}, full_answer=f"The {thing.category} is {_that_is(kind, value)}.",
        operations=(_select(thing, "thing"), (f"filter {kind}", (0,), value), ("query", (1,), "name")),
    )  # fmt: skip


def _only_neighbour(scene: Scene, rng: Rng) -> tuple[Thing, Thing, str] | None:
    """(neighbour, anchor, side) where the neighbour alone stands on that side of the anchor."""
    anchor, side = _pick(rng, scene.things), _pick(rng, ("left", "right"))
    there = [t for t in scene.things if t is not anchor and (t.x < anchor.x) == (side == "left")]
    return (there[0], anchor, side) if len(there) == 1 and beside(there[0], anchor) else None


def relO(scene: Scene, rng: Rng) -> Draft | None:
    found = _only_neighbour(scene, rng)
    if found is None:
        return None
    thing, anchor, side = found
    text, mentions = fill(f"What is to the {side} of the {{o}}?", {"o": anchor})
    return Draft(
        detailed="relO", structural="query", semantic="rel", text=text, answer=thing.category, mentions=mentions,
        full_answer=f"The {thing.category} is to the {side} of the {anchor.category}.",
        operations=(_select(anchor), ("relate", (0,), f"_,to the {side} of,s ({thing.object_id})"), ("query", (1,), "name")),
    )  # fmt: skip


def directOfRelated(scene: Scene, rng: Rng) -> Draft | None:
    """Compositional, as GQA is full of: the thing must be found through another before its property can be read."""
    found = _only_neighbour(scene, rng)
    if found is None:
        return None
    thing, anchor, side = found
    kind = _pick(rng, tuple(ATTRIBUTES))
    template = "What is the thing to the {s} of the {o} made of?" if kind == "material" else "What {k} is the thing to the {s} of the {o}?"  # fmt: skip
    text, mentions = fill(template, {"o": anchor}, k=kind, s=side)
    return Draft(
        detailed="directOf", structural="query", semantic="attr", text=text, answer=thing.attribute(kind),
        mentions=mentions, full_answer=f"It is {_that_is(kind, thing.attribute(kind))}.",
        operations=(_select(anchor), ("relate", (0,), f"_,to the {side} of,s ({thing.object_id})"), ("query", (1,), kind)),
    )  # fmt: skip


def verifyAttrThat(scene: Scene, rng: Rng) -> Draft | None:
    """Compositional yes/no: "Is the red thing round?"."""
    thing = _pick(rng, scene.things)
    by, kind = (str(k) for k in rng.permutation(["color", "shape"]))
    if not _unique(scene, thing, by):
        return None
    yes = rng.random() < 0.5
    value = thing.attribute(kind) if yes else _other(rng, kind, thing.attribute(kind))
    text = f"Is the {thing.attribute(by)} thing {value}?"
    operations = (_select(thing, "thing"), (f"filter {by}", (0,), thing.attribute(by)), (f"verify {kind}", (1,), value))
    return _yes_no(rng, "verifyAttr", "verify", "attr", text, {"3": thing.object_id}, yes, operations)


def verifyAttrAnd(scene: Scene, rng: Rng) -> Draft:
    thing, yes = _pick(rng, scene.things), rng.random() < 0.5
    values = {k: thing.attribute(k) for k in ("color", "shape")}
    if not yes:
        wrong = _pick(rng, ("color", "shape"))
        values[wrong] = _other(rng, wrong, values[wrong])
    text, mentions = fill("Is the {t} {c} and {s}?", {"t": thing}, c=values["color"], s=values["shape"])
    operations = (_select(thing), ("verify color", (0,), values["color"]), ("verify shape", (0,), values["shape"]),
                  ("and", (1, 2), ""))  # fmt: skip
    return _yes_no(rng, "verifyAttrAnd", "logical", "attr", text, mentions, yes, operations)


def twoSame(scene: Scene, rng: Rng) -> Draft | None:
    thing, other = _two(rng, scene.things)
    kind = _pick(rng, tuple(ATTRIBUTES))
    same = thing.attribute(kind) == other.attribute(kind)
    if not same and rng.random() < 0.6:  # most pairs differ: even out
        return None
    text, mentions = fill("Are the {t} and the {o} the same " + kind + "?", {"t": thing, "o": other})
    return _yes_no(rng, "twoSame", "compare", "attr", text, mentions, same,
                   (_select(thing), _select(other), (f"same {kind}", (0, 1), "")))  # fmt: skip


FACTS = {  # what one knows of a thing without seeing it: for the questions in the manner of OKVQA
    "can be eaten": ("cake", "apple"),
    "can fly": ("bird",),
    "can swim": ("fish",),
    "can purr": ("cat",),
    "can be driven on a road": ("car",),
    "can sail": ("boat",),
    "tells the time": ("clock",),
    "gives light": ("lamp",),
    "can hold coffee": ("cup",),
    "can carry the shopping": ("bag",),
    "has legs but is not alive": ("table",),
}


def factual(scene: Scene, rng: Rng) -> Draft | None:
    """A thing named by a fact that no picture shows; not one of GQA's types."""
    fact = _pick(rng, tuple(FACTS))
    fitting = [t for t in scene.things if t.category in FACTS[fact]]
    if len(fitting) != 1:
        return None
    thing = fitting[0]
    return Draft(
        detailed="factual", structural="query", semantic="cat", answer=thing.category,
        text=f"Which of the things in the picture {fact}?", full_answer=f"The {thing.category} {fact}.",
        mentions={"3": thing.object_id}, operations=(_select(thing, "thing"), ("query", (0,), "name")),
    )  # fmt: skip


Generator = Callable[[Scene, Rng], Draft | None]
TASK_GENERATORS: dict[str, tuple[Generator, ...]] = {
    "ChooseAttr": (chooseAttr, materialChoose),
    "ChooseCat": (categoryThatChoose, categoryThisChoose),
    "ChooseRel": (relChooser,),
    "CompareAttr": (twoCommon,),
    "LogicalObj": (existThatOr,),
    "QueryAttr": (positionQuery,),
}
BRIDGES: tuple[Generator, ...] = (
    verifyAttr, exist, relVerify, locationVerify, locationChoose, location, directOf, categoryThat, relO,
    directOfRelated, verifyAttrThat, verifyAttrAnd, twoSame,
)  # fmt: skip
GENERATORS = tuple(g for group in TASK_GENERATORS.values() for g in group) + BRIDGES  # all that GQA's files hold


def ask(generator: Generator, scene: Scene, rng: Rng, *, tries: int = 12) -> Draft | None:
    """Try a generator a few times; None where the scene doesn't allow its question."""
    for _ in range(tries):
        draft = generator(scene, rng)
        if draft is not None:
            return draft
    return None


def gqa_record(draft: Draft, scene: Scene) -> dict:
    """Write a draft as the value that GQA's question file holds under a question id."""
    semantic = [dict(operation=o, dependencies=list(d), argument=a) for o, d, a in draft.operations]
    return {
        "semantic": semantic,
        "entailed": [],
        "equivalent": [],
        "question": draft.text,
        "imageId": scene.scene_id,
        "isBalanced": True,
        "groups": {"global": None, "local": None},
        "answer": draft.answer,
        "semanticStr": "->".join(f"{s['operation']}: {s['argument']}".strip() for s in semantic),
        "annotations": {"answer": {}, "question": draft.mentions, "fullAnswer": {}},
        "types": {"detailed": draft.detailed, "semantic": draft.semantic, "structural": draft.structural},
        "fullAnswer": draft.full_answer,
    }
