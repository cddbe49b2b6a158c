"""Words found as whole words, tokens found through offsets, and reasons where there is nothing to find."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmflow_utils.data.authors import read_authors
from mmflow_utils.prompts.positions import (
    PositionSets,
    find_objects,
    find_options,
    find_phrase,
    question_sets,
    tokens_in,
)

AUTHORS = Path(
    os.environ.get("MMFLOW_AUTHORS_CSV", Path(__file__).resolve().parents[3] / "shared" / "authors_csv_sample")
)
few = settings(max_examples=60, deadline=None, derandomize=True)


def words(text, ranges):
    return [text[start:end] for start, end in ranges]


# PositionSets


def test_spans_sort_and_deduplicate_and_know_the_last():
    positions = PositionSets(n_tokens=6, sets={"image": [3, 1, 1], "last": [5]})
    assert positions["image"] == (1, 3)
    assert positions.last == 5
    assert "image" in positions and "question" not in positions


@pytest.mark.parametrize("positions", [[-1], [0, 6]])
def test_spans_outside_the_prompt_are_refused(positions):
    with pytest.raises(ValueError, match="prompt has 6 tokens"):
        PositionSets(n_tokens=6, sets={"image": positions})


def test_a_missing_set_says_why():
    positions = PositionSets(n_tokens=6, sets={"last": [5], "image_newline": []}, missing={"objects": "none is named"})
    with pytest.raises(KeyError, match="none is named"):
        positions["objects"]
    with pytest.raises(KeyError, match="no such token"):
        positions["image_newline"]
    with pytest.raises(KeyError, match="no position set .*imgae.* has last"):
        positions["imgae"]
    assert positions.get("objects") == ()


def test_with_replaces_a_set_or_its_reason_and_leaves_the_original():
    positions = PositionSets(n_tokens=6, sets={"last": [4]}, missing={"objects": "none is named"})
    moved = positions.with_(last=[5], objects=[2])
    assert (moved.last, moved["objects"], dict(moved.missing)) == (5, (2,), {})
    assert (positions.last, "objects" in positions) == (4, False)
    assert "last" not in moved.with_missing(last="no answer")


# Words


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("What clothing item is not black, the shirt or the hat?", "hat", ["hat"]),
        ("Is the pavement made of cobblestone or stone?", "stone", ["stone"]),
        ("Is the food healthy or unhealthy?", "healthy", ["healthy"]),
        ("Is the Trash  can red?", "trash can", ["Trash  can"]),
        ("Is the t-shirt on the shirt?", "shirt", ["shirt"]),
        ("What is the man's shirt?", "man", ["man"]),
        ("salt, pepper, salt & pepper", "salt & pepper", ["salt & pepper"]),
        ("Do you see any benches?", "bench", ["benches"]),
        ("Are there potatoes or bushes?", "potato", ["potatoes"]),
        ("Do women watch?", "woman", ["women"]),
        ("Do policemen watch?", "policeman", ["policemen"]),
        ("Do people watch?", "person", ["people"]),
        ("Any grandchildren?", "grandchild", ["grandchildren"]),
        ("Any knives, shelves or cherries?", "knife", ["knives"]),
        ("Any knives, shelves or cherries?", "shelf", ["shelves"]),
        ("Any knives, shelves or cherries?", "cherry", ["cherries"]),
        ("Is there a shoe?", "shoes", ["shoe"]),
        ("Are there trash cans?", "trash can", ["trash cans"]),
        ("Are there pairs of shoes?", "pair of shoes", ["pairs of shoes"]),
        ("Is the cat with the cats?", "cat", ["cat"]),  # as it is, before any other number
        ("Is the telephone black?", "phone", []),
        ("Is it there?", "", []),
        ("", "cat", []),
    ],
)
def test_phrases_are_whole_words_in_any_number(text, phrase, found):
    assert words(text, find_phrase(text, phrase)) == found


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("Is it the man’s or the woman's?", "man's", ["man’s"]),
        ("Is it the manʼs hat?", "man’s", ["manʼs"]),
        ("Is it a t‑shirt or a hat?", "t-shirt", ["t‑shirt"]),  # a hyphen that doesn't break
        ("Is it a t–shirt or a hat?", "shirt", []),
        ("Is it a wine glass—or a cup?", "wine glass", ["wine glass"]),  # a dash parts words
        ("Salt — pepper?", "salt – pepper", ["Salt — pepper"]),
        ("Is the cafe\u0301 open?", "café", ["cafe\u0301"]),
        ("Is the café open?", "cafe\u0301", ["café"]),
        ("Is the café open?", "cafe", []),
        ("Any ﬁsh or ｃａｔs?", "fish", ["ﬁsh"]),
        ("Any ﬁsh or ｃａｔs?", "cat", ["ｃａｔs"]),
        ("the fire\u00adplace, the hot\u00a0dog", "fireplace", ["fire\u00adplace"]),
        ("the fire\u00adplace, the hot\u00a0dog", "hot dog", ["hot\u00a0dog"]),
        ("İs it red?", "red", ["red"]),
    ],
)
def test_characters_of_one_look_are_one_and_positions_are_those_of_the_text(text, phrase, found):
    assert words(text, find_phrase(text, phrase)) == found


def test_options_are_found_however_their_apostrophes_are_written():
    question = "Is this the man’s hat or the “woman’s” one?"
    pair, reason = find_options(question, "man's", "woman's")
    assert not reason and words(question, pair) == ["man’s", "woman’s"]
    assert "both options" in find_options(question, "man's", "man’s")[1]


def test_a_phrase_is_sought_within_a_range_alone():
    text = "the cat and the cat"
    assert find_phrase(text, "cat", within=(8, 19)) == [(16, 19)]
    assert find_phrase(text, "cat", within=(0, 6)) == []


@few
@given(st.lists(st.sampled_from(["cat", "Cat", "cats", "catalog", "a", "?", "İ", "ß"]), max_size=12))
def test_exact_finds_are_all_the_equal_words(parts):
    text = " ".join(parts)
    exact = [w for w in parts if w.lower() == "cat"]
    assert words(text, find_phrase(text, "cat")) == (exact or [w for w in parts if w == "cats"])


# Options


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Is the jar full or empty?", ("empty", "full")),
        ("What clothing item is not black, the shirt or the hat?", ("hat", "shirt")),
        ("Which vehicle is white, the train car or the car?", ("car", "train car")),
        ("Which vehicle is white, the car or the train car?", ("car", "train car")),
        ("Is it to the right or to the left of the chair on the left side?", ("right", "left")),
        ("Is the left chair to the right or to the left of it?", ("left", "right")),
        ("Is the man behind or in front of the car?", ("in front of", "behind")),
        ("Is the shoe red OR blue?", ("blue", "red")),
    ],
)
def test_options_are_the_pair_around_or(question, options):
    pair, reason = find_options(question, *options)
    assert reason == ""
    assert tuple(words(question, pair)) == options
    (_, a), (b, _) = sorted(pair)
    assert " or " in question[a:b].lower()


@pytest.mark.parametrize(
    ("question", "options", "reason"),
    [
        ("Is it a telephone or a bed?", ("phone", "bed"), "'phone' is not a whole word"),
        ("Is it red or red?", ("red", "Red"), "both options"),
        ("Is the red or blue cup red or blue?", ("red", "blue"), "more than one 'or'"),
        ("Is the red cup red, not blue?", ("red", "blue"), "stands more than once"),
    ],
)
def test_options_are_never_guessed(question, options, reason):
    pair, why = find_options(question, *options)
    assert pair is None
    assert reason in why


# Objects


@pytest.mark.parametrize(
    ("question", "objects", "found"),
    [
        ("Is the bottle left of the water bottle?", [("bottle", None), ("water bottle", None)], 2),
        ("Are there any people or children?", [("child", None), ("people", None)], 2),
        ("Is the man left of the man?", [("man", None), ("man", None)], 2),
        ("Are the chairs red?", [("chair", None), ("chair", None)], 1),  # one word for two of them
        ("What is on the table?", [("table", None), ("_", None)], 1),
    ],
)
def test_objects_are_found_each_once(question, objects, found):
    ranges, reason = find_objects(question, objects)
    assert reason == ""
    assert len(ranges) == found


@pytest.mark.parametrize(
    ("question", "objects", "reason"),
    [
        ("Is the telephone red?", [("phone", None)], "'phone' is not a whole word"),
        ("Is the man left of the man?", [("man", None)], "stands 2 times"),
        ("Is the man there?", [("man", None), ("dog", None)], "'dog' is not a whole word"),
        ("What is it?", [("_", None)], "names no object"),
        ("What is it?", [], "names no object"),
    ],
)
def test_objects_are_never_guessed(question, objects, reason):
    ranges, why = find_objects(question, objects)
    assert ranges is None
    assert reason in why


@pytest.mark.parametrize(
    ("question", "objects", "found"),
    [
        ("Is the man left of that man?", [("man", (6, 7))], [(24, 27)]),  # which of two
        ("What is on the white wall?", [("wall", (4, 6))], [(21, 25)]),  # GQA's range holds the attribute too
        ("Is the lady, then, tall?", [("woman", (2, 3))], [(7, 11)]),  # another word for it, less the comma
        ("Is the man left of that man?", [("man", (2, 3)), ("man", None)], [(7, 10), (24, 27)]),
    ],
)
def test_annotated_words_settle_the_name(question, objects, found):
    assert list(find_objects(question, objects)[0]) == found


def test_an_annotation_beyond_the_question_falls_back_on_the_name():
    assert find_objects("Is the cat red?", [("cat", (7, 9))])[0] == ((7, 10),)
    assert find_objects("Is the cat red?", [("cat", (2, 2))])[0] == ((7, 10),)


# Tokens

CORPUS = [
    "USER: Is the trash can to the right or to the left of the hat? Answer the question using a single word",
    "What clothing item is not black, the shirt or the hat? ASSISTANT: train car, cobblestone, people, café",
] * 30


def metaspace():
    """Build a tokenizer whose tokens begin with their space, as SentencePiece's do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>"]))
    return tokenizer


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, special_tokens=["<s>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=[metaspace, byte_level])
def tokenizer(request):
    return request.param()


def decode(tokenizer, encoding, positions):
    return tokenizer.decode([encoding.ids[p] for p in positions]).strip()


def test_each_word_of_a_prompt_is_its_own_tokens(tokenizer):
    prompt = CORPUS[0]
    encoding = tokenizer.encode(prompt)
    seen = []
    for word in ("Is", "trash can", "right", "left", "hat", "Answer"):
        ((start, end),) = find_phrase(prompt, word)
        held = tokens_in(encoding.offsets, start, end)
        assert decode(tokenizer, encoding, held).rstrip("?:") == word
        seen += held
    assert len(seen) == len(set(seen))


def test_special_tokens_and_empty_ranges_overlap_nothing():
    offsets = [(0, 0), (0, 3), (3, 7), (7, 7)]
    assert tokens_in(offsets, 0, 7) == (1, 2)
    assert tokens_in(offsets, 3, 3) == ()


def test_a_token_that_begins_with_a_space_is_not_of_the_word_before():
    assert tokens_in([(0, 2), (2, 6)], 0, 2) == (0,)  # "an", " hat"


def test_a_character_of_several_tokens_gives_them_all():
    encoding = byte_level().encode("a 🦒 or a hat")
    held = tokens_in(encoding.offsets, 2, 3)
    assert len(held) > 1
    assert tokens_in(encoding.offsets, 9, 12)[0] > held[-1]


@few
@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 40), st.integers(0, 40))
def test_tokens_of_two_adjoining_ranges_are_those_of_the_whole(lengths, a, b):
    edges = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    offsets = list(zip(edges, edges[1:], strict=False))
    cut, end = min(a, b), max(a, b)
    parts = {*tokens_in(offsets, 0, cut), *tokens_in(offsets, cut, end)}
    assert parts == set(tokens_in(offsets, 0, end))


