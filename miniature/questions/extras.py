"""Questions that GQA doesn't have: about knowledge that no picture shows, and descriptions to learn from.

Example:
    >>> factual(scene, np.random.default_rng(1)).text
    'Which of the things in the picture has legs?'
"""

from miniature.questions.draft import Draft, Named, Rng, Wording, fill, pick, select, shared_kinds, two
from miniature.world import ATTRIBUTES, Scene

__all__ = ["FACTS", "compare", "describe", "factual"]

# In the manner of OKVQA and A-OKVQA (App. H). Each fact fits several kinds of thing, so that the question
# alone doesn't tell the answer: the picture says which of them is there.
FACTS = {
    "is sweet": ("cake", "apple"),
    "is alive": ("cat", "fish", "bird"),
    "can lay eggs": ("fish", "bird"),
    "has legs": ("table", "cat", "bird"),
    "has an engine": ("car", "boat"),
    "is at home in the water": ("fish", "boat"),
    "is carried by its handle": ("cup", "bag"),
    "stands by the bed": ("clock", "lamp"),
}


def factual(scene: Scene, rng: Rng) -> Draft | None:
    """Name a thing by a fact; the operations alone don't lead to the answer."""
    fact = pick(rng, FACTS)
    fitting = [t for t in scene.things if t.category in FACTS[fact]]
    if len(fitting) != 1:
        return None
    (thing,) = fitting
    named = Named("thing", thing)
    return Draft(
        types=("query", "cat", "factual"),
        wording=fill("Which of the {t_s} in the picture {f}?", t=named, f=fact),
        answer=thing.category,
        full_answer=f"The {thing.category} {fact}.",
        operations=(select(named), ("query", (0,), "name")),
    )


def describe(scene: Scene) -> list[Draft]:
    """Tell all there is: everything about each thing, and their row; for training only, as captions are."""
    row = ", ".join(thing.category for thing in sorted(scene.things, key=lambda thing: thing.x))
    told = {"Name the things from left to right.": (row, ())}
    for thing in scene.things:
        where = f"on the {thing.side}" if thing.side else "in the middle"
        answer = f"a {thing.category} {thing.color} {thing.shape} {thing.material} {where}"
        told[f"Describe the {thing.category}."] = answer, (thing,)
    return [
        Draft(
            types=("query", "attr", "describe"),
            wording=Wording(text),
            answer=answer,
            full_answer=f"{answer.capitalize()}.",
            operations=(*(select(thing) for thing in things), ("query", (), "description")),
        )
        for text, (answer, things) in told.items()
    ]


def compare(scene: Scene, rng: Rng) -> Draft:
    """Tell what two things are like, kind by kind, and what they share; for training only."""
    a, b = two(rng, scene.things)
    shared = " and ".join(shared_kinds(a, b)) or "nothing"
    told = ". ".join(f"{kind}: {a.attribute(kind)}, {b.attribute(kind)}" for kind in ATTRIBUTES)
    answer = f"{told}. same: {shared}"
    return Draft(
        types=("query", "attr", "describe"),
        wording=fill("Compare the {a} and the {b}.", a=a, b=b),
        answer=answer,
        full_answer=f"{answer.capitalize()}.",
        operations=(select(a), select(b), ("query", (0, 1), "comparison")),
    )
