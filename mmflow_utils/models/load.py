"""Load a model from a folder or the hub; what can't be loaded says why in one sentence, network or not.

model = load_model(params)
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.utils import logging

from mmflow_utils.models.adapter import FAMILIES, VLM, compute_device, decoder_inputs
from mmflow_utils.models.partial import adapter_base, language_weights, merge_adapter
from mmflow_utils.models.precision import find_device, weights_options
from mmflow_utils.models.sources import find_checkpoint, gguf_file, reason_of

__all__ = ["load_model", "load_without_weights", "pictures_only"]

_FUSED = {"attn_implementation": "sdpa"}  # a stored choice would hold in the parts that store one


@contextmanager
def _library_quiet() -> Iterator[None]:
    """Keep bars, whose timings would stand in committed notebooks, and long reports from coming before one sentence."""
    bars, verbosity, gguf_bar = logging.is_progress_bar_enabled(), logging.get_verbosity(), gguf_reader.tqdm
    logging.disable_progress_bar()
    gguf_reader.tqdm = lambda tensors, **_: tensors  # a bar that the library's own switch doesn't reach
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        gguf_reader.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@_library_quiet()
def load_model(params: Any) -> VLM:
    """Load a model, from a folder or from the hub, ready to be studied.

    It comes in evaluation mode, without gradients, with PyTorch's fused attention and the PIL picture
    backend (pixels must not depend on whether torchvision is installed). Weights are read from safetensors
    only and code from a checkpoint is never run. A copy that is already on this machine is used as it is:
    the hub is asked only for what is missing. A PEFT adapter is merged into its base; a LLaVA that was stored
    without its language model gets it from `language_model`.

    Args:
        params: `Params`, or anything with its attributes `model` to `device_map`; `language_model` may be missing.

    Raises:
        ValueError: no such folder and no such name on the hub; the hub can't be reached; a folder without
            configuration, weights, tokenizer or processor; a family or a decoder that is not served; a device
            that isn't there; 8 or 4 bits where they can't be had; an adapter that can't be merged exactly.
    """
    device = find_device(params)
    adapter = folder = find_checkpoint(params.checkpoint, params.revision)
    base = adapter_base(adapter)
    if base and not (folder / "config.json").is_file():
        folder = find_checkpoint(base)
    config, kind = _read_config(folder)
    options = weights_options(params, device, kind, config) | _FUSED | dict(gguf_file=gguf_file(folder), config=config)
    if language_model := getattr(params, "language_model", None):
        kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), kind)
        stored = {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}
        options["state_dict"] = stored | language_weights(language_model)
    hf = _read_weights(kind, folder, options)
    if base:
        hf = merge_adapter(hf, adapter)
    model = _with_words(params, hf, folder)
    _check_decoder(model, folder)
    if model.processor is not None:
        _check_picture(model, folder)
    return model


@_library_quiet()
def load_without_weights(params: Any, folder: Path) -> VLM:
    """Load all but the weights of a folder, which may lack them: prompts can be made, and counted, but not run."""
    config, kind = _read_config(folder)
    with torch.device("meta"):
        return replace(_with_words(params, kind.from_config(config), folder), device=torch.device("cpu"))


def _read_config(folder: Path) -> tuple[PreTrainedConfig, Any]:
    """Read a configuration, and name the automatic class that makes its model."""
    what = "a model configuration (config.json)"
    config: Any = _read_part(AutoConfig, folder, what, gguf_file=gguf_file(folder), **_FUSED)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return config, AutoModelForCausalLM
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"Expected a vision-language model of a family that is served here ({', '.join(FAMILIES)}), but "
            f"{folder} holds {config.model_type!r}, whose picture path is not known: teach it to "
            "mmflow_utils/models/adapter.py and prove it in tests/models/test_families.py."
        )
    return config, AutoModelForImageTextToText


def _with_words(params: Any, hf: PreTrainedModel, folder: Path) -> VLM:
    """Give a model what turns pictures and words into its inputs."""
    sees = type(hf.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    processor: Any = _read_processor(folder, hf.config) if sees else None
    words: Any = dict(what="a tokenizer", gguf_file=gguf_file(folder))
    tokenizer = processor.tokenizer if sees else _read_part(AutoTokenizer, folder, **words)
    _check_pieces(tokenizer, folder)
    return VLM(
        name=params.model,
        hf=hf,
        processor=processor,
        tokenizer=tokenizer,
        prompt=params.prompt,
        do_pad=params.do_pad,
        device=compute_device(hf.get_input_embeddings()),
        dtype=hf.dtype,
    )


def _read_part(kind: Any, folder: Path, what: str, **options: Any) -> Any:
    """Read one part of a checkpoint, or say in one sentence which part could not be read."""
    options = {name: value for name, value in options.items() if value is not None}
    source = None if "state_dict" in options else folder  # weights that were put together have no folder
    try:
        return kind.from_pretrained(source, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # what a broken file raises depends on where it is broken
        raise ValueError(f"Expected {what} in {folder}, but it can't be read: {reason_of(error)}") from None


def _read_weights(kind: Any, folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    shown = dict(use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)  # those are told below
    hf, info = _read_part(kind, folder, "model weights", **shown, **options)
    if other := sorted(info["mismatched_keys"]):
        (name, stored, built), n = other[0], len(other)
        raise ValueError(
            f"Expected weights of the shapes that config.json asks for in {folder}, but {n} have others, such as "
            f"{name} ({tuple(stored)}, not {tuple(built)}): is config.json another model's?"
        )
    # The library fills what a checkpoint lacks with random numbers and goes on.
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"Expected all of the model's weights in {folder}, but {len(missing)} are missing, {missing[0]} "
            "among them: is this checkpoint of the architecture that its config.json names?"
        )
    strays = [name for name in info["unexpected_keys"] if re.search(r"(layers|blocks?)\.\d", name)]
    strays = [name for name in strays if not name.endswith("inv_freq")]  # old checkpoints store a constant
    if strays:  # it would read a model of fewer layers, or of other ones, without a word
        raise ValueError(
            f"{folder} holds {len(strays)} weights of layers that its config.json has no place for, such as "
            f"{min(strays)}: is config.json another model's, or are these an adapter's without adapter_config.json?"
        )
    # An answer is what the model itself finds likeliest: checkpoints bring penalties and temperatures along.
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    hf.generation_config = GenerationConfig(**{name: getattr(hf.generation_config, name) for name in ids})
    for part in hf.modules():  # a checkpoint may say how it wants to hand things out, too
        if isinstance(config := getattr(part, "config", None), PreTrainedConfig):
            config.return_dict = True
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


def _check_pieces(tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer made of sentencepiece's file that cuts text otherwise: the library may mistake its kind."""
    file = folder / "tokenizer.model"
    if not file.is_file() or (folder / "tokenizer.json").is_file():
        return
    text = "Is the cup left or right of it?\nLeft"
    if tokenizer.encode(text, add_special_tokens=False) != SentencePieceProcessor(str(file)).encode(text):
        raise ValueError(
            f"Expected a tokenizer that cuts text as {file} does, but the library makes another of it: name its "
            "tokenizer_class (LlamaTokenizer, say) in tokenizer_config.json."
        )


