"""The shapes of the models in params/, as their configurations on the hub give them; what is left out is the
library's default. A test holds the numbers of parameters against those that the hub states.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


@dataclass(frozen=True)
class Shape:
    """A model's configuration, with `model_type`, and its picture processor with what it is called with."""

    config: dict[str, Any]
    images: BaseImageProcessor | None = None
    options: dict[str, Any] = field(default_factory=dict)


def _decoder(kind: str, width: int, mlp: int, layers: int, heads: int, key_heads: int, words: int, **more: Any):
    return dict(
        model_type=kind, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=words, **more,
    )  # fmt: skip


def _tower(width: int, mlp: int, layers: int, *, size: int, **more: Any):
    heads = dict(num_attention_heads=16, image_size=size, patch_size=14)
    return dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, **heads | more)


CLIP = _tower(1024, 4096, 24, size=336, model_type="clip_vision_model", projection_dim=768)
SIGLIP = dict(width=1152, mlp=4304, layers=27)
VICUNA_7B = _decoder("llama", 4096, 11008, 32, 32, 32, 32064)
VICUNA_13B = _decoder("llama", 5120, 13824, 40, 40, 40, 32064)
LLAMA3_8B = _decoder("llama", 4096, 14336, 32, 32, 8, 128320)
GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SQUARE = {"height": 336, "width": 336}


def _llava(text: dict[str, Any]) -> Shape:
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE)
    return Shape(dict(model_type="llava", text_config=text, vision_config=CLIP, image_token_id=32000), images)


def _llava_next(text: dict[str, Any], image_token_id: int = 32000) -> Shape:
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=SQUARE, image_grid_pinpoints=GRID)
    shared = dict(vision_config=CLIP, image_token_id=image_token_id, image_grid_pinpoints=GRID)
    return Shape(dict(model_type="llava_next", text_config=text, **shared), images)


_QWEN = dict(
    model_type="qwen2_5_vl",
    text_config=_decoder("qwen2_5_vl_text", 3584, 18944, 28, 28, 4, 152064)
    | dict(rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
    vision_config=dict(hidden_size=1280, out_hidden_size=3584),
    image_token_id=151655,
    tie_word_embeddings=False,
)
_INTERNVL = dict(
    model_type="internvl",
    text_config=_decoder("qwen2", 3584, 18944, 28, 28, 4, 151674),
    vision_config=dict(attention_bias=True),
    tie_word_embeddings=False,
)
_GEMMA = dict(
    model_type="gemma3",
    text_config=_decoder("gemma3_text", 2560, 10240, 34, 8, 4, 262208, head_dim=256, sliding_window=1024),
    vision_config=_tower(**SIGLIP, size=896, model_type="siglip_vision_model", vision_use_head=False),
    mm_tokens_per_image=256,
    image_token_index=262144,
)
_SMOLVLM = dict(
    model_type="idefics3",
    text_config=_decoder("llama", 2048, 8192, 24, 32, 32, 49155),
    vision_config=_tower(**SIGLIP, size=384, model_type="idefics3_vision"),
    image_token_id=49153,
    scale_factor=3,
)
_INTERNVL_TILES = {"height": 448, "width": 448}

SHAPES = {
    "llava-1.5-7b": _llava(VICUNA_7B),
    "llava-1.5-13b": _llava(VICUNA_13B),
    "llava-v1.6-vicuna-7b": _llava_next(VICUNA_7B),
    "llava-v1.6-vicuna-13b": _llava_next(VICUNA_13B),
    "llama3-llava-next-8b": _llava_next(LLAMA3_8B, image_token_id=128256),
    "vicuna-13b-v1.5": Shape(VICUNA_13B | {"vocab_size": 32000}),
    "qwen2.5-vl-7b": Shape(_QWEN, Qwen2VLImageProcessorPil()),
    "internvl3-8b": Shape(
        _INTERNVL,
        GotOcr2ImageProcessorPil(size=_INTERNVL_TILES, max_patches=12),
        {"crop_to_patches": True},  # as the processor of this family calls it
    ),
    "gemma-3-4b": Shape(_GEMMA, Gemma3ImageProcessorPil(size={"height": 896, "width": 896})),
    "smolvlm-2b": Shape(
        _SMOLVLM, Idefics3ImageProcessorPil(size={"longest_edge": 1536}, max_image_size={"longest_edge": 384})
    ),
}


def shrunk(shape: Shape) -> Shape:
    """Return two layers and a narrow decoder and tower in place of the true ones; the tokens stay."""
    config = deepcopy(shape.config)
    text = config.get("text_config", config)
    text |= dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    text |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    if "rope_parameters" in text:
        text["rope_parameters"]["mrope_section"] = [4, 6, 6]
    if vision := config.get("vision_config"):
        vision |= dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
        if "out_hidden_size" in vision:
            vision |= dict(out_hidden_size=64, depth=2, num_heads=2)
    return replace(shape, config=config)
