"""In which precision weights are kept, and where: what the library is told before it reads any.

device = find_device(params)
AutoModelForCausalLM.from_pretrained(folder, **weights_options(params, device, kind, config))
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

__all__ = ["find_device", "weights_options"]

# What bitsandbytes does to a decoder's matrices, and the precision that everything else is computed in.
QUANTIZED: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "int8": (dict(load_in_8bit=True), torch.float16),
    "nf4": (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), torch.bfloat16),
}


def find_device(params: Any) -> torch.device:
    """Give the device that parameters ask for, and refuse a precision that can't be had there.

    Raises:
        ValueError: a device that isn't there; 8 or 4 bits without bitsandbytes or without a CUDA device.
    """
    name = params.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Expected a device that PyTorch can use here, got {name!r}: {reason}") from None
    if params.dtype in QUANTIZED:
        _check_quantization(params.dtype, device)
    return device


def weights_options(params: Any, device: torch.device, kind: Any, config: PreTrainedConfig) -> dict[str, Any]:
    """Give `from_pretrained` its precision and placement.

    Weights go straight to their device, one after another: no copy of the whole model is made on the way. `params` is
    anything with the attributes `dtype, device_map` of `Params`, `kind` the automatic class that will read the weights.
    """
    place = {"device_map": params.device_map or {"": device}}
    if params.dtype not in QUANTIZED:
        return place | {"dtype": getattr(torch, params.dtype)}
    weights, dtype = QUANTIZED[params.dtype]
    outside = _outside_decoder(kind, config)
    how = BitsAndBytesConfig(**weights, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=outside)
    return place | {"dtype": dtype, "quantization_config": how}


def _outside_decoder(kind: Any, config: PreTrainedConfig) -> list[str]:
    """Name the matrices that are no part of the decoder's layers: the picture's path and the unembedding."""
    with torch.device("meta"):
        skeleton = kind.from_config(config)
    inside = {*skeleton.get_decoder().modules()}
    named = skeleton.named_modules()
    return [name for name, module in named if isinstance(module, nn.Linear) and module not in inside]


def _check_quantization(dtype: str, device: torch.device) -> None:
    instead = "or set dtype to bfloat16, whose results differ from those of quantized weights"
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"dtype {dtype} needs bitsandbytes, which isn't here: pip install bitsandbytes, {instead}.")
    if device.type != "cuda":
        raise ValueError(
            f"dtype {dtype} needs a CUDA device, but this run would be on {device}: run it on a machine with "
            f"one and set device to auto or cuda, {instead}."
        )
