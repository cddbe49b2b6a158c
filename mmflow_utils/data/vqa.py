"""Factual questions: OKVQA's and A-OKVQA's own files, and accuracy by what ten people said (App. H)."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from mmflow_utils.data.fields import pictures_folder, read_json, text
from mmflow_utils.data.sample import Sample

Made = TypeVar("Made")

_MARKS = '()[]{}<>"`;,?!/\\_-=+@'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(n) for n, word in enumerate(_NUMBERS)}
_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll ma'am might've mightn't mightn't've
must've mustn't needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've that'd
that'd've that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all you'd you'd've you'll you're you've
"""  # only those whose bare letters are no other word, as those of "we'll" and "it's" are
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHES.split()}


def vqa_accuracy(predicted: str, answers: Sequence[str]) -> float:
    """Return the soft accuracy of an answer, from 0 to 1: that of VQA's official evaluation.

    min(people who said it / 3, 1), averaged over leaving out each of the people once (Antol et al., 2015). Before, both
    sides are normalized: lower case, no articles, digits for numbers up to ten, no punctuation, apostrophes in
    contractions. The official code spares the people's answers a part of this; here both sides get the same. A-OKVQA's
    own evaluation leaves nobody out and normalizes nothing.

    Args:
        predicted: The model's answer.
        answers: What two or more people answered; officially ten.

    >>> [vqa_accuracy("The cat.", ["cat"] * n + ["dog"] * (10 - n)) for n in (0, 1, 2, 3, 4)]
    [0.0, 0.3, 0.6, 0.9, 1.0]
    """
    n = len(answers)
    if n < 2:
        raise ValueError(f"expected the answers of two or more people, officially ten, got {n}")
    said = _normalize(predicted)
    same = sum(_normalize(answer) == said for answer in answers)
    # One of those who said it is left out, or one of the others.
    return (same * min((same - 1) / 3, 1) + (n - same) * min(same / 3, 1)) / n


def _normalize(answer: str) -> str:
    words = _without_marks(answer.lower()).split()
    words = [_DIGITS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in words)


def _without_marks(answer: str) -> str:
    """Take out punctuation as VQA does: a mark that touches a space goes, any other parts words."""
    plain = answer
    for mark in _MARKS:
        loose = f" {mark}" in answer or f"{mark} " in answer or re.search(r"\d,\d", answer)
        plain = plain.replace(mark, "" if loose else " ")
    return re.sub(r"\.(?!\d)", "", plain)  # "3.5" keeps its point


def read_okvqa(
    questions: Path | str,
    annotations: Path | str,
    images: Path | str,
    *,
    image_pattern: str = "COCO_{data_subtype}_{image_id:012d}.jpg",
) -> tuple[list[Sample], pd.DataFrame]:
    """Read OKVQA's questions and people's answers, or others in the VQA format.

    Args:
        questions: `OpenEnded_mscoco_val2014_questions.json`.
        annotations: `mscoco_val2014_annotations.json`, of the same split.
        images: Folder of COCO's pictures of 2014.
        image_pattern: A picture's file name, from `image_id` and the question file's `data_subtype`.

    Returns:
        The samples in the file's order, and what was left out, as from `read_gqa`. A sample's `answer` is the one that
        most people gave, its `detailed` type the kind of knowledge that the question asks for.

    Raises:
        ValueError: A file or folder that is missing, damaged or of another layout, naming entry and field; files of two
            splits; a pattern that can't be filled in; no question that can be asked.
    """
    asked, judged = _load(questions, dict, "OKVQA question"), _load(annotations, dict, "OKVQA annotation")
    subtype = asked.get("data_subtype")
    if not isinstance(subtype, str) or not re.fullmatch(r"[\w-]{1,40}", subtype):
        raise ValueError(f"{questions}: data_subtype should be a name such as val2014, got {subtype!r:.40}")
    file_of = _file_namer(images, image_pattern, data_subtype=subtype)
    kinds = judged.get("question_types")
    kinds = kinds if isinstance(kinds, dict) else {}

    def label(entry: dict[str, Any]) -> tuple[int, tuple[str, ...], str]:
        kind, said = text(entry, "question_type"), entry.get("answers")
        words = [v.get("answer") if isinstance(v, dict) else v for v in (said if isinstance(said, list) else [said])]
        return _image_id(entry), _people(words, "answers"), text(kinds, kind) if kind in kinds else kind

    labels = _each(annotations, judged.get("annotations"), "annotations", label)

    def sample(entry: dict[str, Any]) -> Sample:
        image_id, answers, kind = labels.get(str(entry["question_id"]), (None, (), ""))
        if image_id != _image_id(entry):
            raise ValueError(f"no annotation of this question_id and image_id in {annotations}")
        return _sample(entry, "OKVQA", file_of, answers, detailed=kind)

    return _askable(_each(questions, asked.get("questions"), "questions", sample), {})


