"""Named position sets of one prompt: which tokens are the image, the question, its options, its objects.

Words are found through the tokenizer's character offsets and as whole words, never by substring: in "What
clothing item is not black, the shirt or the hat?" the first "hat" stands inside "What". What can't be found
is recorded with its reason. Knows no model and no sample.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product

__all__ = ["PositionSets", "find_objects", "find_options", "find_phrase", "question_sets", "tokens_in"]

Range = tuple[int, int]  # characters, half-open
Named = tuple[str, tuple[int, int] | None]  # an object's name and its range of words, where annotated

HAS_NONE = {"options": "the question has no options", "objects": "the question names no object"}  # so none is lost
UNNAMED = "_"  # how GQA writes an object that its question asks for without naming it
_WORD = re.compile(r"\w+(?:-\w+)*")
_CLUSTER = re.compile(r".[\u0300-\u036f]*", re.DOTALL)  # a letter and its accents
# Written alike though they are other characters; a long dash is one between words, a short one may join them.
_ALIKE = str.maketrans(dict.fromkeys("‘’‚‛ʼ′`´", "'") | dict.fromkeys("“”„‟″", '"') | dict.fromkeys("‐‑‒–−", "-"))
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
# Ends of nouns and of their plurals; one too many does no harm: only words of the question count. Compounds are
# covered too, "grandchild", "salesperson".
_PLURALS = [(r"\Z", "s"), (r"(s|x|z|ch|sh|o)\Z", r"\1es"), (r"z\Z", "zzes"), (r"y\Z", "ies"), (r"fe?\Z", "ves")]
_PLURALS += [(r"man\Z", "men"), (r"us\Z", "i"), (r"child\Z", "children"), (r"die\Z", "dice"), (r"foot\Z", "feet")]
_PLURALS += [(r"goose\Z", "geese"), (r"mouse\Z", "mice"), (r"ox\Z", "oxen"), (r"person\Z", "people")]
_PLURALS += [(r"tooth\Z", "teeth")]


class _Reasons(dict[str, str]):
    def __contains__(self, name: object) -> bool:  # a union is missing where one of its sets is
        return any(super(_Reasons, self).__contains__(part) for part in str(name).split("+"))


@dataclass(frozen=True)
class PositionSets:
    """The position sets of one prompt.

    Attributes:
        n_tokens: Length of the prompt in tokens, image tokens expanded.
        sets: Name -> positions (0-based), stored ascending, each once. An empty set is recorded as missing.
        missing: Name -> the reason why the prompt has no such set.

    Names in use: `image` (patches only), `image_newline`, `image_related`, `image_other`, `question`,
    `option_true`, `option_false`, `options`, `question_without_options`, `objects`,
    `question_without_objects`, `template` (the prompt between question and last), `last`, `system` (all other tokens
    before the question), `after_image` (what comes after the first image patch and is none), `after_question`. Names
    joined by "+" are a union, which a prompt has if it has all of them.

    Raises:
        ValueError: A position outside the prompt.

    >>> positions = PositionSets(n_tokens=5, sets={"image": [1, 2], "last": [4]}, missing={"objects": "none is named"})
    >>> positions["image"], positions.last, "objects" in positions
    ((1, 2), 4, False)
    >>> positions.with_(question=[3])["question"], positions["image+last"]
    ((3,), (1, 2, 4))
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
        object.__setattr__(self, "missing", _Reasons({**empty, **self.missing}))

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self:
            raise KeyError(self.why_missing(name))
        return tuple(sorted({p for part in name.split("+") for p in self.sets[part]}))

    def __contains__(self, name: str) -> bool:
        return all(part in self.sets for part in name.split("+"))

    def get(self, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Return the positions of a set, or the default where the prompt has none."""
        return self[name] if name in self else default  # noqa: SIM401

    @property
    def last(self) -> int:
        """The position that predicts the answer token under study: the last of the prompt."""
        return self["last"][-1]

    def why_missing(self, name: str) -> str:
        """Return why the prompt has no set of that name."""
        part = next((part for part in name.split("+") if part not in self.sets), name)
        reason = self.missing.get(part)
        return f"{part}: {reason}" if reason else f"no position set {part!r}; this prompt has {', '.join(self.sets)}"

    def with_(self, **sets: Iterable[int]) -> "PositionSets":
        """Return a copy with some sets added or replaced."""
        missing = {name: reason for name, reason in self.missing.items() if name not in sets}
        return replace(self, sets={**self.sets, **sets}, missing=missing)

    def with_missing(self, **reasons: str) -> "PositionSets":
        """Return a copy in which some sets are absent, each for a recorded reason."""
        sets = {name: positions for name, positions in self.sets.items() if name not in reasons}
        return replace(self, sets=sets, missing={**self.missing, **reasons})


def tokens_in(offsets: Iterable[tuple[int, int]], start: int, end: int) -> tuple[int, ...]:
    """Return the tokens that overlap the characters `start … end - 1`, by each token's own range of characters.

    A token that begins with the space before its word overlaps that word alone; a special token, of no characters,
    overlaps nothing.

    >>> tokens_in([(0, 0), (0, 3), (3, 7), (7, 8)], 4, 7)  # "the cat?", the range of "cat"
    (2,)
    """
    return tuple(i for i, (s, e) in enumerate(offsets) if max(s, start) < min(e, end))


def find_phrase(text: str, phrase: str, *, within: Range | None = None) -> list[Range]:
    """Return where a phrase stands in a text as whole words, in any case: ranges of characters, in order.

    Apostrophes, dashes, accents and letters of one look count as one, however they are written (Unicode's NFKC).
    Where there is none, it is sought in another grammatical number. A word with hyphens is one word: "shirt" isn't
    found in "t-shirt". With `within`, a range of characters, only there.

    >>> find_phrase("Are there bags or a mailbag?", "bag")
    [(10, 14)]
    """
    exact, inflected = _matches(text, phrase)
    start, end = within or (0, len(text))
    inside = [[r for r in found if start <= r[0] and r[1] <= end] for found in (exact, inflected)]
    return inside[0] or inside[1]


def find_options(question: str, option_true: str, option_false: str) -> tuple[tuple[Range, Range] | None, str]:
    """Find the two options that a question offers.

    Where a word occurs twice, the pair around "or" is meant: "… to the right or to the left of the chair on the left
    side?"

    Returns:
        The ranges of the true and the false option, and ""; or None and the reason, since nothing is guessed.

    >>> find_options("Which is white, the train car or the car?", "car", "train car")
    (((37, 40), (20, 29)), '')
    """
    if _folded(option_true)[0] == _folded(option_false)[0]:
        return None, f"both options are {option_true!r}"
    exact = [find_phrase(question, option) for option in (option_true, option_false)]
    for option, found in zip((option_true, option_false), exact, strict=True):
        if not found:
            return None, f"option {option!r} is not a whole word of the question"
    every = [sum(_matches(question, option), []) for option in (option_true, option_false)]
    for trues, falses in (exact, every):
        pairs = _pairs_around_or(question, trues, falses)
        if len(pairs) == 1:
            return pairs.pop(), ""
        if pairs:
            return None, f"{option_true!r} and {option_false!r} stand around more than one 'or'"
    (true, *more), (false, *others) = exact
    if more or others or _overlap(true, false):
        return (None, f"{option_true!r} or {option_false!r} stands more than once, and no 'or' settles it")
    return (true, false), ""


def find_objects(question: str, objects: Sequence[Named]) -> tuple[tuple[Range, ...] | None, str]:
    """Find the names of the objects that a question is about.

    Args:
        objects: Name and, where GQA annotates it, the half-open range of words (split at spaces) that stands for the
            object: the name is sought there, and where those words don't hold it ("it", "the lady"), they are the
            name. An object that GQA writes "_" is asked for, not named, and counts for nothing.

    Returns:
        The ranges, and ""; or None and the reason: a name that isn't there, or stands more often than such objects.

    >>> find_objects("Is that bottle left of the water bottle?", [("bottle", None), ("water bottle", None)])
    (((8, 14), (27, 39)), '')
    """
    named = [(name, _characters(question, words)) for name, words in objects if name != UNNAMED]
    if not named:
        return None, HAS_NONE["objects"]
    # GQA annotates "white wall" for the object "wall".
    claimed = {(find_phrase(question, name, within=held) or [held])[-1] for name, held in named if held}
    names = [name for name, held in named if held is None]
    for name in sorted(set(names), key=len, reverse=True):  # "water bottle" before "bottle"
        found = find_phrase(question, name)
        free = [r for r in found if not any(_overlap(r, other) for other in claimed)]
        if not free:
            return None, f"object {name!r} is not a whole word of the question"
        if len(free) > names.count(name):
            return None, f"object {name!r} stands {len(free)} times in the question"
        claimed.update(free)
    return tuple(sorted(claimed)), ""


def question_sets(
    prompt: str,
    question: str,
    offsets: Sequence[tuple[int, int]],
    *,
    options: tuple[str, str] | None = None,
    objects: Sequence[Named] = (),
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the position sets of a question and its parts.

    Args:
        prompt: The text that was tokenized.
        question: The question, as it stands in the prompt (its last occurrence counts).
        offsets: Each token's half-open character range in the prompt.
        options: The true and the false option, where the question has options.
        objects: The objects it is about, as for `find_objects`.

    Returns:
        The sets of the question and its parts, and for those that it lacks the reason.

    Raises:
        ValueError: The prompt doesn't hold the question.

    >>> question_sets("Q: red?", "red?", [(0, 2), (2, 6), (6, 7)])[0]
    {'question': (1, 2)}
    """
    begin = prompt.rfind(question)
    if begin < 0 or not question:
        raise ValueError(f"the prompt doesn't hold the question {question!r}: fill it in unchanged")
    whole = tokens_in(offsets, begin, begin + len(question))
    sets = {"question": whole}
    missing: dict[str, str] = {}

    def part(start: int, end: int) -> tuple[int, ...]:
        return tokens_in(offsets, begin + start, begin + end)

    pair, reason = find_options(question, *options) if options else (None, HAS_NONE["options"])
    if pair:
        true, false = part(*pair[0]), part(*pair[1])
        either = tuple(sorted({*true, *false}))
        sets |= {"option_true": true, "option_false": false, "options": either}
        sets["question_without_options"] = tuple(p for p in whole if p not in either)
    else:
        names = ("option_true", "option_false", "options", "question_without_options")
        missing |= dict.fromkeys(names, reason)
    ranges, reason = find_objects(question, objects)
    if ranges:
        sets["objects"] = tuple(sorted({p for r in ranges for p in part(*r)}))
        sets["question_without_objects"] = tuple(p for p in whole if p not in sets["objects"])
    else:
        missing |= dict.fromkeys(("objects", "question_without_objects"), reason)
    return sets, missing


def _matches(text: str, phrase: str) -> tuple[list[Range], list[Range]]:
    """Find a phrase's words in a text: as they are, and with one word in another grammatical number."""
    (text, origin), (phrase, _) = _folded(text), _folded(phrase)
    words, wanted = list(_WORD.finditer(text)), list(_WORD.finditer(phrase))
    found: tuple[list[Range], list[Range]] = ([], [])
    for i in range(len(words) - len(wanted) + 1 if wanted else 0):
        here = words[i : i + len(wanted)]
        if _gaps(text, here) != _gaps(phrase, wanted):
            continue
        pairs = [(a.group(), b.group()) for a, b in zip(here, wanted, strict=True)]
        differ = [pair for pair in pairs if pair[0] != pair[1]]
        if not differ or (len(differ) == 1 and _same_noun(*differ[0])):
            found[bool(differ)].append((origin[here[0].start()][0], origin[here[-1].end() - 1][1]))
    return found


def _folded(text: str) -> tuple[str, list[Range]]:
    """Write a text as it is matched, and tell for each of its characters which ones of the text it stands for."""
    folded, origin = "", []
    for cluster in _CLUSTER.finditer(text):
        alike = unicodedata.normalize("NFKC", cluster.group().translate(_ALIKE)).translate(_UNSEEN).lower()
        folded += alike
        origin += [cluster.span()] * len(alike)
    return folded, origin


def _gaps(text: str, words: Sequence[re.Match[str]]) -> list[str]:
    # "salt & pepper" isn't "salt, pepper", but white space is all one.
    between = (text[a.end() : b.start()] for a, b in zip(words, words[1:], strict=False))
    return [gap.strip().replace("—", "-") for gap in between]


@lru_cache(maxsize=4096)  # the words of a data set are few, and each is set beside each
def _same_noun(a: str, b: str) -> bool:
    pairs = ((one, other, *ends) for one, other in ((a, b), (b, a)) for ends in _PLURALS)
    return any(re.search(end, one) and re.sub(end, plural, one) == other for one, other, end, plural in pairs)


def _pairs_around_or(text: str, true: list[Range], false: list[Range]) -> set[tuple[Range, Range]]:
    """Return, for each "or" with an option on either side, the pair (true, false) nearest to it."""
    pairs = set()
    for gap in re.finditer(r"\bor\b", text, re.IGNORECASE):
        near = []
        for pair in product(true, false):
            left, right = sorted(pair)
            if left[1] <= gap.start() and gap.end() <= right[0]:
                near.append((right[0] - left[1], left[0] - right[1], pair))
        if near:
            pairs.add(min(near)[-1])
    return pairs


def _overlap(a: Range, b: Range) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _characters(text: str, words: tuple[int, int] | None) -> Range | None:
    """Turn a half-open range of words into characters, or None where the text has no such words."""
    ranges = [m.span() for m in re.finditer(r"\S+", text)]
    if words is None or not 0 <= words[0] < words[1] <= len(ranges):
        return None
    start, end = ranges[words[0]][0], ranges[words[1] - 1][1]
    bare = list(_WORD.finditer(text, start, end))
    return (bare[0].start(), bare[-1].end()) if bare else None
