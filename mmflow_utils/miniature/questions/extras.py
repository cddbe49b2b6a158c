"""Questions that GQA doesn't have: about knowledge that no picture shows, and descriptions to learn from.

Example:
    >>> factual(scene, np.random.default_rng(0)).text
    'Which of the things in the picture can hold coffee?'
"""

from mmflow_utils.miniature.questions.draft import Draft, Named, Rng, fill, pick, select
from mmflow_utils.miniature.world import Scene

__all__ = ["DESCRIPTIONS", "FACTS", "describe", "factual", "line_up"]

FACTS = {  # in the manner of OKVQA and A-OKVQA (App. H)
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


def describe(scene: Scene, rng: Rng) -> Draft:
    """Tell everything about one thing; for training only, where one such answer teaches as much as four."""
    thing = pick(rng, scene.things)
    where = f"on the {thing.side}" if thing.side else "in the middle"
    answer = f"a {thing.category} {thing.color} {thing.shape} {thing.material} {where}"
    return Draft(
        types=("query", "attr", "describe"),
        wording=fill("Describe the {t}.", t=thing),
        answer=answer,
        full_answer=f"{answer.capitalize()}.",
        operations=(select(thing), ("query", (0,), "description")),
    )


def line_up(scene: Scene, rng: Rng) -> Draft:
    """Name the things from left to right; for training only, as `describe`."""
    row = sorted(scene.things, key=lambda thing: thing.x)
    answer = ", ".join(thing.category for thing in row)
    return Draft(
        types=("query", "rel", "describe"),
        wording=fill("Name the things from left to right."),
        answer=answer,
        full_answer=f"{answer.capitalize()}.",
        operations=(("select", (), "scene"), ("query", (0,), "description")),
    )


DESCRIPTIONS = (describe, describe, line_up)  # that often each
