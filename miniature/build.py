"""The miniature's parts, untrained: tokenizer, processor and a LLaVA-1.5 of 3.6 million parameters.

Everything is the library's own class, so that what works on the miniature works on the real models.

Example:
    processor = build_processor(build_tokenizer(seed=0))
    model = build_model(processor.tokenizer, seed=0)
"""

from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from miniature.questions import GENERATORS, ask
from miniature.questions.extras import factual
from miniature.world import caption, sample_scene
from mmflow_utils.params import QUESTION_PROMPT as PROMPT

__all__ = ["PROMPT", "build_model", "build_processor", "build_tokenizer"]

IMAGE_SIZE, PATCH_SIZE = 112, 14  # pixels: 8 x 8 image tokens
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
VOCAB_SIZE = 440
MAX_TOKEN_LENGTH = 8  # characters: longer words, answers among them, fall into several sub-words
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]


def build_tokenizer(*, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer with Llama's conventions: a word carries the space before it (▁)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=[chr(c) for c in range(32, 127)] + ["\n", "▁"],
        max_token_length=MAX_TOKEN_LENGTH,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=1024,
    )


def _corpus(seed: int, n_scenes: int = 500) -> Iterator[str]:
    """Captions, prompts and answers of random scenes: the text that the tokenizer is trained on."""
    rng = np.random.default_rng(seed)
    for _ in range(n_scenes):
        scene = sample_scene(rng)
        yield caption(scene, rng)
        for generator in (*GENERATORS, factual):
            draft = ask(generator, scene, rng)
            if draft is not None:
                prompt = PROMPT.format(question=draft.text).replace("<image>", "")
                yield f"{prompt} {draft.answer.capitalize()}"
                yield f" {draft.answer}"


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Join the tokenizer to CLIP's image processor (PIL backend), resizing to 112 pixels."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=list(MEAN), image_std=list(STD)
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int, n_layers: int = 12) -> LlavaForConditionalGeneration:
    """Make a random LLaVA-1.5 of width 128: a CLIP tower of 6 layers, a Llama decoder of `n_layers`."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)
