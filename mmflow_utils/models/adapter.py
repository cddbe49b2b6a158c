"""The model adapter: the only file that knows where a family keeps its layers, norm, head and image token.

logits = model.unembed(model.final_norm(resid_post))
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from math import isqrt
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["FAMILIES", "VLM", "compute_device", "decoder_inputs", "picture_features", "text_inputs"]

FAMILIES = (
    "gemma3", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm",
)  # fmt: skip
"""Families, by `model_type`, whose picture path is proven (tests/models/test_families.py); others are refused."""


@dataclass(frozen=True, kw_only=True)
class VLM:
    """A vision-language (or text-only) model with everything needed to ask it a question.

    Attributes:
        name: what figures and files call it.
        hf: the library's model, a `PreTrainedModel` in evaluation mode. Which parts it has depends on the family.
        processor: picture and text to tensors, a `ProcessorMixin`; None for a text-only model.
        tokenizer: the library's, a fast one.
        prompt: the template, with `{question}` and, if it sees pictures, `<image>`.
        do_pad: pad pictures to a square first, as LLaVA-1.5 was trained. Processors that cut a picture
            into any-resolution tiles do their own padding and are left alone.
    """

    name: str
    hf: Any
    processor: Any
    tokenizer: Any
    prompt: str
    do_pad: bool
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def text(self) -> Any:
        """The decoder: token embeddings in, normed hidden states out."""
        return self.hf.get_decoder()

    @property
    def layers(self) -> Any:
        return self.text.layers

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_heads(self) -> int:
        return self.text.config.num_attention_heads

    @property
    def final_norm(self) -> Any:
        return self.text.norm

    @property
    def unembed(self) -> "Unembedding":
        """The unembedding: final-normed residual stream to logits over the vocabulary."""
        return Unembedding(self.hf)

    @property
    def image_token_id(self) -> int | None:
        """The id of the placeholder that picture features replace; None for a text-only model."""
        return getattr(self.hf.config, "image_token_id", None)

    @property
    def image_token(self) -> str:
        """The placeholder's text in this model's vocabulary; what `<image>` in the prompt becomes."""
        return getattr(self.processor, "image_token", "<image>")

    @property
    def n_merged(self) -> int:
        """How many of the vision tower's patches, along each side, the projector makes one image token of."""
        config, vision = self.hf.config, self.hf.config.vision_config
        if hasattr(config, "mm_tokens_per_image"):  # Gemma 3 averages
            return vision.image_size // vision.patch_size // isqrt(config.mm_tokens_per_image)
        if hasattr(config, "downsample_ratio"):  # InternVL; a share, not a number
            return round(1 / config.downsample_ratio)
        return getattr(config, "scale_factor", getattr(vision, "spatial_merge_size", 1))

    @property
    def image_patch_size(self) -> int:
        """Side of one image patch, the piece of the picture behind one token, in processed pixels."""
        size = self.hf.config.vision_config.patch_size
        return self.n_merged * (size if isinstance(size, int) else size[0])

    @property
    def has_tiles(self) -> bool:
        """True where the processor may cut a picture into tiles, and sees to its proportions by itself."""
        signs = ("image_grid_pinpoints", "do_image_splitting", "crop_to_patches")
        return any(hasattr(self.processor.image_processor, sign) for sign in signs)

    @property
    def overview_tile(self) -> int:
        """Which of several tiles shows the whole picture: the first one where tiles are stitched, else the last."""
        return 0 if hasattr(self.hf, "pack_image_features") else -1

    def attention(self, layer: int) -> Any:
        return self.layers[layer].self_attn

    def mlp(self, layer: int) -> nn.Module:
        return self.layers[layer].mlp

    def value_proj(self, layer: int) -> nn.Module:
        """The map from a position to its values, all key-value heads side by side."""
        return self.attention(layer).v_proj

    def output_proj(self, layer: int) -> nn.Module:
        """The map from the heads' mixed values, side by side, to the attention's output."""
        return self.attention(layer).o_proj

    def first_token_id(self, word: str) -> int:
        """Give the first token of a word as an answer begins with it, which is what the paper's lens counts (§7).

        With the paper's models that is the first token of the word encoded alone. Other tokenizers tell
        " Yes" from "Yes": behind a prompt that doesn't end in white space an answer begins with the former.
        """
        return self.first_token_ids(word)[0]

    def first_token_ids(self, word: str) -> tuple[int, ...]:
        """Give the first token of a word as an answer begins with it, then as running text has it, behind a space.

        A language model thinks in the latter even where an answer begins a line: in " Cup", or in " C", if the answer
        begins with "C". Each token comes once; where a prompt doesn't end in white space, there is one.
        """
        if not self.prompt[-1].isspace():
            return (self._token_behind(f"{self.prompt[-1]} ", word),)
        own = self._token_behind("\n", word)
        piece = self.tokenizer.decode([own])
        spaced = [self._token_behind(": ", text) for text in (word, piece) if text.isprintable() and text.strip()]
        return tuple(dict.fromkeys([own, *spaced]))

    def _token_behind(self, before: str, word: str) -> int:
        cut = self.tokenizer(before + word, add_special_tokens=False, return_offsets_mapping=True)
        tokens = zip(cut["input_ids"], cut["offset_mapping"], strict=True)
        return next(token for token, (_, stop) in tokens if stop > len(before))

    @contextmanager
    def attention_kernel(self, name: str) -> Iterator[None]:
        """Run the decoder with another attention implementation (`eager` shows the patterns) for a while."""
        before = self.text.config._attn_implementation
        self.text.set_attn_implementation(name)
        try:
            yield
        finally:
            self.text.set_attn_implementation(before)

    def in_token_order(
        self, patches: Float[Tensor, "tiles patches k"], inputs: Mapping[str, Tensor]
    ) -> Float[Tensor, "image_tokens k"]:
        """Lay out values that belong to patches of the picture as the model lays out its image tokens.

        Most are in reading order, tile after tile. LLaVA-NeXT and OneVision stitch tiles together, cut the padding
        away and end each row with a newline token: the library's own packing does it here, and newlines come out NaN.
        """
        if not hasattr(self.hf, "pack_image_features"):
            return patches.flatten(0, 1)
        pack, newline = self.hf.base_model.pack_image_features, torch.full((patches.shape[-1],), torch.nan)
        names = {"vision_feature_select_strategy", "vision_aspect_ratio"} & {*signature(pack).parameters}
        options = {name: getattr(self.hf.config, name) for name in names}
        return pack([patches], inputs["image_sizes"].cpu(), image_newline=newline, **options)[0][0]

    def tiles(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "tiles 3 height width"]:
        """Give the processed picture as pictures; the patches that Qwen's processor cuts are put together."""
        pixels = inputs["pixel_values"]
        if "image_grid_thw" not in inputs:
            return pixels.reshape(-1, *pixels.shape[-3:])
        _, n_rows, n_columns = inputs["image_grid_thw"][0].tolist()
        cut = self.processor.image_processor
        merged, side = cut.merge_size, cut.patch_size
        blocks = pixels.reshape(n_rows // merged, n_columns // merged, merged, merged, 3, -1, side, side)
        still = blocks[:, :, :, :, :, 0]  # a picture is a film in which nothing moves
        return still.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, n_rows * side, n_columns * side)


