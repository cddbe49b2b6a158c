"""Checkpoints that are not whole: a PEFT adapter over its base, a LLaVA without its language model, a GGUF file.

hf = merge_adapter(hf, folder)
"""

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mmflow_utils.models.sources import find_checkpoint, gguf_file, read_json, reason_of

__all__ = ["adapter_base", "language_weights", "merge_adapter"]


def adapter_base(folder: Path) -> str | None:
    """Return the checkpoint that a PEFT adapter was trained over, or None where the folder holds no adapter.

    Raises:
        ValueError: An adapter that isn't merged exactly into matrices, or that names no base.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    if config.get("peft_type") not in ("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "BOFT", "IA3"):
        raise ValueError(
            f"Expected in {folder} an adapter that can be merged into the weights, such as LoRA, got "
            f"{config.get('peft_type')!r}: it changes the prompt or the layers, so positions and flows would differ."
        )
    if not config.get("base_model_name_or_path"):
        raise ValueError(f"{file} names no base_model_name_or_path: write the base's folder or hub name there.")
    if not (folder / "adapter_model.safetensors").is_file():  # peft would take pickled ones
        raise ValueError(f"Expected adapter_model.safetensors in {folder} (weights are read from safetensors only).")
    return config["base_model_name_or_path"]


def merge_adapter(hf: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge a PEFT adapter into a model's weights: W + scale B A, in the weights' own precision.

    Raises:
        ValueError: Quantized weights, into which nothing can be merged exactly; an adapter whose matrices
            don't fit the base, or of which a part finds no place in it.
    """
    from peft import PeftModel, get_peft_model_state_dict  # seconds to import, and few models need it

    # Weights of a GGUF file are whole numbers no more once they are loaded.
    if getattr(hf, "is_quantized", False) and getattr(hf, "quantization_method", None) != "gguf":
        raise ValueError(f"The adapter in {folder} can't be merged exactly into quantized weights: set dtype: float32.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the base by its name, which is loaded already
        try:
            adapted = PeftModel.from_pretrained(hf, str(folder))
        except Exception as error:  # what a file that doesn't fit raises depends on where it doesn't
            raise ValueError(f"The adapter in {folder} doesn't fit its base: {reason_of(error)[:200]}") from None
        taken = get_peft_model_state_dict(adapted)
    # PEFT only warns of weights that find no place.
    if lost := sorted(load_file(folder / "adapter_model.safetensors").keys() ^ taken.keys()):
        raise ValueError(f"The adapter in {folder} doesn't fit its base: {len(lost)} weights, such as {lost[0]}.")
    return adapted.merge_and_unload(safe_merge=True)


def language_weights(checkpoint: str) -> dict[str, Tensor]:
    """Return a language model's weights by the names that they have inside a LLaVA, in float32.

    Raises:
        ValueError: See `find_checkpoint`.
    """
    folder = find_checkpoint(checkpoint)
    options = dict(gguf_file=gguf_file(folder), dtype=torch.float32, local_files_only=True)
    alone = AutoModelForCausalLM.from_pretrained(folder, **options)
    weights = {f"model.language_model.{name}": tensor for name, tensor in alone.base_model.state_dict().items()}
    return weights | {"lm_head.weight": alone.get_output_embeddings().weight.detach()}
