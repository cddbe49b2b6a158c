"""Tiny random models of the studied architectures, built in a second and equal on every machine.

Torch's random initial weights differ between instruction sets for the same seed, so every weight is
drawn from a numpy generator instead. The tokenizer is trained here, the processors are the library's own.

    model = tiny_vlm("llava_next", n_layers=4, n_kv_heads=2)
    sample = tiny_sample(tmp_path)
"""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw
from tiny_families import FAMILIES, VISION, Built
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from mmflow_utils.data.sample import Box, Sample, SceneObject
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.positions import PositionSets

PROMPT = "USER: <image>\n{question} \nAnswer the question using a single word or phrase. ASSISTANT:"
QUESTION = "Is the cup to the left or to the right of the green ball?"
IMAGE_SIZE, PATCH_SIZE = 24, 6  # 4 x 4 image tokens per tile
GRID = [[24, 48], [48, 24], [48, 48]]
CORPUS = (
    QUESTION,
    PROMPT,
    "What is the color of the box, red or blue? Which side of the photo is the bag on?",
    "Is there a wooden table or a metal chair? Yes No Left Right Red Blue Green yes no left right red blue",
)


@cache
def tiny_tokenizer(vocab_size: int = 320, family: str = "llava") -> PreTrainedTokenizerFast:
    """Train a Llama-like tokenizer: BPE on Metaspace without byte fallback, `<s>` in front.

    Args:
        family: whose tokens about a picture it knows.
    """
    known = FAMILIES.get(family)
    named, more = (known.named, known.more) if known else ({"image_token": "<image>"}, ())
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<pad>", *named.values(), *more]
    alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=dict(named),
    )


def fill_weights(module: torch.nn.Module, seed: int, scale: float = 1.0) -> None:
    """Draw every weight from numpy's generator, large enough that attention is far from uniform."""
    rng = np.random.default_rng(seed)
    for name, weight in sorted(module.named_parameters()):
        if weight.ndim == 1 and name.endswith("weight"):  # the scale of a norm, around its start
            values = weight.mean().round().item() + 0.1 * rng.standard_normal(tuple(weight.shape))
        elif "embed" in name or "image_newline" in name:
            values = rng.standard_normal(tuple(weight.shape))
        elif weight.ndim == 1:
            values = 0.1 * rng.standard_normal(tuple(weight.shape))
        else:
            fan_in = int(np.prod(weight.shape[1:]))
            values = scale * rng.standard_normal(tuple(weight.shape)) / np.sqrt(fan_in)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(values))


def tiny_vlm(
    family: str = "llava",
    *,
    n_layers: int = 4,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    d_model: int = 32,
    seed: int = 0,
    prompt: str = PROMPT,
    do_pad: bool = True,
    dtype: torch.dtype = torch.float32,
    text_config: object | None = None,
) -> VLM:
    """Build a random `llava`, `llava_next` or text-only `llama` model, or one of `tiny_families`.

    Args:
        text_config: another decoder's configuration (sliding windows, say) in place of the Llama one; its
            vocabulary must be the tiny tokenizer's.
    """
    tokenizer = tiny_tokenizer(family=family)
    shape = dict(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads or n_heads,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if family in FAMILIES:
        hf, processor = FAMILIES[family].build(shape, tokenizer)
    elif family == "llama":
        hf, processor = LlamaForCausalLM(LlamaConfig(**shape)), None
    else:
        hf, processor = _llava(family, text_config or LlamaConfig(**shape), tokenizer)
    fill_weights(hf, seed)
    hf = hf.to(dtype).eval().requires_grad_(False)
    hf.set_attn_implementation("sdpa")
    return VLM(
        name=f"tiny-{family}",
        hf=hf,
        processor=processor,
        tokenizer=tokenizer,
        prompt=prompt,
        do_pad=do_pad,
        device=torch.device("cpu"),
        dtype=dtype,
    )


def _llava(family: str, text: object, tokenizer: PreTrainedTokenizerFast) -> Built:
    vision = CLIPVisionConfig(**VISION, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, projection_dim=16)
    shared = dict(text_config=text, vision_config=vision, image_token_id=tokenizer.image_token_id)
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    geometry = dict(patch_size=PATCH_SIZE, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    if family == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=square)
        processor = LlavaProcessor(images, tokenizer, **geometry)
        return LlavaForConditionalGeneration(LlavaConfig(**shared)), processor
    if family == "llava_next":
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=square, image_grid_pinpoints=GRID
        )
        processor = LlavaNextProcessor(images, tokenizer, **geometry)
        hf = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=GRID, **shared))
        return hf, processor
    raise ValueError(f"family must be llava, llava_next, llama, {', '.join(FAMILIES)}, not {family!r}.")


