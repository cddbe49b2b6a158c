"""Questions about a drawn scene, in GQA's wording and record format, from its 15 groups of questions.

Each generator takes a scene and a random generator and gives one question as a `Draft`, or None where the
scene doesn't allow it. It bears the name of GQA's type, `types.detailed`, hence the camelCase. The answer is
drawn after the form of the question, so that a question's words say nothing about its answer.

Example:
    >>> from miniature.questions.tasks import positionQuery
    >>> draft = ask(positionQuery, scene, np.random.default_rng(0))
    >>> draft.text, draft.answer
    ('In which part of the image is the cat?', 'right')
"""

from collections.abc import Callable

from miniature.questions.bridges import BRIDGES
from miniature.questions.draft import Draft, Rng, gqa_record
from miniature.questions.extras import FACTS, compare, describe, factual
from miniature.questions.tasks import TASK_GENERATORS
from miniature.world import Scene

__all__ = [
    "BRIDGES",
    "FACTS",
    "GENERATORS",
    "TASK_GENERATORS",
    "Draft",
    "ask",
    "compare",
    "describe",
    "factual",
    "gqa_record",
]

# All that the miniature's question file holds: GQA has no questions that take knowledge of the world.
GENERATORS = (*(generator for group in TASK_GENERATORS.values() for generator in group), *BRIDGES)


def ask(generator: Callable[[Scene, Rng], Draft | None], scene: Scene, rng: Rng, *, tries: int = 12) -> Draft | None:
    """Try a generator a few times; None where the scene doesn't allow its question."""
    for _ in range(tries):
        draft = generator(scene, rng)
        if draft is not None:
            return draft
    return None