class Unembedding(nn.Module):
    """Final-normed states to logits by the library's own model: its matrix, and the scale, cap or mask after it."""

    def __init__(self, hf: Any):
        super().__init__()
        self.matrix = hf.get_output_embeddings()
        self._whole = [hf]  # in a list, as it is no part of this

    @property
    def weight(self) -> Tensor:
        return self.matrix.weight

    def forward(self, states: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows vocab"]:
        """Run the library's model over these states in place of its decoder's."""
        (hf,), flat = self._whole, states.to(compute_device(self)).reshape(1, -1, states.shape[-1])
        before = vars(hf.base_model).get("forward")  # accelerate puts its own there
        hf.base_model.forward = lambda *_, **__: _States(last_hidden_state=flat)
        try:
            logits = hf(inputs_embeds=flat, use_cache=False).logits
        finally:
            del hf.base_model.forward
            if before:
                hf.base_model.forward = before
        return logits.reshape(*states.shape[:-1], -1)


class _States(SimpleNamespace):
    """What a decoder hands out: its states, and nothing else."""

    def __getitem__(self, _: Any) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, _: str) -> None:
        return None


def compute_device(module: nn.Module) -> torch.device:
    """Tell where a module computes: accelerate fetches weights that lie on disk or in CPU memory there."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    place = next((place for place in places if place is not None), None)
    return next(module.parameters(), torch.empty(0)).device if place is None else torch.device(place)


@torch.inference_mode()
def text_inputs(
    model: VLM, inputs: Mapping[str, Tensor], read: Sequence[int] = (-1,)
) -> tuple[dict[str, Any], Float[Tensor, "n_read vocab"]]:
    """Run the library's whole model once and catch what its decoder is called with.

    Returns:
        The decoder's keyword arguments, with the picture's features already in `inputs_embeds`, so that it
        can be run again without the vision tower; and the library's own logits at the positions to read.
    """
    caught: dict[str, Any] = {}
    with model.text.register_forward_pre_hook(lambda _, __, kwargs: caught.update(kwargs), with_kwargs=True):
        logits = model.hf(**inputs, use_cache=False, logits_to_keep=torch.tensor(read)).logits[0]
    return caught, logits


@torch.inference_mode()
def decoder_inputs(model: VLM, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Catch what the library's whole model calls its decoder with, and leave before the decoder runs."""
    caught: dict[str, Any] = {}

    def leave(_: nn.Module, args: tuple, kwargs: dict) -> None:
        caught.update(kwargs)
        raise _Left

    with suppress(_Left), model.text.register_forward_pre_hook(leave, with_kwargs=True):
        model.hf(**inputs, use_cache=False)
    return caught


class _Left(Exception):
    """Leaves the library's model where its decoder would begin."""


@torch.inference_mode()
def picture_features(model: VLM, inputs: Mapping[str, Tensor]) -> Float[Tensor, "tiles patches d_vision"]:
    """Give the vision tower's features of a prompt's picture, as the projector receives them (App. E).

    Raises:
        ValueError: the projector joins several patches in one token, so that no token has a patch's features.
    """
    if model.n_merged > 1:
        raise ValueError(
            f"Expected a model with an image token for each patch of its vision tower, but {model.name} "
            f"joins {model.n_merged} x {model.n_merged} of them in one: App. E can't be asked of it."
        )
    caught: list[Tensor] = []
    projector = model.hf.base_model.multi_modal_projector
    with projector.register_forward_pre_hook(lambda _, args: caught.append(args[0])):
        model.hf.get_image_features(**{k: inputs[k] for k in ("pixel_values", "image_sizes") if k in inputs})
    return torch.cat(caught)
