"""What cutting a flow in one head would do, to first order: all heads of a prompt for one backward pass.

What leaves the head is exact: its edges are cut and its attention renormalizes, as in a knockout. What the answer makes
of that is read off the gradient, as if all later layers were linear: good for finding heads, not for measuring them.
"""

from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from mmflow_utils.engine.closeness import need_numbers
from mmflow_utils.engine.reference import intervene
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded
from mmflow_utils.prompts.flows import Variant

__all__ = ["attribute_heads"]


def attribute_heads(
    model: VLM, encoded: Encoded, *, source: tuple[int, ...], target: tuple[int, ...]
) -> Float[Tensor, "layers heads"]:
    """Return how the answer's log-probability (nats) would change, to first order, were a flow cut in one head alone.

    The answer is the token that the intact model finds most probable at the end. With g the gradient of its
    log-probability by what a head hands to the output projection, m, and m' the same with the edges cut, the change is
    g (m' - m), summed over the targets.
    """
    mixed, calls, found = [], [], []

    def see(_, args: tuple[Tensor]) -> tuple[Tensor]:
        # Weights are frozen, so the first layer's begins the graph.
        mixed.append(args[0] if args[0].requires_grad else args[0].detach().requires_grad_())
        return (mixed[-1],)

    with ExitStack() as hooks, torch.inference_mode(False), torch.enable_grad():
        for i, layer in enumerate(model.layers):
            see_call = layer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
            hooks.enter_context(see_call)
            hooks.enter_context(model.output_proj(i).register_forward_pre_hook(see))
        logits = model.hf(**encoded.inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
        need_numbers(encoded, logits)
        slopes = torch.autograd.grad(logits.float().log_softmax(-1).max(), mixed)
    for i, (args, kwargs) in enumerate(calls):
        cut = Variant(layers=range(i, i + 1), target=target, source=source)
        seen: list[Tensor] = []
        with torch.no_grad(), intervene(model, cut, encoded.positions.n_tokens):
            with model.output_proj(i).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])):
                model.layers[i](*args, **kwargs)
            change = (seen[0] - mixed[i]).float() * slopes[i].float()
        found.append(change[0, list(target)].sum(0).unflatten(-1, (model.n_heads, -1)).sum(-1).cpu())
    return torch.stack(found)
