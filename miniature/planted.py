"""A LLaVA-1.5 with weights set by hand: its routes are known, so it shows whether the instrument reads true.

It answers which of two colors a thing has ("Is the cup red or blue?"), by two steps and no others:

1. In layer `PICK_UP` each color word of the question attends to the image patches of its color, and notes
   that it found some. Where there are none it attends to the first token and notes nothing.
2. In layer `ANSWER` the last position attends to the color words that found something, and copies which they
   are.

All other layers pass the residual stream on. Where both colors are in the picture it can't tell them apart:
those questions it gets right by luck. The vision tower hands each patch's mean color to the projector, which
measures how far it is from the region of each of the six colors.

    model, processor = build_planted()
"""

import string
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from miniature.build import PROMPT
from miniature.questions import GENERATORS, ask
from miniature.world import COLORS, SIZE, sample_scene

__all__ = ["ANSWER", "PICK_UP", "build_planted", "save_planted"]

N_LAYERS, PICK_UP, ANSWER = 8, 2, 5
PATCH = 16  # pixels: 14 x 14 image tokens
D_MODEL, D_HEAD = 64, 32
SHARP = 60.0  # attention scores differ by half of this between what is meant and what isn't

# Dimensions of the residual stream. One is the same everywhere and much larger than all others together, so
# the norms scale all positions alike: a normed state is the state times KEEP.
CONST, LARGE = 0, 64.0
KEEP = D_MODEL**0.5 / LARGE
FIRST, IMAGE, LAST, FOUND, DONE = 1, 2, 3, 4, 5
NEAR, WORD, CHOSEN = range(8, 14), range(16, 22), range(24, 30)  # one dimension for each color

# A color is where all of these hold; each is (r, g, b, least), on 0 to 255: r*R + g*G + b*B >= least.
# Differences of channels rather than points: wood, metal and wool darken a color.
REGIONS = {
    "red": ((1, -1, 0, 85), (1, 0, -1, 85)),
    "green": ((-1, 1, 0, 62), (0, 1, -1, 62)),
    "blue": ((-1, 0, 1, 90), (0, -1, 1, 60)),
    "yellow": ((1, 0, -1, 115), (0, 1, -1, 80), (-1, 1, 0, -58)),
    "purple": ((1, -1, 0, 40), (0, -1, 1, 70)),
    "white": ((-1, 0, 1, -12), (1, 0, -1, -12), (1, 0, 0, 186)),
}
SOFT = 12.0  # color levels from just inside a region to clearly outside


