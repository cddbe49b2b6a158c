"""The other groups of GQA's questions: simpler ones, which the six tasks build on, and compositional ones.

A compositional question names a thing by what it is like or where it stands ("the thing to the left of the
cup"), so that the thing must be found before its property can be read.

Example:
    >>> verifyAttrThat(scene, np.random.default_rng(0)).text
    'Is the green thing round?'
"""

from collections.abc import Callable
from itertools import combinations

from miniature.questions.draft import (
    Draft,
    Named,
    Rng,
    Wording,
    absent,
    fill,
    is_unique,
    other_value,
    pick,
    select,
    shared_kinds,
    shuffled,
    that_is,
    two,
    yes_no,
)
from miniature.world import ATTRIBUTES, PLACES, Scene, Thing, beside

__all__ = ["BRIDGES"]


# ---- yes or no -----------------------------------------------------------------------------------------


def verifyAttr(scene: Scene, rng: Rng) -> Draft:
    """Ask whether a thing has a property."""
    thing, yes = pick(rng, scene.things), rng.random() < 0.5
    kind = pick(rng, ATTRIBUTES)
    value = thing.attribute(kind) if yes else other_value(rng, kind, thing.attribute(kind))
    wording = fill("Is the {t} {v}?", t=thing, v=that_is(kind, value))
    steps = (select(thing), (f"verify {kind}", (0,), value))
    return yes_no(("verify", "attr", "verifyAttr"), wording, yes, steps)


def exist(scene: Scene, rng: Rng) -> Draft:
    """Ask whether a thing is there at all."""
    yes = rng.random() < 0.5
    thing = pick(rng, scene.things) if yes else pick(rng, absent(scene))
    wording = fill("Are there any {t_s} in the picture?", t=thing)
    return yes_no(("verify", "obj", "exist"), wording, yes, (select(thing), ("exist", (0,), "?")))


def relVerify(scene: Scene, rng: Rng) -> Draft | None:
    """Ask whether a thing stands on a given side of another."""
    thing, other = two(rng, scene.things)
    if not beside(thing, other):
        return None
    side = pick(rng, ("left", "right"))
    yes = (side == "left") == (thing.x < other.x)
    wording = fill("Is the {t} to the {s} of the {o}?", t=thing, s=side, o=other)
    relation = f"{thing.category},to the {side} of,s ({thing.object_id})"
    steps = (select(other), ("verify rel", (0,), relation))
    return yes_no(("verify", "rel", "relVerify"), wording, yes, steps)


def locationVerify(scene: Scene, rng: Rng) -> Draft:
    """Ask whether it is indoors, or outdoors."""
    place = pick(rng, PLACES)
    steps = (("select", (), "scene"), ("verify location", (0,), place))
    types = ("verify", "global", "locationVerify")
    return yes_no(types, Wording(f"Is it {place}?"), place == scene.place, steps)


def verifyAttrThat(scene: Scene, rng: Rng) -> Draft | None:
    """Ask whether the only thing of a color has a shape, or the other way round."""
    thing = pick(rng, scene.things)
    by, kind = (str(k) for k in rng.permutation(["color", "shape"]))
    if not is_unique(scene, thing, by):
        return None
    yes = rng.random() < 0.5
    value = thing.attribute(kind) if yes else other_value(rng, kind, thing.attribute(kind))
    found = thing.attribute(by)
    named = Named("thing", thing)
    wording = fill("Is the {f} {t} {v}?", f=found, t=named, v=value)
    steps = (select(named), (f"filter {by}", (0,), found), (f"verify {kind}", (1,), value))
    return yes_no(("verify", "attr", "verifyAttr"), wording, yes, steps)


def verifyAttrAnd(scene: Scene, rng: Rng) -> Draft:
    """Ask whether a thing has both a color and a shape; at most one of them is wrong."""
    thing, yes = pick(rng, scene.things), rng.random() < 0.5
    values = {kind: thing.attribute(kind) for kind in ("color", "shape")}
    if not yes:
        wrong = pick(rng, values)
        values[wrong] = other_value(rng, wrong, values[wrong])
    wording = fill("Is the {t} {c} and {s}?", t=thing, c=values["color"], s=values["shape"])
    verified = tuple((f"verify {kind}", (0,), value) for kind, value in values.items())
    steps = (select(thing), *verified, ("and", (1, 2), ""))
    return yes_no(("logical", "attr", "verifyAttrAnd"), wording, yes, steps)


def twoSame(scene: Scene, rng: Rng) -> Draft | None:
    """Ask whether two things share their color, their shape or their material."""
    yes = rng.random() < 0.6  # that evens out: in every sixth scene no two things share anything
    pairs = combinations(scene.things, 2)
    fitting = [(*pair, kind) for pair in pairs for kind in ATTRIBUTES if (kind in shared_kinds(*pair)) == yes]
    if not fitting:
        return None
    thing, other, kind = pick(rng, fitting)
    thing, other = shuffled(rng, thing, other)
    wording = fill("Are the {t} and the {o} the same {k}?", t=thing, o=other, k=kind)
    steps = (select(thing), select(other), (f"same {kind}", (0, 1), ""))
    return yes_no(("compare", "attr", "twoSame"), wording, yes, steps)


