"""`mini-next`: a LLaVA-NeXT with grouped-query attention, made of `mini`'s weights and trained on.

LLaVA-NeXT shows a picture twice: the whole of it, and cut into tiles at a higher resolution, with a newline
token at the end of each row. Tower, projector and decoder begin as `mini`'s. The key and value heads are
averaged in pairs, each shared by two query heads, and training goes on from there (Ainslie et al. 2023).

Example:
    model, processor = begin(NEXT_RECIPE)
    trainer = Trainer(model, processor, NEXT_RECIPE, Path("outputs/mini-next/training"))
    trainer.tower()
    trainer.joint()
    save_miniature(trainer, Path("assets/mini-next"))
"""

import copy

import torch
from transformers import (
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from miniature.after_text import give_reader
from miniature.build import IMAGE_SIZE, MEAN, PATCH_SIZE, STD, build_model, build_processor, build_tokenizer
from miniature.train import Recipe
from miniature.world import FRAMES
from mmflow_utils.params import ROOT

__all__ = ["NEXT_RECIPE", "begin", "build_next_processor", "give_tiles"]

# The tower learns tiles at a third of mini's rate. With it mini itself still answers as well as before.
NEXT_RECIPE = Recipe(
    begins_with="assets/mini",
    frames=FRAMES,
    tower_batch=16,
    tower_held=100,
    tower_lr=1e-3,
    text_steps=0,
    align_steps=0,
    joint_steps=4200,
    # Made longer on the way: which of two things in the picture has a property was still guessed. From step
    # 3400 on it is asked more often.
    joint_rates=((0, 0, 2400), (1500, 0, 3400), (3400, 3200, 1400), (4000, 3700, 500)),
    more=((3400, "categoryThatChoose"),) * 2 + ((3400, "categoryThat"),) * 2,
    louder=(),
    read_steps=0,
)

# Height and width of what the tiles are cut from, in tiles: those of LLaVA-NeXT.
GRID = [[IMAGE_SIZE * n for n in shape] for shape in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
SHARED_BY = 2  # query heads to a key and value head


def begin(recipe: Recipe) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return the model that a recipe trains, as it is before, and its processor."""
    if recipe.begins_with is None:
        processor = build_processor(build_tokenizer(seed=recipe.seed))
        return build_model(processor.tokenizer, seed=recipe.seed), processor
    folder = ROOT / recipe.begins_with
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mini = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    if recipe.reads_first:
        return give_reader(mini, ROOT / recipe.reads_first), build_processor(tokenizer)
    return give_tiles(mini, tokenizer), build_next_processor(tokenizer)


def build_next_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaNextProcessor:
    """Join `mini`'s tokenizer to LLaVA-NeXT's image processor (PIL backend), in tiles of 112 pixels."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size=side,
        image_grid_pinpoints=GRID,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@torch.no_grad()
def give_tiles(
    mini: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> LlavaNextForConditionalGeneration:
    """Make a LLaVA-NeXT of a LLaVA-1.5: the same weights, but half as many key and value heads.

    The embedding that ends a row of patches begins as that of a line break.
    """
    text = copy.deepcopy(mini.config.text_config)
    text.num_key_value_heads = text.num_attention_heads // SHARED_BY
    config = LlavaNextConfig(
        vision_config=copy.deepcopy(mini.config.vision_config),
        text_config=text,
        image_token_id=mini.config.image_token_id,
        image_seq_length=mini.config.image_seq_length,
        image_grid_pinpoints=GRID,
        vision_feature_layer=mini.config.vision_feature_layer,
        vision_feature_select_strategy=mini.config.vision_feature_select_strategy,
        tie_word_embeddings=False,
    )
    model = LlavaNextForConditionalGeneration(config)
    weights = mini.state_dict()
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")) and "language_model" in name:
            heads = weight.view(text.num_key_value_heads, SHARED_BY, text.head_dim, -1)
            weights[name] = heads.mean(1).flatten(0, 1)
    newline = mini.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("\n")]
    model.load_state_dict(weights | {"model.image_newline": newline})
    return model