def test_the_sets_of_a_question_part_it_without_remainder(tokenizer):
    question = "Is the trash can to the right or to the left of the hat?"
    prompt = f"USER: {question} \nAnswer the question using a single word ASSISTANT:"
    encoding = tokenizer.encode(prompt)
    objects = [("trash can", None), ("hat", None)]
    sets, missing = question_sets(prompt, question, encoding.offsets, options=("right", "left"), objects=objects)
    assert missing == {}
    assert decode(tokenizer, encoding, sets["question"]) == question
    assert decode(tokenizer, encoding, sets["option_true"]) == "right"
    assert decode(tokenizer, encoding, sets["option_false"]) == "left"
    for whole in ("options", "objects"):
        rest = sets[f"question_without_{whole}"]
        assert sorted([*sets[whole], *rest]) == list(sets["question"])
    PositionSets(n_tokens=len(encoding.ids), sets=sets, missing=missing)


def test_parts_that_are_not_there_are_recorded():
    offsets = [(i, i + 1) for i in range(40)]
    sets, missing = question_sets("Q: Is the telephone red?", "Is the telephone red?", offsets)
    assert set(sets) == {"question"}
    assert missing["options"] == missing["option_true"] == "the question has no options"
    assert missing["question_without_objects"] == "the question names no object"
    with pytest.raises(ValueError, match="doesn't hold the question"):
        question_sets("Q: other?", "Is the telephone red?", offsets)


# The authors' questions


@pytest.mark.skipif(not AUTHORS.is_dir(), reason=f"the authors' CSV files aren't at {AUTHORS}")
def test_the_authors_questions_are_found_or_the_reason_is_told(tmp_path, capsys):
    samples = [s for file in sorted(AUTHORS.glob("*.csv")) for s in read_authors(file, tmp_path)[0]]
    assert len(samples) >= 360
    offered = [s for s in samples if s.option_true]
    lost = {}
    for sample in offered:
        pair, reason = find_options(sample.question, sample.option_true, sample.option_false)
        lost |= {} if pair else {sample.sample_id: reason}
        if pair:
            found = [w.lower() for w in words(sample.question, pair)]
            assert found == [sample.option_true, sample.option_false]
    for sample in samples:
        ranges, reason = find_objects(sample.question, [(o.name, o.words) for o in sample.objects])
        lost |= {} if ranges else {sample.sample_id: reason}
    with capsys.disabled():
        print(f"\n{len(samples)} questions, {len(offered)} with options; not found: {lost}")
    assert all(lost.values())
    assert len(lost) <= 0.01 * len(samples)  # "telephone" for "phone" is one
