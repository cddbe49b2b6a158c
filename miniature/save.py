"""A trained miniature on disk: the library's own files, and in `training.json` how it learned and how well.

Example (the text-only counterpart of `mini`, App. G; its `text` stage is that of `mini`):
    trainer = Trainer(model, processor, Recipe(), Path("outputs/mini/training"))
    trainer.text()
    trainer.read()
    save_text_miniature(trainer, Path("assets/mini-text"))
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaProcessor

from miniature.build import IMAGE_SIZE, PATCH_SIZE
from miniature.llava import BASE, IMAGE_TOKEN, MATRICES, LlavaTrainer
from miniature.score import accuracy_in_parts
from miniature.train import Trainer

__all__ = ["save_llava", "save_miniature", "save_text_miniature"]


def save_miniature(trainer: Trainer, folder: Path | str, *, n_scenes: int = 1000) -> dict:
    """Write model, processor and `training.json`: recipe, learning curves, and held-out accuracy in float32.

    Returns:
        What `training.json` holds.
    """
    record = _measure(trainer, n_scenes, captions=False)
    model = trainer.model
    model.set_attn_implementation({"text_config": "sdpa"})
    model.save_pretrained(folder)
    trainer.processor.save_pretrained(folder)
    return _write(record, folder)


def save_text_miniature(trainer: Trainer, folder: Path | str, *, n_scenes: int = 1000) -> dict:
    """Write the decoder alone as a language model, with its tokenizer and `training.json` (App. G).

    Returns:
        What `training.json` holds; the accuracies are those with captions, a scene's own or another's.
    """
    record = _measure(trainer, n_scenes, captions=True)
    model = LlamaForCausalLM(trainer.model.config.text_config)
    model.model, model.lm_head = trainer.model.model.language_model, trainer.model.lm_head
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    trainer.processor.tokenizer.save_pretrained(folder)
    return _write(record, folder)


def save_llava(trainer: LlavaTrainer, folder: Path | str, *, n_scenes: int = 300) -> dict:
    """Write what was trained around the language model, in float16, and `training.json`.

    The language model's own weights stay in their package. A LLaVA's folder holds its configuration, processor,
    picture encoder and projector, and, in PEFT's format, its adapter; a text-only one the adapter alone.

    Returns:
        What `training.json` holds.
    """
    folder, recipe = Path(folder), trainer.recipe
    folder.mkdir(parents=True, exist_ok=True)
    adapter = {name: weight.detach() for name, weight in trainer.adapter().items()}
    inside = "model.language_model." if recipe.shown == "picture" else "model."
    if adapter:
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=rf".*{inside.split('.')[-2]}\.layers\.\d+\.\w+\.({'|'.join(MATRICES)})",
            base_model_name_or_path=BASE,
            inference_mode=True,
        ).save_pretrained(folder)
        named = {name.replace(".default", "").removeprefix("model."): w for name, w in adapter.items()}
        _save_half({f"base_model.model.{inside}{name}": w for name, w in named.items()}, folder / "adapter_model")
    if recipe.shown == "picture":
        _save_picture_parts(trainer, folder)
    accuracy = {
        name: trainer.accuracy(n_scenes, seed=recipe.seed + 1, shuffled=name == "shuffled")
        for name in ("intact", "shuffled")
    }
    record = dict(recipe=asdict(recipe), n_scenes=n_scenes, accuracy_pct=accuracy, curves=trainer.curves)
    return _write(record, folder)


def _save_picture_parts(trainer: LlavaTrainer, folder: Path) -> None:
    """Write all of a LLaVA but its language model: configuration, processor, picture encoder, projector."""
    text = trainer.language.config.to_dict()
    left_out = ("architectures", "model_type", "transformers_version", "quantization_config", "_name_or_path")
    text = LlamaConfig(**{name: value for name, value in text.items() if name not in left_out and name[0] != "_"})
    LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=trainer.tower.config,
        text_config=text,
        image_token_id=trainer.image_id,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    ).save_pretrained(folder)
    GenerationConfig(bos_token_id=1, eos_token_id=trainer.end_id, pad_token_id=trainer.end_id).save_pretrained(folder)
    trainer.tokenizer.image_token, trainer.tokenizer.image_token_id = IMAGE_TOKEN, trainer.image_id
    LlavaProcessor(
        image_processor=trainer.pictures,
        tokenizer=trainer.tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
    ).save_pretrained(folder)
    words = folder / "tokenizer.json"  # half its size without indentation
    words.write_text(
        json.dumps(json.loads(words.read_text("utf-8")), ensure_ascii=False, separators=(",", ":")), "utf-8"
    )
    parts: dict[str, Tensor] = {f"model.vision_tower.{n}": w for n, w in trainer.tower.named_parameters()}
    for name, weight in trainer.projector.named_parameters():
        number, kind = name.split(".")
        parts[f"model.multi_modal_projector.linear_{1 if number == '0' else 2}.{kind}"] = weight.detach()
    _save_half(parts, folder / "model")


def _save_half(weights: dict[str, Tensor], path: Path) -> None:
    half = {name: weight.to(torch.float16).contiguous() for name, weight in weights.items()}
    save_file(half, path.with_suffix(".safetensors"), {"format": "pt"})


def _measure(trainer: Trainer, n_scenes: int, *, captions: bool) -> dict:
    recipe = trainer.recipe
    asked = dict(n_scenes=n_scenes, seed=recipe.seed + 1, frames=recipe.frames, captions=captions)
    model = trainer.model.eval()
    accuracy = {
        name: accuracy_in_parts(model, trainer.processor, shuffled=name == "shuffled", **asked)
        for name in ("intact", "shuffled")
    }
    return dict(recipe=asdict(recipe), n_scenes=n_scenes, accuracy_pct=accuracy, curves=trainer.curves)


def _write(record: dict, folder: Path | str) -> dict:
    (Path(folder) / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return record
