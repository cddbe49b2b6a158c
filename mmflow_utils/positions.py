"""Named position sets of one prompt: which tokens are the image, the question, its options, its objects.

Words are found through the tokenizer's character offsets and as whole words, never by substring: in "What
clothing item is not black, the shirt or the hat?" the first "hat" stands inside "What". What can't be found
is recorded with its reason. Knows no model and no sample.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

__all__ = ["Spans"]


@dataclass(frozen=True)
class Spans:
    """The position sets of one prompt.

    Attributes:
        n_tokens: Length of the prompt in tokens, image tokens expanded.
        sets: Name -> positions (0-based), stored ascending, each once. An empty set is recorded as missing.
        missing: Name -> the reason why the prompt has no such set.

    Names in use: `image` (patches only), `image_newline`, `image_related`, `image_other`, `question`,
    `option_true`, `option_false`, `options`, `question_without_options`, `objects`,
    `question_without_objects`, `last`.

    Raises:
        ValueError: A position outside the prompt.

    >>> spans = Spans(n_tokens=5, sets={"image": [1, 2], "last": [4]}, missing={"objects": "none is named"})
    >>> spans["image"], spans.last, "objects" in spans
    ((1, 2), 4, False)
    >>> spans.with_(question=[3])["question"]
    (3,)
    """

    n_tokens: int
    sets: Mapping[str, Iterable[int]]
    missing: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sets = {name: tuple(sorted({int(p) for p in positions})) for name, positions in self.sets.items()}
        for name, held in sets.items():
            if held and (held[0] < 0 or held[-1] >= self.n_tokens):
                raise ValueError(
                    f"{name} has positions {held[0]} to {held[-1]}, but the prompt has {self.n_tokens} tokens"
                )
        empty = {name: "this prompt has no such token" for name, held in sets.items() if not held}
        object.__setattr__(self, "sets", {name: positions for name, positions in sets.items() if positions})
        object.__setattr__(self, "missing", {**empty, **self.missing})

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.sets:
            raise KeyError(self.why_missing(name))
        return self.sets[name]

    def __contains__(self, name: str) -> bool:
        return name in self.sets

    def get(self, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Give the positions of a set, or the default where the prompt has none."""
        return self.sets.get(name, default)

    @property
    def last(self) -> int:
        """The position that predicts the answer token under study: the last of the prompt."""
        return self["last"][-1]

    def why_missing(self, name: str) -> str:
        """Say why the prompt has no set of that name."""
        reason = self.missing.get(name)
        return (
            f"{name}: {reason}"
            if reason
            else f"no position set {name!r}; this prompt has {', '.join(self.sets)}"
        )

    def with_(self, **sets: Iterable[int]) -> "Spans":
        """Give a copy with some sets added or replaced."""
        missing = {name: reason for name, reason in self.missing.items() if name not in sets}
        return replace(self, sets={**self.sets, **sets}, missing=missing)

    def with_missing(self, **reasons: str) -> "Spans":
        """Give a copy in which some sets are absent, each for a recorded reason."""
        sets = {name: positions for name, positions in self.sets.items() if name not in reasons}
        return replace(self, sets=sets, missing={**self.missing, **reasons})
