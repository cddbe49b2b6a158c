"""The model adapter: the only file that knows where a family keeps its layers, norm, head and image token.

model = load_model(params)
logits = model.unembed(model.final_norm(resid_post))
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging

from mmflow_utils.params import ROOT

__all__ = ["VLM", "load_model"]

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True, kw_only=True)
class VLM:
    """A vision-language (or text-only) model with everything needed to ask it a question.

    Attributes:
        name: what figures and files call it.
        hf: the library's model, in evaluation mode.
        processor: picture and text to tensors; None for a text-only model.
        prompt: the template, with `{question}` and, if it sees pictures, `<image>`.
        do_pad: pad pictures to a square first, as LLaVA-1.5 was trained. Processors that cut a picture
            into any-resolution tiles do their own padding and are left alone.
    """

    name: str
    hf: PreTrainedModel
    processor: ProcessorMixin | None
    tokenizer: PreTrainedTokenizerBase
    prompt: str
    do_pad: bool
    device: torch.device
    dtype: torch.dtype

    @property
    def text(self) -> PreTrainedModel:
        """The decoder: token embeddings in, normed hidden states out."""
        return self.hf.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        return self.text.layers

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_heads(self) -> int:
        return self.text.config.num_attention_heads

    @property
    def final_norm(self) -> nn.Module:
        return self.text.norm

    @property
    def unembed(self) -> nn.Module:
        """The unembedding: final-normed residual stream to logits over the vocabulary."""
        return self.hf.get_output_embeddings()

    @property
    def image_token_id(self) -> int | None:
        """The id of the placeholder that picture features replace; None for a text-only model."""
        return getattr(self.hf.config, "image_token_id", None)

    @property
    def image_token(self) -> str:
        """The placeholder's text in this model's vocabulary; what `<image>` in the prompt becomes."""
        return getattr(self.processor, "image_token", "<image>")

    @property
    def image_patch_size(self) -> int:
        """Side of one image patch, in pixels of the processed picture."""
        return self.hf.config.vision_config.patch_size

    @property
    def has_tiles(self) -> bool:
        """True where the processor cuts a picture into any-resolution tiles, and pads them itself."""
        return hasattr(self.processor.image_processor, "image_grid_pinpoints")

    def attention(self, layer: int) -> nn.Module:
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
        """Give the first token of a word encoded alone, as answers and the logit lens count it (§7)."""
        return self.tokenizer.encode(word, add_special_tokens=False)[0]

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

        LLaVA's are in reading order. LLaVA-NeXT stitches its tiles together, cuts the padding away and ends
        each row with a newline token: the library's own packing does it here, and newlines come out NaN.
        """
        if not hasattr(self.hf, "pack_image_features"):
            return patches.flatten(0, 1)
        newline = torch.full((patches.shape[-1],), torch.nan)
        strategy = self.hf.config.vision_feature_select_strategy
        packed, _ = self.hf.pack_image_features(
            [patches],
            inputs["image_sizes"].cpu(),
            vision_feature_select_strategy=strategy,
            image_newline=newline,
        )
        return packed[0]


