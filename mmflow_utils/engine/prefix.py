"""What prompts begin with alike is run once: keys and values of a picture, for all questions about it.

prefix = Prefix()
run_sweep(model, first, planned, prefix=prefix)      # in full
run_sweep(model, second, planned, prefix=prefix)     # from where it differs from the first
"""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from mmflow_utils.engine.closeness import check_head, probabilities, rounding
from mmflow_utils.engine.reference import Run, collect_stream
from mmflow_utils.models.adapter import VLM, decoder_inputs, text_inputs
from mmflow_utils.prompts.encoding import Encoded

__all__ = ["Prefix", "Uncut", "run_clean"]

# Whether a decoder that goes on from stored keys gives what it gives in one go: found out once for each model.
_PROVEN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Uncut(LookupError):
    """An argument of a decoder belongs to a whole prompt, such as what Qwen3-VL adds to a picture in later layers."""


class Prefix:
    """Keys and values of the last prompt that was run in full, for prompts that begin as it does.

    One prompt's are held at a time, so visit questions picture by picture. What comes before a position depends on
    nothing behind it, so they are exactly those of the other prompt; a model of which that isn't true is found out
    on the first prompt that shares (`fits`) and run in full from then on.
    """

    def __init__(self) -> None:
        self.owner: nn.Module | None = None  # whose keys and values they are
        self.inputs: dict[str, Tensor] = {}
        self.layers: list[tuple[Tensor, Tensor]] = []  # rotated keys and values, each [key_heads, pos, d_head]

    def remember(self, model: VLM, inputs: Mapping[str, Tensor], layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Hold what a full pass computed, in place of what was held before."""
        self.owner, self.inputs, self.layers = model.hf, dict(inputs), list(layers)

    def common(self, model: VLM, inputs: Mapping[str, Tensor], most: int) -> int:
        """Return how many positions from the first on, at most `most`, a prompt shares with the one held.

        0 where models or pictures differ, or where so few are shared that nothing is gained.
        """
        ids = inputs["input_ids"][0]
        if self.owner is not model.hf or inputs.keys() != self.inputs.keys():
            return 0
        runs_along = inputs["input_ids"].shape, self.inputs["input_ids"].shape
        for name, tensor in inputs.items():
            held = self.inputs[name]
            if (tensor.shape, held.shape) != runs_along and not (tensor is held or torch.equal(tensor, held)):
                return 0
        length = min(len(ids) - 1, self.inputs["input_ids"].shape[1], most)
        same = ids[:length] == self.inputs["input_ids"][0, :length]
        n_same = int(same.int().cumprod(0).sum())
        return n_same if n_same > len(ids) // 4 else 0

    def decoder_arguments(self, model: VLM, inputs: Mapping[str, Tensor], start: int) -> dict[str, Any]:
        """Return what the decoder is called with to go on from position `start`.

        The library makes its arguments for the whole prompt, as ever, and the shared positions are cut away.

        Raises:
            Uncut: An argument of which it isn't known how to cut it.
        """
        # A picture that lies before `start` isn't looked at again.
        again = model.image_token_id in inputs["input_ids"][0, start:].tolist()
        kwargs = decoder_inputs(model, {k: v for k, v in inputs.items() if again or not k.startswith("pixel")})
        n_tokens = inputs["input_ids"].shape[1]
        cut = {name: _from(start, n_tokens, name, value) for name, value in kwargs.items()}
        layers: list[Any] = [_Beginning(key[None, :, :start], value[None, :, :start]) for key, value in self.layers]
        return cut | {"past_key_values": Cache(layers=layers), "use_cache": True}

    def go_on(self, model: VLM, inputs: Mapping[str, Tensor], start: int, rows: slice) -> Tensor:
        """Run a prompt from position `start` on, and return the logits at some of the decoder's rows."""
        return model.unembed(model.text(**self.decoder_arguments(model, inputs, start)).last_hidden_state[0, rows])

    def fits(self, model: VLM, inputs: Mapping[str, Tensor], start: int) -> bool:
        """Tell whether going on from stored keys gives this model's own output; tried once for each model."""
        if model.hf not in _PROVEN:
            try:
                ours = self.go_on(model, inputs, start, slice(-1, None))
            except Uncut:
                return False
            self.compare(model, ours, text_inputs(model, inputs)[1])
        return _PROVEN[model.hf]

    def compare(self, model: VLM, ours: Tensor, plain: Tensor) -> bool:
        """Hold logits that rest on stored keys against those of a full pass; where they differ, none will share."""
        worst = (probabilities(ours) - probabilities(plain)).abs().max().item()
        _PROVEN[model.hf] = worst <= rounding(model.dtype)
        return _PROVEN[model.hf]


@torch.inference_mode()
def run_clean(model: VLM, encoded: Encoded, prefix: Prefix) -> Run:
    """Run a prompt as it is, from where it differs from the one before, and return what is found at `last`.

    Raises:
        ValueError: As from `run_reference`.
    """
    inputs, last = encoded.inputs, encoded.positions.last
    start = prefix.common(model, inputs, last)
    if start and prefix.fits(model, inputs, start):
        with collect_stream(model, [last - start]) as stream:
            logits = prefix.go_on(model, inputs, start, slice(last - start, last - start + 1))
    else:
        cache = DynamicCache()
        with collect_stream(model, [last]) as stream:
            logits = model.hf(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0]
        check_head(model, encoded, stream[-1], logits)
        prefix.remember(model, inputs, [(keys[0], values[0]) for keys, values, *_ in cache])
    return Run.from_parts(encoded, logits.float().cpu(), [], stream, one=True)


class _Beginning(DynamicLayer):
    """A layer's cache that is read and never grows, so that it serves one prompt after the other."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the stored keys and values with the new ones behind them."""
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def _from(start: int, n_tokens: int, name: str, value: Any) -> Any:
    """Cut an argument of the decoder down to the positions from `start` on."""
    if name == "attention_mask":
        return _mask_from(start, n_tokens, value)
    if name == "inputs_embeds" and value is not None:
        return value[:, start:]
    if name in ("input_ids", "position_ids", "cache_position") and value is not None:
        return value[..., start:]
    if name == "past_key_values" or not isinstance(value, Tensor | list | tuple | dict):
        return value
    raise Uncut(name)


def _mask_from(start: int, n_tokens: int, mask: Any) -> Any:
    if isinstance(mask, dict):  # one for each kind of layer, made already: None means causal
        places = [one.device for one in mask.values() if one is not None]
        causal = torch.ones(1, 1, n_tokens, n_tokens, dtype=torch.bool, device=next(iter(places), None)).tril()
        return {kind: _mask_from(start, n_tokens, causal if one is None else one) for kind, one in mask.items()}
    return mask[:, :, start:] if mask is not None and mask.ndim == 4 else mask
