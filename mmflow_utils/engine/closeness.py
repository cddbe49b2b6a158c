"""How close two ways to the same numbers must come; what is no number, or isn't close, stops a measurement."""

from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from mmflow_utils.models.adapter import VLM, compute_device
from mmflow_utils.prompts.encoding import Encoded

__all__ = ["check_close", "check_head", "need_numbers", "probabilities", "rounding"]


def rounding(dtype: torch.dtype) -> float:
    """Return the largest difference in probability that rounding alone may leave between two right answers.

    >>> rounding(torch.float32)
    0.0001
    """
    return {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-4)


def probabilities(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    """Return what logits say, in float64, so that a comparison adds no rounding of its own."""
    return logits.cpu().double().softmax(-1)


def need_numbers(encoded: Encoded, *logits: Tensor) -> None:
    """Refuse logits that hold NaN: what follows from them would look like a result."""
    if any(values.isnan().any() for values in logits):
        raise ValueError(
            f"Sample {encoded.sample.sample_id}: the model's logits hold NaN, no numbers: set dtype to "
            "float32 or bfloat16, or fetch the weights again."
        )


def check_close(
    encoded: Encoded,
    ours: Float[Tensor, "*shape"],
    plain: Float[Tensor, "*shape"],
    *,
    tolerance: float = inf,
    names: tuple[str, str] = ("The sweep", "full forward passes"),
    unit: str = "probability",
    advice: str = "set method='reference' for this model",
) -> float:
    """Compare what a fast way found on a prompt with what the plain way finds, and return the largest difference.

    Raises:
        ValueError: The difference is above the tolerance, or no number.
    """
    worst = (ours - plain).abs().max().item()
    if not worst <= tolerance:
        raise ValueError(
            f"{names[0]} and {names[1]} differ by {worst:.1e} in {unit} on sample {encoded.sample.sample_id}, "
            f"more than the tolerance of {tolerance:.1e}: {advice}."
        )
    return worst


def check_head(model: VLM, encoded: Encoded, stream: Float[Tensor, "n_read d"], own: Float[Tensor, "n_read vocab"]):
    """Refuse a model whose own logits are not the stream after its last layer, normed and unembedded."""
    need_numbers(encoded, own)
    ours = model.unembed(model.final_norm(stream.to(compute_device(model.final_norm), model.dtype)))
    names = ("Norm and unembedding", "the library's own output")
    advice = "the adapter doesn't fit this model, choose another"
    both = probabilities(ours), probabilities(own)
    check_close(encoded, *both, tolerance=rounding(model.dtype), names=names, advice=advice)