def vlm_of_kind(kind: str, **options) -> VLM:
    """Build a `tiny_vlm` by its family, or LLaVA's whose decoder slides (`sliding`) or shares keys (`llava-gqa`)."""
    if kind == "sliding":
        options["text_config"] = MistralConfig(
            vocab_size=len(tiny_tokenizer()),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=options["n_layers"],
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=9,
            pad_token_id=None,
        )
    if kind in ("llava-gqa", "llava_next"):
        options["n_kv_heads"] = 2
    return tiny_vlm({"llava-gqa": "llava", "sliding": "llava"}.get(kind, kind), **options)


def tiny_sample(
    folder: Path,
    *,
    size: tuple[int, int] = (40, 28),
    question: str = QUESTION,
    sample_id: str = "q1",
    seed: int = 0,
    **changes,
) -> Sample:
    """Draw a picture (width, height) of a red cup and a green ball; ask a question with two options."""
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    width, height = size
    picture = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8), "RGB")
    cup = Box(x=width * 0.1, y=height * 0.2, w=width * 0.2, h=height * 0.3)
    ball = Box(x=width * 0.6, y=height * 0.5, w=width * 0.25, h=height * 0.4)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((cup.x, cup.y, cup.x + cup.w, cup.y + cup.h), fill=(200, 30, 30))
    draw.ellipse((ball.x, ball.y, ball.x + ball.w, ball.y + ball.h), fill=(30, 160, 40))
    file = folder / f"{sample_id}.png"
    picture.save(file)
    fields = dict(
        sample_id=sample_id,
        image_id=f"image-{sample_id}",
        image=file,
        question=question,
        answer="left",
        task="ChooseRel",
        structural="choose",
        semantic="rel",
        detailed="relChooser",
        option_true="left",
        option_false="right",
        objects=(
            SceneObject(name="cup", object_id="1", box=cup, words=(2, 3)),
            SceneObject(name="ball", object_id="2", box=ball, words=(13, 14)),
        ),
        full_answer="The cup is to the left of the ball.",
        caption="A red cup stands to the left of a green ball.",
    )
    return Sample(**{**fields, **changes})


def tiny_pair(folder: Path, **options) -> Sample:
    """Draw a `tiny_sample` with a second picture, of the same size, beside its own."""
    other = tiny_sample(folder, **{**options, "sample_id": "other", "seed": 7})
    return tiny_sample(folder, **options, other_image=other.image)


def assert_partition(positions: PositionSets) -> None:
    """Hold that each position of a prompt belongs to exactly one of the sets that make it up."""
    parts = ("system", "image", "image_newline", "captions", "question", "template", "last")
    assert sorted(p for name in parts for p in positions.get(name)) == list(range(positions.n_tokens))
    assert {"system", "question", "template", "last"} <= set(positions.sets)


def wanted(folder: Path, **changes) -> SimpleNamespace:
    """Give the parameters that load a model from a folder."""
    values = dict(
        model="test",
        checkpoint=str(folder),
        revision=None,
        prompt=PROMPT,
        do_pad=True,
        dtype="float32",
        device="cpu",
        device_map=None,
    )
    return SimpleNamespace(**values | changes)


def save(model: VLM, folder: Path) -> Path:
    """Store a model as a checkpoint, and give its folder."""
    model.hf.save_pretrained(folder)
    (model.processor or model.tokenizer).save_pretrained(folder)
    return folder
