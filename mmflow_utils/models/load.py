"""Load a model from a folder or the hub; what can't be loaded says why in one sentence, network or not.

model = load_model(params)
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging

from mmflow_utils.models.adapter import FAMILIES, VLM, compute_device
from mmflow_utils.models.precision import find_device, weights_options
from mmflow_utils.params import ROOT

__all__ = ["find_checkpoint", "load_model", "pictures_only"]

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


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
            configuration, weights, tokenizer or processor; a family or a decoder that is not served; a device
            that isn't there; 8 or 4 bits where they can't be had.
    """
    device = find_device(params)
    folder = find_checkpoint(params.checkpoint, params.revision)
    config = _read_part(AutoConfig, folder, "a model configuration (config.json)")
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if sees and config.model_type not in FAMILIES:
        raise ValueError(
            f"Expected a vision-language model of a family that is served here ({', '.join(FAMILIES)}), but "
            f"{folder} holds {config.model_type!r}, whose picture path is not known: teach it to "
            "mmflow_utils/models/adapter.py and prove it in tests/test_families.py."
        )
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    hf = _read_weights(kind, folder, weights_options(params, device, kind, config))
    processor = _read_processor(folder, config) if sees else None
    tokenizer = processor.tokenizer if sees else _read_part(AutoTokenizer, folder, "a tokenizer")
    model = VLM(
        name=params.model,
        hf=hf,
        processor=processor,
        tokenizer=tokenizer,
        prompt=params.prompt,
        do_pad=params.do_pad,
        device=compute_device(hf.get_input_embeddings()),
        dtype=hf.dtype,
    )
    _check_decoder(model, folder)
    return model


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
    commit = f" (revision {revision})" if revision else ""
    where = f"{checkpoint!r}{commit} is neither a folder ({folder}) nor"
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
        fetched = Path(snapshot_download(checkpoint, revision=revision, allow_patterns=_FILES))
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{where}, and the hub refuses it (is the name right, and the revision?): {reason}") from None
    except (HTTPError, OSError) as error:
        raise ValueError(f"{where}, and the hub can't be reached ({type(error).__name__}): {advice}") from None
    if problem := _incomplete(fetched):
        raise ValueError(
            f"The hub's {checkpoint!r} has no {problem}: store it once with save_pretrained, which writes "
            "what is missing, and set `checkpoint` to that folder."
        )
    return fetched


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


def _read_weights(kind: type, folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    with _no_bar():
        hf, info = _read_part(
            kind,
            folder,
            "model weights",
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    # The library fills what a checkpoint lacks with random numbers and goes on.
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"Expected all of the model's weights in {folder}, but {len(missing)} are missing, {missing[0]} "
            "among them: is this checkpoint of the architecture that its config.json names?"
        )
    # An answer is what the model itself finds likeliest: checkpoints bring penalties and temperatures along.
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    hf.generation_config = GenerationConfig(**{name: getattr(hf.generation_config, name) for name in ids})
    # The library forgets which commit a folder of its cache holds; the manifest wants to know.
    hf.config._commit_hash = folder.name if folder.parent.name == "snapshots" else None
    return hf.eval().requires_grad_(False)


def _check_decoder(model: VLM, folder: Path) -> None:
    """Refuse a decoder that is no stack of attention and MLP with the parts that are intervened upon."""
    try:
        for layer in range(model.n_layers):
            model.mlp(layer), model.value_proj(layer), model.output_proj(layer)
    except AttributeError as error:
        raise ValueError(
            "Expected decoder layers of self-attention (v_proj, o_proj) and an MLP, but the model in "
            f"{folder}, a {model.hf.config.model_type!r}, is built otherwise: {error}."
        ) from None


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
    kind = PROCESSOR_MAPPING[type(config)]
    kind = pictures_only(kind) if "video_processor" in kind.get_attributes() else AutoProcessor
    processor = _read_part(kind, folder, "a processor")
    if not getattr(processor, "tokenizer", None) or not getattr(processor, "image_processor", None):
        raise ValueError(f"Expected a processor with a tokenizer and a picture processor in {folder}.")
    processor.image_processor = _read_part(AutoImageProcessor, folder, "a picture processor", backend="pil")
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
    if getattr(processor, "vision_feature_select_strategy", "") is None:
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's class token, which `default` drops again
    return processor


def pictures_only(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Leave out a processor class's part for videos: it needs torchvision, and no video is shown here."""

    class PicturesOnly(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: list, processor_dict: dict, **options: Any) -> ProcessorMixin:
            return super().from_args_and_dict([*args, None], processor_dict, **options)

    PicturesOnly.__name__ = kind.__name__  # it stands in the files that are stored
    return PicturesOnly
