"""The families beyond LLaVA: each a tiny model of its own configuration class, with its own processor class.

Every processor cuts a picture in its family's own way; sizes are small enough that a test is a second.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from mmflow_utils.models.load import pictures_only

PATCH_SIZE, MERGED = 6, 2  # so an image token is a square of 12 processed pixels
TOKEN_SIZE = PATCH_SIZE * MERGED
TILE_SIZE = 24
VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)

Built = tuple[PreTrainedModel, ProcessorMixin]


@dataclass(frozen=True)
class Family:
    """How to build one.

    Attributes:
        build: the decoder's shape and the tokenizer to model and processor.
        named: the tokenizer's tokens that the processor asks for by name.
        more: its other tokens about a picture.
    """

    build: Callable[[Mapping[str, Any], Any], Built]
    named: Mapping[str, str]
    more: tuple[str, ...] = field(default=())


def _idefics3(shape: Mapping[str, Any], tokenizer: Any) -> Built:
    return _tiles_and_overview(
        shape,
        tokenizer,
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )


def _smolvlm(shape: Mapping[str, Any], tokenizer: Any) -> Built:
    return _tiles_and_overview(
        shape,
        tokenizer,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessorPil,
        lambda *parts, **options: pictures_only(SmolVLMProcessor)(*parts, None, **options),
    )


def _tiles_and_overview(shape, tokenizer, config, model, images, processor) -> Built:
    hf = model(
        config(
            text_config=LlamaConfig(**shape),
            vision_config=VISION | dict(image_size=TILE_SIZE, patch_size=PATCH_SIZE),
            image_token_id=tokenizer.image_token_id,
            scale_factor=MERGED,
        )
    )
    cut = images(size={"longest_edge": 2 * TILE_SIZE}, max_image_size={"longest_edge": TILE_SIZE})
    return hf, processor(cut, tokenizer, image_seq_len=(TILE_SIZE // TOKEN_SIZE) ** 2)


def _gemma3(shape: Mapping[str, Any], tokenizer: Any) -> Built:
    side = 2 * TILE_SIZE
    n_tokens = (side // TOKEN_SIZE) ** 2
    n_layers = shape["num_hidden_layers"]
    text = Gemma3TextConfig(
        **shape,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=20,  # longer than the picture's rows, shorter than picture and question
        layer_types=["full_attention" if n % 2 else "sliding_attention" for n in range(n_layers)],
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**VISION, image_size=side, patch_size=PATCH_SIZE, vision_use_head=False),
        mm_tokens_per_image=n_tokens,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        tie_word_embeddings=False,  # tied, a random model answers with its last token whatever is cut
    )
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=n_tokens)
    return Gemma3ForConditionalGeneration(config), processor


def _qwen2_5_vl(shape: Mapping[str, Any], tokenizer: Any) -> Built:
    of_tower = {"window_size": TILE_SIZE, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(**_qwen_parts(shape, tokenizer, of_tower))
    return Qwen2_5_VLForConditionalGeneration(config), _qwen_processor(Qwen2_5_VLProcessor, tokenizer)


def _qwen3_vl(shape: Mapping[str, Any], tokenizer: Any) -> Built:
    """Features of two of its tower's layers are added to what leaves the decoder's first two."""
    of_tower = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = Qwen3VLConfig(**_qwen_parts({**shape, "head_dim": 8}, tokenizer, of_tower))
    return Qwen3VLForConditionalGeneration(config), _qwen_processor(Qwen3VLProcessor, tokenizer)


def _qwen_parts(shape: Mapping[str, Any], tokenizer: Any, of_tower: Mapping[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
    vision = dict(
        depth=2,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        patch_size=PATCH_SIZE,
        spatial_merge_size=MERGED,
        temporal_patch_size=2,
        out_hidden_size=shape["hidden_size"],
    )
    return dict(
        text_config=dict(shape) | {"rope_parameters": rope},
        vision_config=vision | of_tower,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )


def _qwen_processor(kind: type[ProcessorMixin], tokenizer: Any) -> ProcessorMixin:
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE, merge_size=MERGED, size={"shortest_edge": 30**2, "longest_edge": 60**2}
    )
    return pictures_only(kind)(images, tokenizer)


def _llava_onevision(shape: Mapping[str, Any], tokenizer: Any) -> Built:
    grid = [[TILE_SIZE, 2 * TILE_SIZE], [2 * TILE_SIZE, TILE_SIZE], [2 * TILE_SIZE, 2 * TILE_SIZE]]
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**shape),
        vision_config=SiglipVisionConfig(**VISION, image_size=TILE_SIZE, patch_size=PATCH_SIZE, vision_use_head=False),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=grid,
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": TILE_SIZE, "width": TILE_SIZE}, image_grid_pinpoints=grid)
    n_tokens = (TILE_SIZE // PATCH_SIZE) ** 2
    options = {"num_image_tokens": n_tokens, "vision_feature_select_strategy": "full"}
    processor = pictures_only(LlavaOnevisionProcessor)(images, tokenizer, **options)
    return LlavaOnevisionForConditionalGeneration(config), processor


def _internvl(shape: Mapping[str, Any], tokenizer: Any) -> Built:
    config = InternVLConfig(
        text_config=Qwen2Config(**shape),
        vision_config=InternVLVisionConfig(
            **VISION, image_size=[TILE_SIZE, TILE_SIZE], patch_size=[PATCH_SIZE, PATCH_SIZE]
        ),
        image_token_id=tokenizer.context_image_token_id,
        downsample_ratio=1 / MERGED,
    )
    images = GotOcr2ImageProcessorPil(size={"height": TILE_SIZE, "width": TILE_SIZE}, max_patches=4)
    n_tokens = (TILE_SIZE // TOKEN_SIZE) ** 2
    processor = pictures_only(InternVLProcessor)(images, tokenizer, image_seq_length=n_tokens)
    return InternVLForConditionalGeneration(config), processor


_MARKS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
_MARKS += tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))

FAMILIES = {
    "idefics3": Family(_idefics3, {"image_token": "<image>"}, _MARKS),
    "smolvlm": Family(_smolvlm, {"image_token": "<image>"}, _MARKS),
    "gemma3": Family(
        _gemma3,
        {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    ),
    "qwen2_5_vl": Family(
        _qwen2_5_vl,
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        ("<|vision_start|>", "<|vision_end|>"),
    ),
    "qwen3_vl": Family(
        _qwen3_vl,
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        ("<|vision_start|>", "<|vision_end|>"),
    ),
    "llava_onevision": Family(_llava_onevision, {"image_token": "<image>", "video_token": "<video>"}),
    "internvl": Family(
        _internvl,
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
}