@torch.inference_mode()
def text_inputs(model: VLM, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """Run the whole model once and catch what its decoder is called with.

    Returns:
        The decoder's keyword arguments, with the picture's features already in `inputs_embeds`, so that it
        can be run again without the vision tower; and its output, the final-normed hidden states [1, N, d].
    """
    caught: dict[str, Any] = {}
    hook = model.text.register_forward_pre_hook(lambda _, __, kwargs: caught.update(kwargs), with_kwargs=True)
    try:
        hidden = model.hf.base_model(**inputs, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    return caught, hidden


def load_model(params: Any) -> VLM:
    """Load a model, from a folder or from the hub, ready to be studied.

    It comes in evaluation mode, without gradients, with PyTorch's fused attention and the PIL picture
    backend (pixels must not depend on whether torchvision is installed). Weights are read from safetensors
    only and code from a checkpoint is never run. A copy that is already on this machine is used as it is:
    the hub is asked only for what is missing.

    Args:
        params: anything with the attributes `model, checkpoint, revision, prompt, do_pad, dtype, device,
            device_map` of `Params`.

    Raises:
        ValueError: no such folder and no such name on the hub; the hub can't be reached; a folder without
            configuration, weights, tokenizer or processor; a device that isn't there.
    """
    device = _find_device(params.device)
    folder = find_checkpoint(params.checkpoint, params.revision)
    config = _read_part(AutoConfig, folder, "a model configuration (config.json)")
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    hf = _read_weights(AutoModelForImageTextToText if sees else AutoModelForCausalLM, folder, params)
    processor = _read_processor(folder, config) if sees else None
    tokenizer = processor.tokenizer if sees else _read_part(AutoTokenizer, folder, "a tokenizer")
    return VLM(
        name=params.model,
        hf=hf if params.device_map else hf.to(device),
        processor=processor,
        tokenizer=tokenizer,
        prompt=params.prompt,
        do_pad=params.do_pad,
        device=hf.device if params.device_map else device,
        dtype=hf.dtype,
    )


def find_checkpoint(checkpoint: str, revision: str | None = None) -> Path:
    """Give the local folder of a checkpoint; fetch it from the hub if it is on neither disk nor cache.

    One short question to the hub comes before any download, so that without a network there is one clear
    sentence at once and not a series of retries. `HF_HUB_OFFLINE=1` skips the question.

    Raises:
        ValueError: see `load_model`.
    """
    folder = ROOT / checkpoint
    if folder.is_dir():
        if problem := _incomplete(folder):
            raise ValueError(f"Expected a model in the folder {folder}, but it has no {problem}.")
        return folder
    where = f"{checkpoint!r} is neither a folder ({folder}) nor"
    try:
        cached = Path(snapshot_download(checkpoint, revision=revision, local_files_only=True))
        if not _incomplete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise ValueError(f"{where} a name that the Hugging Face hub could know (owner/name).") from None
    where += " complete in the local Hugging Face cache"
    advice = "download it once on a machine with a network, or set `checkpoint` to a folder that holds it."
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{where}, and HF_HUB_OFFLINE forbids asking the hub: {advice}")
    try:
        HfApi().model_info(checkpoint, revision=revision, timeout=10)
        return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=_FILES))
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{where}, and the hub refuses it (is the name right?): {reason}") from None
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"{where}, and the hub can't be reached ({type(error).__name__}): {advice}"
        ) from None


def _incomplete(folder: Path) -> str | None:
    """Name the first thing a model folder lacks, or None."""
    if not (folder / "config.json").is_file():
        return "config.json"
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} (weights are read from safetensors only)"
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return None if any((folder / name).is_file() for name in tokenizers) else "tokenizer.json"


def _read_part(kind: type, folder: Path, what: str, **options: Any) -> Any:
    """Read one part of a checkpoint, or say in one sentence which part could not be read."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # what a broken file raises depends on where it is broken
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"Expected {what} in {folder}, but it can't be read: {reason}") from error


def _read_weights(kind: type, folder: Path, params: Any) -> PreTrainedModel:
    with _no_bar():
        hf, info = _read_part(
            kind,
            folder,
            "model weights",
            dtype=getattr(torch, params.dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            device_map=params.device_map,
            output_loading_info=True,
        )
    # The library fills what a checkpoint lacks with random numbers and goes on.
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"Expected all of the model's weights in {folder}, but {len(missing)} are missing, {missing[0]} "
            "among them: is this checkpoint of the architecture that its config.json names?"
        )
    return hf.eval().requires_grad_(False)


@contextmanager
def _no_bar() -> Iterator[None]:
    # Its timings would stand in every committed notebook, different each time.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _read_processor(folder: Path, config: PreTrainedConfig) -> ProcessorMixin:
    """Read the processor with the PIL backend; fill in the geometry that old checkpoints leave out."""
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise ValueError(
            f"Expected a picture processor in {folder} (processor_config.json or preprocessor_config.json), "
            "but there is none: copy it from the checkpoint that the weights came from."
        )
    processor = _read_part(AutoProcessor, folder, "a processor")
    if not getattr(processor, "tokenizer", None) or not getattr(processor, "image_processor", None):
        raise ValueError(f"Expected a processor with a tokenizer and a picture processor in {folder}.")
    processor.image_processor = _read_part(AutoImageProcessor, folder, "a picture processor", backend="pil")
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
    if getattr(processor, "vision_feature_select_strategy", "") is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's class token, which `default` drops again
    return processor


def _find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Expected a device that PyTorch can use here, got {name!r}: {reason}") from None
    return device
