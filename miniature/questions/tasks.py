"""The paper's six tasks, each with the generators of GQA's types that it holds (App. A).

Example:
    >>> chooseAttr(scene, np.random.default_rng(0)).text
    'Is the cat round or triangular?'
"""

from collections.abc import Callable
from itertools import combinations

from miniature.questions.draft import (
    Draft,
    Named,
    Rng,
    absent,
    fill,
    is_unique,
    other_value,
    pick,
    put_article,
    select,
    shared_kinds,
    shuffled,
    that_is,
    two,
)
from miniature.world import ATTRIBUTES, KINDS, Scene, Thing, beside

__all__ = ["TASK_GENERATORS"]


def chooseAttr(scene: Scene, rng: Rng) -> Draft:
    """Ask for a thing's color or shape, out of two."""
    thing, kind = pick(rng, scene.things), pick(rng, ("color", "shape"))
    true = thing.attribute(kind)
    a, b = shuffled(rng, true, other_value(rng, kind, true))
    form = pick(rng, ("Is the {t} {a} or {b}?", "Which {k} is the {t}, {a} or {b}?"))
    return Draft(
        types=("choose", "attr", "chooseAttr"),
        wording=fill(form, k=kind, t=thing, a=a, b=b),
        answer=true,
        full_answer=f"The {thing.category} is {true}.",
        operations=(select(thing), (f"choose {kind}", (0,), f"{a}|{b}")),
    )


def materialChoose(scene: Scene, rng: Rng) -> Draft:
    """Ask for a thing's material, out of two."""
    thing = pick(rng, scene.things)
    a, b = shuffled(rng, thing.material, other_value(rng, "material", thing.material))
    form = pick(rng, ("What was used to make the {t}, {a} or {b}?", "Is the {t} made of {a} or {b}?"))
    return Draft(
        types=("choose", "attr", "materialChoose"),
        wording=fill(form, t=thing, a=a, b=b),
        answer=thing.material,
        full_answer=f"The {thing.category} is made of {thing.material}.",
        operations=(select(thing), ("choose material", (0,), f"{a}|{b}")),
    )


def categoryThatChoose(scene: Scene, rng: Rng) -> Draft | None:
    """Ask for the thing that alone has a property; the other option is in the picture every second time."""
    thing, other = two(rng, scene.things)
    kind = pick(rng, ATTRIBUTES)
    if not is_unique(scene, thing, kind):
        return None
    false = other.category if rng.random() < 0.5 else pick(rng, absent(scene))
    a, b = shuffled(rng, thing, false)
    options = "|".join(x if isinstance(x, str) else x.category for x in (a, b))
    form = pick(rng, ("Which thing is {v}, the {a} or the {b}?", "What is {v}, the {a} or the {b}?"))
    value = thing.attribute(kind)
    return Draft(
        types=("choose", "cat", "categoryThatChoose"),
        wording=fill(form, v=that_is(kind, value), a=a, b=b),
        answer=thing.category,
        full_answer=f"The {thing.category} is {that_is(kind, value)}.",
        operations=(
            select(Named("thing", thing)),
            (f"filter {kind}", (0,), value),
            ("choose name", (1,), options),
        ),
    )


def categoryThisChoose(scene: Scene, rng: Rng) -> Draft | None:
    """Ask what the picture's only animal (vehicle, …) is, out of two."""
    kind = pick(rng, KINDS)
    members = [t for t in scene.things if t.category in KINDS[kind]]
    if len(members) != 1:
        return None
    (thing,) = members
    false = pick(rng, (category for category in KINDS[kind] if category != thing.category))
    a, b = shuffled(rng, thing.category, false)
    animal = Named(kind, thing)
    return Draft(
        types=("choose", "cat", "categoryThisChoose"),
        wording=fill("Which kind of {k} is this, a {a} or a {b}?", k=animal, a=a, b=b),
        answer=thing.category,
        full_answer=put_article(f"The {kind} is a {thing.category}."),
        operations=(select(animal), ("choose name", (0,), f"{a}|{b}")),
    )


