"""Random small models of every family with a prompt, and what it means that two engines agree on it."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tiny import tiny_pair, vlm_of_kind

from mmflow_utils.prompts.encoding import encode

N_LAYERS = N_HEADS = 4
KINDS = ("llava", "llava-gqa", "llava_next", "llama", "sliding", "idefics3", "qwen2_5_vl", "internvl")
KINDS += ("qwen3_vl", "llava_onevision")
TOLERANCE = 1e-5  # in probability: rounding of float32


@cache
def setting(kind: str, dtype: torch.dtype = torch.float32):
    """Give a random model and a prompt for it."""
    options = {"n_layers": N_LAYERS, "dtype": dtype}
    if kind == "llama":
        options["prompt"] = "USER: {question} ASSISTANT:"
    model = vlm_of_kind(kind, **options)
    with TemporaryDirectory() as folder:
        return model, encode(model, tiny_pair(Path(folder)))


def probs(logits):
    return logits.softmax(-1)


def farthest(a, b) -> float:
    return float((probs(a) - probs(b)).abs().max())


def assert_same(run, plain):
    assert run.variants.shape == plain.variants.shape
    torch.testing.assert_close(probs(run.base), probs(plain.base), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(probs(run.variants), probs(plain.variants), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(run.resid_post, plain.resid_post, atol=1e-4, rtol=1e-4)
