"""Patched runs against plain hooks on the whole model, and against what must come out."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from tiny import tiny_sample, vlm_of_kind

from mmflow_utils.engine.patching import Patch, run_patched, run_patched_reference
from mmflow_utils.prompts.encoding import encode

pytestmark = pytest.mark.usefixtures("small_slices")
N_LAYERS = 4
PROMPT = "USER: <image>\n{question} ASSISTANT:"  # short: the sliding windows reach across it
KINDS = ("llava", "llava-gqa", "llava_next", "sliding", "qwen2_5_vl", "idefics3")


@cache
def setting(kind: str):
    """Give a random model, and one question about two pictures."""
    model = vlm_of_kind(kind, n_layers=N_LAYERS, prompt=PROMPT)
    with TemporaryDirectory() as folder:
        return model, *(encode(model, tiny_sample(Path(folder), sample_id=f"q{n}", seed=n)) for n in (1, 2))


def some_patches(encoded, seed=0):
    """Give position sets and windows, and positions drawn at random."""
    held, rng = encoded.positions, np.random.default_rng(seed)
    drawn = tuple(sorted(rng.choice(held.n_tokens, 5, replace=False).tolist()))
    windows = (range(0, 1), range(1, 3), range(N_LAYERS - 1, N_LAYERS), range(1, N_LAYERS))
    sets = [held["image"], held["question"], held["last"], held["image"][2:5] + held["last"], drawn]
    return [Patch(positions=positions, layers=layers) for positions in sets for layers in windows]


def probs(logits):
    return logits.softmax(-1)


def assert_close(ours, plain):
    torch.testing.assert_close(probs(ours), probs(plain), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_patches_give_what_plain_hooks_give(kind):
    model, encoded, donor = setting(kind)
    patches = some_patches(encoded)
    found, plain = (run(model, encoded, donor, patches) for run in (run_patched, run_patched_reference))
    for name in ("base", "donor", "variants"):
        assert_close(getattr(found, name), getattr(plain, name))
    moved = (probs(plain.variants) - probs(plain.base)).abs().amax(1)
    assert (moved > 1e-4).sum() > len(patches) / 2, "patches that change nothing prove nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_everything_gives_the_other_answer_and_nothing_leaves_this_one(kind):
    model, encoded, donor = setting(kind)
    everywhere, after = tuple(range(encoded.positions.n_tokens)), encoded.positions["after_image"]
    patches = [Patch(positions=everywhere, layers=range(i, i + 1)) for i in range(N_LAYERS)]
    patches += [
        Patch(positions=(), layers=range(N_LAYERS)),
        Patch(positions=everywhere, layers=range(0)),
        Patch(positions=tuple(sorted({*after} - {*encoded.positions.get("image_newline")})), layers=range(1)),
    ]
    found = run_patched(model, encoded, donor, patches)
    assert_close(found.variants[:N_LAYERS], found.donor.expand(N_LAYERS, -1))
    # Before the first layer the text's embeddings are alike.
    assert_close(found.variants[N_LAYERS:], found.base.expand(3, -1))
    assert (probs(found.base) - probs(found.donor)).abs().max() > 1e-3
    itself = run_patched(model, encoded, encoded, some_patches(encoded))
    assert_close(itself.variants, itself.base.expand(len(itself.variants), -1))


def test_states_one_layer_off_are_found_out():
    model, encoded, donor = setting("llava")
    patch = Patch(positions=encoded.positions["image"], layers=range(1, 2))
    late = replace(patch, layers=range(2, 3))
    ours = run_patched(model, encoded, donor, [patch]).variants
    plain = run_patched_reference(model, encoded, donor, [late]).variants
    assert (probs(ours) - probs(plain)).abs().max() > 1e-3


def test_only_rows_from_the_patch_on_are_computed(monkeypatch):
    model, encoded, donor = setting("llava")
    counted = []
    forward = model.layers[2].forward

    def counting(hidden, *args, **kwargs):
        counted.append(hidden.shape[1])
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(model.layers[2], "forward", counting)
    n_tokens, question = encoded.positions.n_tokens, encoded.positions["question"]
    patches = [Patch(positions=question, layers=range(i, i + 1)) for i in range(N_LAYERS)]
    run_patched(model, encoded, donor, patches)
    # The donor's pass, this one's, and beside it the rows of the patches at layers 0, 1 and 2.
    assert sum(counted) == 2 * n_tokens + 3 * (n_tokens - question[0])


def test_what_cannot_be_put_in_is_refused(tmp_path):
    model, encoded, donor = setting("llava_next")
    other = encode(model, tiny_sample(tmp_path, size=(40, 80)))
    with pytest.raises(ValueError, match="pictures of one size"):
        run_patched(model, encoded, other, [])
    with pytest.raises(ValueError, match=r"layers \[4\] that aren't there"):
        run_patched(model, encoded, donor, [Patch(positions=(1,), layers=range(N_LAYERS + 1))])
    with pytest.raises(ValueError, match=r"positions \[\d+\] and"):
        run_patched(model, encoded, donor, [Patch(positions=(encoded.positions.n_tokens,), layers=range(1))])