def build_planted() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build the model and its processor."""
    tokenizer = _tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        image_size=SIZE, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=D_MODEL, intermediate_size=D_MODEL, num_hidden_layers=N_LAYERS, num_attention_heads=2,
        num_key_value_heads=2, head_dim=D_HEAD, vocab_size=len(tokenizer), max_position_embeddings=1024,
        rms_norm_eps=1e-6, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # So large that half of the rotary dimensions hardly turn: attention by content can be written down.
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIZE // PATCH) ** 2, vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.fill_(float(name.endswith("norm.weight") or name.endswith("layrnorm.weight")))
    _plant_eye(model)
    _plant_words(model, tokenizer)
    _plant_pick_up(model.model.language_model.layers[PICK_UP].self_attn)
    _plant_answer(model.model.language_model.layers[ANSWER].self_attn)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    side = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=side, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model, processor


def save_planted(folder: Path) -> None:
    """Write model and processor as a checkpoint folder."""
    model, processor = build_planted()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token, as the miniature world's questions have them; so is "ASSISTANT:"."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            *(pre_tokenizers.Split(mark, "isolated") for mark in "?.,"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
        ]
    )
    words = {color.capitalize() for color in COLORS} | set(COLORS) | set(string.punctuation)
    for question in _questions():
        pieces = split.pre_tokenize_str(PROMPT.format(question=question))
        words |= {piece.strip("▁") for piece, _ in pieces}
    words = sorted(words - {"", "\n"})
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    words = [*special, "\n", "▁", *words, *("▁" + word for word in words)]
    vocab = {word: n for n, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = split
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, model_max_length=1024,
    )  # fmt: skip


def _questions(n_scenes: int = 200) -> list[str]:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(n_scenes)]
    drafts = [ask(generator, scene, rng) for scene in scenes for generator in GENERATORS]
    return [draft.text for draft in drafts if draft is not None]


def _plant_eye(model: LlavaForConditionalGeneration) -> None:
    """Mean color of each patch -> how far from each region (0: inside, -1 or less: outside)."""
    small, zero = (
        0.01,
        3,
    )  # a small part of a vector: LayerNorm, which divides by its spread, is all but linear
    tower = model.model.vision_tower.embeddings
    for channel in range(3):
        tower.patch_embedding.weight[channel, channel] = small / PATCH**2
    sides = torch.tensor([1.0, -1.0]).repeat(6)
    tower.position_embedding.weight[:, 4:] = sides
    spread = (len(sides) / 16) ** 0.5
    projector = model.model.multi_modal_projector
    unit, steep = 0, 100.0  # GELU is a ramp for arguments as large as these
    for near, region in zip(NEAR, REGIONS.values(), strict=True):
        for *weights, least in region:
            # The miss (least - value) / SOFT, cut off at 1: ramp(miss) - ramp(miss - 1).
            for shift in (0.0, 1.0):
                for channel, weight in enumerate(weights):
                    step = -steep * weight * 255 / SOFT * spread / small
                    projector.linear_1.weight[unit, channel] = step
                    projector.linear_1.weight[unit, zero] -= step
                projector.linear_1.bias[unit] = steep * (least / SOFT - shift)
                projector.linear_2.weight[near, unit] = (-1.0 if shift == 0 else 1.0) / steep
                unit += 1
    projector.linear_2.bias[[CONST, IMAGE]] = torch.tensor([LARGE, 1.0])


def _plant_words(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Embeddings say what a token is; the unembedding reads what has been chosen."""
    embed, unembed = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    vocab = tokenizer.get_vocab()
    embed[:, CONST] = LARGE
    embed[tokenizer.bos_token_id, FIRST] = 1
    embed[[vocab["ASSISTANT:"], vocab["▁ASSISTANT:"]], LAST] = 1
    logit = 20 / KEEP
    for color, word, chosen in zip(COLORS, WORD, CHOSEN, strict=True):
        embed[[vocab[color], vocab["▁" + color]], word] = 1
        embed[[vocab[color.capitalize()], vocab["▁" + color.capitalize()]], DONE] = 1
        unembed[vocab["▁" + color.capitalize()], chosen] = logit
    unembed[tokenizer.eos_token_id, DONE] = logit


def _slots(attention: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the first head's projections, as views: query and key in eight dimensions that hardly turn."""
    hardly = slice(D_HEAD // 4, D_HEAD // 2)
    query, key, value = (p.weight[:D_HEAD] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    return query[hardly], key[hardly], value, attention.o_proj.weight[:, :D_HEAD]


def _plant_pick_up(attention: torch.nn.Module) -> None:
    """A color word looks for patches of its color; every other token looks at the first token."""
    query, key, value, out = _slots(attention)
    strong = SHARP * D_HEAD**0.5 / KEEP
    for slot, (near, word) in enumerate(zip(NEAR, WORD, strict=True)):
        query[slot, word] = strong
        # Patches: 0 inside the color's region, -1 or less outside; the first token -0.5; text -5.
        key[slot, near] = 1 / KEEP
        key[slot, [CONST, IMAGE, FIRST]] = torch.tensor([-5 / LARGE, 5.0, 4.5]) / KEEP
        query[6, word] = -strong
    query[6, CONST] = strong / LARGE
    key[6, FIRST] = 1 / KEEP
    value[0, IMAGE] = 1 / KEEP
    out[FOUND, 0] = 1


def _plant_answer(attention: torch.nn.Module) -> None:
    """The last position looks for color words that found something; every other token at the first token."""
    query, key, value, out = _slots(attention)
    strong = SHARP * D_HEAD**0.5 / KEEP
    query[0, LAST] = strong
    # A color word that found something: 0.5; the first token 0; a color word that didn't -0.5; others less.
    key[0, [CONST, FIRST, FOUND]] = torch.tensor([-1.5 / LARGE, 1.5, 1.0]) / KEEP
    query[1, CONST], query[1, LAST] = strong / LARGE, -strong
    key[1, FIRST] = 1 / KEEP
    for slot, (word, chosen) in enumerate(zip(WORD, CHOSEN, strict=True)):
        key[0, word] = 1 / KEEP
        value[slot, word] = 1 / KEEP
        out[chosen, slot] = 1