def _read_processor(folder: Path, config: PreTrainedConfig) -> ProcessorMixin:
    """Read the processor with the PIL backend; fill in the geometry that old checkpoints leave out."""
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise ValueError(
            f"Expected a picture processor in {folder} (processor_config.json or preprocessor_config.json), "
            "but there is none: copy it from the checkpoint that the weights came from."
        )
    kind: Any = PROCESSOR_MAPPING[type(config)]
    kind = pictures_only(kind) if "video_processor" in kind.get_attributes() else AutoProcessor
    processor = _read_part(kind, folder, "a processor")
    if not getattr(processor, "tokenizer", None) or not getattr(processor, "image_processor", None):
        raise ValueError(f"Expected a processor with a tokenizer and a picture processor in {folder}.")
    processor.image_processor = _read_part(AutoImageProcessor, folder, "a picture processor", backend="pil")
    if hasattr(processor, "num_additional_image_tokens"):  # the tower decides, whatever a file says or leaves out
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = _beside_patches(config.vision_config)
    return processor


def _beside_patches(config: PreTrainedConfig) -> int:
    """Count what a vision tower gives beside its patches: CLIP a class token, SigLIP nothing."""
    picture = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
    with torch.device("meta"):
        given = AutoModel.from_config(config, attn_implementation="sdpa")(picture)[0]
    return given.shape[1] - (config.image_size // config.patch_size) ** 2


def _check_picture(model: VLM, folder: Path) -> None:
    """Refuse parts that don't see a picture alike: the library would stop at the first prompt."""
    try:
        made = model.processor(images=Image.new("RGB", (64, 48)), text=model.image_token, return_tensors="pt")
        inputs = {k: t.to(model.device, model.dtype if t.is_floating_point() else None) for k, t in made.items()}
        decoder_inputs(model, inputs)
    except Exception as error:  # what doesn't fit shows in many ways
        raise ValueError(
            f"Expected a picture processor and a vision tower that cut a picture alike in {folder}, but they don't "
            f"(vision_feature_select_strategy, patch_size or the picture's size is to blame): {reason_of(error)}"
        ) from None


def pictures_only(kind: Any) -> type[ProcessorMixin]:
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