def relChooser(scene: Scene, rng: Rng) -> Draft | None:
    """Ask on which side of another a thing stands."""
    thing, other = two(rng, scene.things)
    if not beside(thing, other):
        return None
    true, false = ("left", "right") if thing.x < other.x else ("right", "left")
    a, b = shuffled(rng, "left", "right")
    relations = f"to the {true} of|to the {false} of"  # GQA too has the true one first
    return Draft(
        types=("choose", "rel", "relChooser"),
        wording=fill("Is the {t} to the {a} or to the {b} of the {o}?", t=thing, a=a, b=b, o=other),
        answer=true,
        full_answer=f"The {thing.category} is to the {true} of the {other.category}.",
        operations=(
            select(other),
            ("choose rel", (0,), f"{thing.category},{relations},s ({thing.object_id})"),
        ),
    )


def twoCommon(scene: Scene, rng: Rng) -> Draft | None:
    """Ask what two things share: exactly one of color, shape and material.

    Of what pairs of the scene share, it asks for the rarest (color, then material): that, and nothing
    left to chance, makes the three answers about equally frequent however often a scene is asked.
    """
    shared = {kind: _pairs_sharing_only(scene, kind) for kind in ("color", "material", "shape")}
    kind = next((kind for kind, pairs in shared.items() if pairs), None)
    if kind is None:
        return None
    thing, other = shuffled(rng, *pick(rng, shared[kind]))
    both = pick(rng, ("What do", "What do both"))
    return Draft(
        types=("compare", "attr", "twoCommon"),
        wording=fill(f"{both} the {{t}} and the {{o}} have in common?", t=thing, o=other),
        answer=kind,
        full_answer=f"The {kind} is common to the {thing.category} and the {other.category}.",
        operations=(select(thing), select(other), ("common", (0, 1), "")),
    )


def _pairs_sharing_only(scene: Scene, kind: str) -> list[tuple[Thing, Thing]]:
    return [(a, b) for a, b in combinations(scene.things, 2) if shared_kinds(a, b) == [kind]]


def existThatOr(scene: Scene, rng: Rng) -> Draft | None:
    """Ask whether either of two things has a property: one of the picture, and one that may not be there."""
    thing = pick(rng, scene.things)
    others = [t for t in scene.things if t is not thing]
    other = pick(rng, others) if rng.random() < 0.5 else pick(rng, absent(scene))
    kind = pick(rng, ATTRIBUTES)
    values = [t.attribute(kind) for t in (thing, other) if isinstance(t, Thing)]
    yes = rng.random() < 0.5
    value = pick(rng, values) if yes else other_value(rng, kind, *values)
    first, second = shuffled(rng, thing, other)
    if rng.random() < 0.5:
        detailed, form = "existThatOrC", "Is there either a {a} or a {b} that is {v}?"
    else:
        detailed, form = "existThatOr", "Are there any {a_s} or {b_s} that are {v}?"
    return Draft(
        types=("logical", "obj", detailed),
        wording=fill(form, a=first, b=second, v=that_is(kind, value)),
        answer="yes" if yes else "no",
        full_answer="Yes, there is one." if yes else "No, there is none.",
        operations=(
            select(first),
            (f"filter {kind}", (0,), value),
            ("exist", (1,), "?"),
            select(second),
            (f"filter {kind}", (3,), value),
            ("exist", (4,), "?"),
            ("or", (2, 5), ""),
        ),
    )


def positionQuery(scene: Scene, rng: Rng) -> Draft | None:
    """Ask in which half of the picture a thing stands."""
    thing = pick(rng, scene.things)
    if thing.side is None:
        return None
    forms = (
        "On which side of the photo is the {t}?",
        "In which part of the image is the {t}?",
        "Which side of the picture is the {t} on?",
    )
    return Draft(
        types=("query", "attr", "positionQuery"),
        wording=fill(pick(rng, forms), t=thing),
        answer=thing.side,
        full_answer=f"The {thing.category} is on the {thing.side} of the image.",
        operations=(select(thing), ("query", (0,), "hposition")),
    )


TASK_GENERATORS: dict[str, tuple[Callable[[Scene, Rng], Draft | None], ...]] = {
    "ChooseAttr": (chooseAttr, materialChoose),
    "ChooseCat": (categoryThatChoose, categoryThisChoose),
    "ChooseRel": (relChooser,),
    "CompareAttr": (twoCommon,),
    "LogicalObj": (existThatOr,),
    "QueryAttr": (positionQuery,),
}
