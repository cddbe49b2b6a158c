"""The other ways to run variants, to measure the sweep against; each gives logits at the last position."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmflow_utils.engine.packed_pass import layer_kwargs_at
from mmflow_utils.engine.reference import intervene
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded
from mmflow_utils.prompts.flows import Variant

__all__ = ["BASELINES", "has_nnsight"]

Logits = Float[Tensor, " vocab"]
BATCH = 8  # variants in one batched forward pass


def everything(model: VLM, encoded: Encoded, variants: Sequence[Variant], inputs: Mapping) -> Iterator[Logits]:
    """The authors' way: the whole model anew for each variant, picture and all."""
    for variant in variants:
        with intervene(model, variant, encoded.positions.n_tokens):
            yield model.hf(**encoded.inputs, use_cache=False, logits_to_keep=1).logits[0, -1]


def decoder(model: VLM, encoded: Encoded, variants: Sequence[Variant], inputs: Mapping) -> Iterator[Logits]:
    """Full forward passes of the decoder; the picture's features are computed once."""
    for variant in variants:
        with intervene(model, variant, encoded.positions.n_tokens):
            yield model.unembed(model.text(**inputs).last_hidden_state[0, -1])


def batched(model: VLM, encoded: Encoded, variants: Sequence[Variant], inputs: Mapping) -> Iterator[Logits]:
    """The same, several variants in a batch, each with its own mask in each layer."""
    for first in range(0, len(variants), BATCH):
        some = variants[first : first + BATCH]
        inputs_of_all = {**inputs, "inputs_embeds": inputs["inputs_embeds"].expand(len(some), -1, -1)}
        inputs_of_all["attention_mask"] = None

        def change(layer: int, args: tuple, kwargs: dict, some=some) -> tuple[tuple, dict]:
            mask = torch.stack([_mask(v, encoded.positions.n_tokens, layer in v.layers) for v in some])
            return args, kwargs | {"attention_mask": mask[:, None].to(args[0].device)}

        with ExitStack() as stack:
            for i, layer in enumerate(model.layers):
                hook = layer.register_forward_pre_hook(
                    lambda _, args, kwargs, i=i: change(i, args, kwargs), with_kwargs=True
                )
                stack.enter_context(hook)
            hidden = model.text(**inputs_of_all).last_hidden_state
        yield from model.unembed(hidden[:, -1])


def suffix(model: VLM, encoded: Encoded, variants: Sequence[Variant], inputs: Mapping) -> Iterator[Logits]:
    """One clean pass with a cache; then, for each variant, its rows from its window's first layer on."""
    clean: list[tuple[Tensor, dict]] = []
    with ExitStack() as stack:
        for layer in model.layers:
            stack.enter_context(
                layer.register_forward_pre_hook(lambda _, args, kw: clean.append((args[0], kw)), with_kwargs=True)
            )
        cache = model.text(**{**inputs, "use_cache": True}).past_key_values
    n_tokens = encoded.positions.n_tokens
    for variant in variants:
        low = variant.target[0]
        kwargs = layer_kwargs_at(clean[0][1], list(range(low, n_tokens)))
        hidden = clean[variant.layers.start][0][:, low:]
        for i in range(variant.layers.start, model.n_layers):
            mask = _mask(variant, n_tokens, i in variant.layers)[low:]
            prefix = _Prefix(cache.layers[i].keys[:, :, :low], cache.layers[i].values[:, :, :low])
            hidden = model.layers[i](hidden, **kwargs | {"attention_mask": mask[None, None], "past_key_values": prefix})
        yield model.unembed(model.final_norm(hidden[0, -1]))


def nnsight(model: VLM, encoded: Encoded, variants: Sequence[Variant], inputs: Mapping) -> Iterator[Logits]:
    """Full forward passes of the decoder through nnsight, one trace for each variant."""
    from nnsight import NNsight

    traced = NNsight(model.text)
    n_tokens = encoded.positions.n_tokens
    for variant in variants:
        mask = _mask(variant, n_tokens, True)[None, None]
        first, after = variant.layers.start, variant.layers.stop
        with traced.trace(**inputs):
            for layer in traced.layers[first:after]:
                args, kwargs = layer.inputs
                layer.inputs = (args, {**kwargs, "attention_mask": mask})
            hidden = traced.output.last_hidden_state.save()
        yield model.unembed(hidden[0, -1])


def has_nnsight() -> bool:
    return importlib.util.find_spec("nnsight") is not None


class _Prefix:
    """As much of a cache as a decoder layer uses: clean keys and values before those of the layer's rows."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


def _mask(variant: Variant, n_tokens: int, holds: bool) -> Bool[Tensor, "n n"]:
    """Return who may attend to whom: causal, without a variant's edges where it holds."""
    mask = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
    if holds:
        mask[torch.tensor(variant.target)[:, None], torch.tensor(variant.source)] = False
    return mask


BASELINES = {
    "everything anew": everything,
    "full forwards": decoder,
    "batched forwards": batched,
    "cache + suffix": suffix,
    "nnsight": nnsight,
}