def read_aokvqa(
    questions: Path | str, images: Path | str, *, image_pattern: str = "{image_id:012d}.jpg"
) -> tuple[list[Sample], pd.DataFrame]:
    """Read A-OKVQA's questions with people's direct answers; the four choices are not offered.

    Args:
        questions: `aokvqa_v1p0_val.json`.
        images: Folder of COCO's pictures of 2017.
        image_pattern: A picture's file name, from `image_id`.

    Returns:
        As `read_okvqa`, without the questions that the authors mark as too difficult for a direct answer.

    Raises:
        ValueError: As `read_okvqa`; the test split, which holds no answers.
    """
    asked = _load(questions, list, "A-OKVQA question")
    file_of = _file_namer(images, image_pattern)
    too_difficult: dict[str, str] = {}

    def sample(entry: dict[str, Any]) -> Sample:
        difficult = entry.get("difficult_direct_answer")
        if not isinstance(difficult, bool):
            raise ValueError(f"difficult_direct_answer should be true or false, got {difficult!r:.40}")
        if difficult:
            too_difficult[str(entry["question_id"])] = "marked as too difficult for a direct answer"
        answers = _people(entry.get("direct_answers"), "direct_answers")
        return _sample(entry, "A-OKVQA", file_of, answers, detailed="factual")

    return _askable(_each(questions, asked, "questions", sample), too_difficult)


def _load(path: Path | str, kind: type, what: str) -> Any:
    data = read_json(path, f"{what} file")
    if not isinstance(data, kind):
        raise ValueError(f"{path} has a {type(data).__name__} at the top: expected an {what} file, a {kind.__name__}")
    return data


def _each(path: Path | str, entries: Any, field: str, make: Callable[[dict[str, Any]], Made]) -> dict[str, Made]:
    """Make something of each entry, by question id; an error names the file, the entry and the field."""
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: {field} should be a list of entries, got {entries!r:.40}")
    made: dict[str, Made] = {}
    for k, entry in enumerate(entries):
        where = f"{path}, {field}[{k}]"
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"expected an entry with fields, got {entry!r:.40}")
            key = entry.get("question_id")
            if isinstance(key, bool) or not isinstance(key, int | str):
                raise ValueError(f"question_id should be a number or a name, got {key!r:.40}")
            if isinstance(key, str):
                text(entry, "question_id")
            where += f" (question_id {key!r:.40})"
            if str(key) in made:
                raise ValueError("question_id is duplicated")
            made[str(key)] = make(entry)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; fetch the official files of one split again") from error
    return made


def _image_id(entry: dict[str, Any]) -> int:
    value = entry.get("image_id")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"image_id should be a whole number, got {value!r:.40}")
    return value


def _people(values: Any, field: str) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{field} should hold what ten people answered (a test split has none), got {values!r:.60}")
    return tuple(text({field: value}, field) for value in values)


def _sample(
    entry: dict[str, Any], task: str, file_of: Callable[[int], Path], answers: tuple[str, ...], detailed: str
) -> Sample:
    image_id = _image_id(entry)
    return Sample(
        sample_id=str(entry["question_id"]),
        image_id=str(image_id),
        image=file_of(image_id),
        question=text(entry, "question"),
        answer=Counter(answer.lower() for answer in answers).most_common(1)[0][0],
        task=task,
        structural="query",
        semantic="fact",
        detailed=detailed,
        answers=answers,
    )


def _file_namer(images: Path | str, pattern: str, **names: str) -> Callable[[int], Path]:
    """Return the function from an image's id to its file, once the pattern is known to tell images apart."""
    folder = pictures_folder(images)
    try:
        told_apart = pattern.format(image_id=1, **names) != pattern.format(image_id=2, **names)
    except (LookupError, ValueError, AttributeError):
        told_apart = False
    if not told_apart:
        holds = ", ".join(f"{{{name}}}" for name in ("image_id", *names))
        raise ValueError(f"image_pattern {pattern!r} can't be filled in: it should hold {holds} and no other")
    return lambda image_id: folder / pattern.format(image_id=image_id, **names)


def _askable(samples: dict[str, Sample], reasons: dict[str, str]) -> tuple[list[Sample], pd.DataFrame]:
    """Separate the samples from those that are left out: for a reason given, or for want of their picture."""
    missing = {key: f"no picture {s.image.name}" for key, s in samples.items() if not s.image.is_file()}
    reasons = missing | reasons
    left_out = [{"sample_id": key, "reason": reasons[key], "kept": False} for key in samples if key in reasons]
    kept = [sample for key, sample in samples.items() if key not in reasons]
    if not kept:
        first = next(iter(samples.values()))
        raise ValueError(
            f"no question of {len(samples)} can be asked ({left_out[0]['reason']} in {first.image.parent}): "
            "unpack the pictures of this split there, or set the image pattern to their names"
        )
    return kept, pd.DataFrame(left_out, columns=["sample_id", "reason", "kept"])