# ---- open questions ------------------------------------------------------------------------------------


def locationChoose(scene: Scene, rng: Rng) -> Draft:
    """Ask whether it is indoors or outdoors."""
    a, b = shuffled(rng, *PLACES)
    return Draft(
        types=("choose", "global", "locationChoose"),
        wording=Wording(f"Is it {a} or {b}?"),
        answer=scene.place,
        full_answer=f"It is {scene.place}.",
        operations=(("select", (), "scene"), ("choose location", (0,), f"{a}|{b}")),
    )


def location(scene: Scene, rng: Rng) -> Draft:
    """Ask where the photo was taken."""
    return Draft(
        types=("query", "global", "location"),
        wording=Wording("Where was the photo taken?"),
        answer=scene.place,
        full_answer=f"It was taken {scene.place}.",
        operations=(("select", (), "scene"), ("query", (0,), "location")),
    )


def directOf(scene: Scene, rng: Rng) -> Draft:
    """Ask for a thing's color, shape or material."""
    thing, kind = pick(rng, scene.things), pick(rng, ATTRIBUTES)
    value = thing.attribute(kind)
    material = kind == "material"
    return Draft(
        types=("query", "attr", "material" if material else "directOf"),
        wording=fill("What is the {t} made of?" if material else "What {k} is the {t}?", k=kind, t=thing),
        answer=value,
        full_answer=f"The {thing.category} is {that_is(kind, value)}.",
        operations=(select(thing), ("query", (0,), kind)),
    )


def categoryThat(scene: Scene, rng: Rng) -> Draft | None:
    """Ask for the thing that alone has a property."""
    thing, kind = pick(rng, scene.things), pick(rng, ATTRIBUTES)
    if not is_unique(scene, thing, kind):
        return None
    value, named = thing.attribute(kind), Named("thing", thing)
    return Draft(
        types=("query", "cat", "categoryThat"),
        wording=fill("What is the {t} that is {v}?", t=named, v=that_is(kind, value)),
        answer=thing.category,
        full_answer=f"The {thing.category} is {that_is(kind, value)}.",
        operations=(select(named), (f"filter {kind}", (0,), value), ("query", (1,), "name")),
    )


def relO(scene: Scene, rng: Rng) -> Draft | None:
    """Ask for the only thing on one side of another."""
    found = _only_neighbor(scene, rng)
    if found is None:
        return None
    thing, anchor, side = found
    return Draft(
        types=("query", "rel", "relO"),
        wording=fill("What is to the {s} of the {o}?", s=side, o=anchor),
        answer=thing.category,
        full_answer=f"The {thing.category} is to the {side} of the {anchor.category}.",
        operations=(
            select(anchor),
            ("relate", (0,), f"_,to the {side} of,s ({thing.object_id})"),
            ("query", (1,), "name"),
        ),
    )


def directOfRelated(scene: Scene, rng: Rng) -> Draft | None:
    """Ask for the color, shape or material of the only thing on one side of another."""
    found = _only_neighbor(scene, rng)
    if found is None:
        return None
    thing, anchor, side = found
    kind = pick(rng, ATTRIBUTES)
    which = "What is the thing to the {s} of the {o} made of?"
    form = which if kind == "material" else "What {k} is the thing to the {s} of the {o}?"
    return Draft(
        types=("query", "attr", "directOf"),
        wording=fill(form, o=anchor, k=kind, s=side),
        answer=thing.attribute(kind),
        full_answer=f"It is {that_is(kind, thing.attribute(kind))}.",
        operations=(
            select(anchor),
            ("relate", (0,), f"_,to the {side} of,s ({thing.object_id})"),
            ("query", (1,), kind),
        ),
    )


def _only_neighbor(scene: Scene, rng: Rng) -> tuple[Thing, Thing, str] | None:
    """Find (neighbor, anchor, side) where the neighbor alone stands on that side of the anchor."""
    anchor, side = pick(rng, scene.things), pick(rng, ("left", "right"))
    there = [t for t in scene.things if t is not anchor and (t.x < anchor.x) == (side == "left")]
    return (there[0], anchor, side) if len(there) == 1 and beside(there[0], anchor) else None


BRIDGES: tuple[Callable[[Scene, Rng], Draft | None], ...] = (
    verifyAttr,
    exist,
    relVerify,
    locationVerify,
    locationChoose,
    location,
    directOf,
    categoryThat,
    relO,
    directOfRelated,
    verifyAttrThat,
    verifyAttrAnd,
    twoSame,
)
