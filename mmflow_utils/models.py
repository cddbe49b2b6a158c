"""The model adapter: the only file that knows where a family keeps its layers, norm, head and image token.

model = load_model(params)
model.n_layers, model.layers[3], model.unembed(model.final_norm(resid_post))
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

__all__ = ["VLM"]


@dataclass(frozen=True, kw_only=True)
class VLM:
    """A vision-language (or text-only) model with everything needed to ask it a question.

    Attributes:
        name: what figures and files call it.
        hf: the library's model, in evaluation mode.
        processor: picture and text to tensors; None for a text-only model.
        prompt: the template, with `{question}` and, if it sees pictures, `<image>`.
        do_pad: pad pictures to a square first, as LLaVA-1.5 was trained.
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
    def text(self) -> nn.Module:
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
