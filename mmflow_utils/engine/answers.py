"""Answers to several questions about one picture at once: what they share is run once, the rest side by side.

tokens = answer_together(model, prompts, prefix=Prefix())
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mmflow_utils.engine.closeness import need_numbers
from mmflow_utils.engine.packed_pass import ENOUGH_ROWS
from mmflow_utils.engine.prefix import Prefix, run_clean
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded

__all__ = ["answer_together", "greedy_answer"]

# What a checkpoint's generation settings may say without changing which token greedy decoding takes.
_HARMLESS = {
    "bos_token_id", "cache_implementation", "do_sample", "eos_token_id", "max_length", "max_new_tokens", "pad_token_id",
    "temperature", "top_k", "top_p", "transformers_version", "use_cache", "_from_model_config",
}  # fmt: skip


@torch.inference_mode()
def greedy_answer(model: VLM, encoded: Encoded, *, max_new_tokens: int = 8) -> list[int]:
    """Return the tokens that the library's own greedy decoding gives one prompt."""
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    made = model.hf.generate(**encoded.inputs, **options, output_logits=True, return_dict_in_generate=True)
    need_numbers(encoded, *made.logits)
    return made.sequences[0, encoded.inputs["input_ids"].shape[1] :].tolist()


@torch.inference_mode()
def answer_together(
    model: VLM, prompts: Sequence[Encoded], prefix: Prefix, *, max_new_tokens: int = 8
) -> list[list[int]]:
    """Return what `greedy_answer` gives each of several prompts, for the price of little more than one.

    The first prompt is run in full. What all begin with is taken from it; what they don't share stands side by side
    in one sequence, in which each token attends to the shared beginning and to its own prompt's, so nothing is
    padded. Where the model can't be run so, or the outcome isn't that of the full pass, each is answered alone.

    Raises:
        ValueError: NaN among the logits.
    """
    said: list[list[int]] = []
    while len(prompts) - len(said) > 1 and _can_pack(model):
        left = prompts[len(said) :]
        whole = run_clean(model, left[0], prefix)
        shared = min(prefix.common(model, p.inputs, p.positions.last) for p in left)
        if not shared or not prefix.fits(model, left[1].inputs, shared):
            break
        some = _as_many_as_fit(left, shared)
        side_by_side = _SideBySide(model, some, prefix, shared)
        logits = side_by_side.read_prompts()
        if not prefix.compare(model, logits[:1], whole.base[None]):
            break
        said += side_by_side.decode(logits, max_new_tokens)
    alone = prompts[len(said) :]
    return said + [greedy_answer(model, encoded, max_new_tokens=max_new_tokens) for encoded in alone]


def _as_many_as_fit(prompts: Sequence[Encoded], shared: int) -> Sequence[Encoded]:
    """Take so many prompts that their rows are no more than a full pass has, or `ENOUGH_ROWS`."""
    lengths = [prompt.inputs["input_ids"].shape[1] - shared for prompt in prompts]
    most = max(ENOUGH_ROWS, shared + lengths[0])
    return prompts[: max(1, sum(total <= most for total in accumulate(lengths)))]


def _can_pack(model: VLM) -> bool:
    """Tell whether one mask serves all layers, and greedy decoding is all that the checkpoint's settings ask for."""
    config, settings = model.text.config, model.hf.generation_config.to_diff_dict()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    asked = {name for name, value in settings.items() if value not in (None, 1.0, False)}
    return kinds == {"full_attention"} and not slides and asked <= _HARMLESS


class _SideBySide:
    """Several prompts behind their shared beginning, in one sequence."""

    def __init__(self, model: VLM, prompts: Sequence[Encoded], prefix: Prefix, shared: int):
        self.model, self.prompts = model, prompts
        self.parts = [prefix.decoder_arguments(model, prompt.inputs, shared) for prompt in prompts]
        self.cache = DynamicCache([(key[None, :, :shared], value[None, :, :shared]) for key, value in prefix.layers])
        self.owners = torch.full((shared,), -1)  # whose key each one is; -1: everybody's

    def read_prompts(self) -> Float[Tensor, "prompts vocab"]:
        """Run what the prompts don't share, and return the logits behind each."""
        starts = len(self.owners)
        lengths = [prompt.inputs["input_ids"].shape[1] - starts for prompt in self.prompts]
        places = [
            torch.arange(starts, starts + n)[None] if part.get("position_ids") is None else part["position_ids"].cpu()
            for part, n in zip(self.parts, lengths, strict=True)
        ]
        self.next_place = torch.cat([place[..., -1:] + 1 for place in places], dim=-1)
        owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        name = "input_ids" if self.parts[0].get("inputs_embeds") is None else "inputs_embeds"
        given = {name: torch.cat([part[name] for part in self.parts], dim=1)}
        ends = torch.tensor(lengths).cumsum(0) - 1
        return self._run(given, owners, torch.cat(places, dim=-1), ends)

    def decode(self, logits: Float[Tensor, "prompts vocab"], max_new_tokens: int) -> list[list[int]]:
        """Take the most probable token of each prompt, step by step, until each has ended."""
        ends = self.model.hf.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        said: list[list[int]] = [[] for _ in self.prompts]
        going = list(range(len(self.prompts)))
        for step in range(max_new_tokens):
            for n, row in zip(going, logits, strict=True):
                need_numbers(self.prompts[n], row)
                said[n].append(int(row.argmax()))
            going = [n for n in going if said[n][-1] not in ends]
            if not going or step == max_new_tokens - 1:
                break
            tokens = torch.tensor([[said[n][-1] for n in going]], device=self.model.device)
            places = self.next_place[..., going] + step
            logits = self._run({"input_ids": tokens}, torch.tensor(going), places, torch.arange(len(going)))
        return said

    def _run(
        self,
        given: dict[str, Tensor],
        owners: Int[Tensor, " rows"],
        places: Int[Tensor, "*axes rows"],
        read: Int[Tensor, " prompts"],
    ) -> Float[Tensor, "prompts vocab"]:
        """Run some rows, each of one prompt and at its place in it, and return the logits at those to read."""
        model, before = self.model, len(self.owners)
        self.owners = torch.cat([self.owners, owners])
        # Each row sees the shared beginning, and of the rest what is its own and not after it.
        own = (self.owners == -1) | (self.owners == owners[:, None])
        earlier = torch.arange(len(self.owners)) <= before + torch.arange(len(owners))[:, None]
        with model.attention_kernel("sdpa"):  # takes a mask of yes and no
            out = model.text(
                **given,
                position_ids=places.to(model.device),
                attention_mask=(own & earlier)[None, None].to(model.device),
                past_key_values=self.cache,
                use_cache=True,
            )
        return model.unembed(out.last_hidden_state[0, read.to(out.last_hidden_state.device)]).float().cpu()
