"""The adapter finds a family's parts, and what can't be loaded says so in one sentence, network or not."""

import json
import re
import time
from dataclasses import replace
from logging.handlers import BufferingHandler
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import PROMPT, save, tiny_sample, tiny_tokenizer, tiny_vlm, wanted
from tiny_families import FAMILIES, VISION
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import MllamaConfig, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig
from transformers.models.smolvlm import processing_smolvlm
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from mmflow_utils.engine.checks import check_model
from mmflow_utils.models import load, precision, sources
from mmflow_utils.models.adapter import text_inputs
from mmflow_utils.models.load import load_model
from mmflow_utils.models.sources import find_checkpoint
from mmflow_utils.params import ROOT, Params
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.results.frames import manifest

PICTURE_PATH = re.compile(r"vision|projector|connector|visual")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return save(tiny_vlm("llava"), tmp_path_factory.mktemp("stored"))


def copy(stored, folder, *, without):
    folder.mkdir()
    for file in stored.iterdir():
        if not any(file.match(pattern) for pattern in without):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("family", ["llava", "llava_next", "llama"])
def test_the_parts_of_each_family_are_found(family):
    model = tiny_vlm(family, n_layers=3, n_kv_heads=2)
    assert (model.n_layers, model.n_heads) == (3, 4)
    assert (model.image_token_id is None) == (family == "llama")
    out_width = model.unembed(model.final_norm(torch.zeros(32))).shape[-1]
    assert out_width == len(model.tokenizer)
    assert model.output_proj(2).in_features == 32 and model.value_proj(2).out_features == 16


def test_weights_do_not_come_from_torchs_generator():
    torch.manual_seed(1)
    one = tiny_vlm(seed=3).unembed.weight
    torch.manual_seed(2)
    assert torch.equal(one, tiny_vlm(seed=3).unembed.weight)
    assert not torch.equal(one, tiny_vlm(seed=4).unembed.weight)


@pytest.mark.parametrize("family", ["llava", "llava_next", *FAMILIES])
def test_a_stored_model_comes_back_as_it_was(family, tmp_path):
    model = tiny_vlm(family, n_kv_heads=2)
    back = load_model(wanted(save(model, tmp_path / "m")))
    sample = tiny_sample(tmp_path)
    ours, theirs = encode(model, sample), encode(back, sample)
    assert ours.positions == theirs.positions
    with torch.inference_mode():
        assert torch.allclose(model.hf(**ours.inputs).logits, back.hf(**theirs.inputs).logits, atol=1e-6)
    assert not back.hf.training and not any(p.requires_grad for p in back.hf.parameters())
    assert back.text.config._attn_implementation == "sdpa"
    assert back.processor.image_processor.backend == "pil"


def test_the_old_layout_with_its_constants_and_without_metadata_is_the_same_model(stored, tmp_path):
    folder = copy(stored, tmp_path / "m", without=[])
    held = load_file(folder / "model.safetensors").items()
    weights = {name.replace("model.language_model.", "language_model.model."): weight for name, weight in held}
    layers = "language_model.model.layers"
    weights |= {f"{layers}.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(4)}
    save_file(weights, folder / "model.safetensors")
    old, new = load_model(wanted(folder)), load_model(wanted(stored))
    encoded = encode(new, tiny_sample(tmp_path))
    with torch.inference_mode():
        assert torch.equal(old.hf(**encoded.inputs).logits, new.hf(**encoded.inputs).logits)


@pytest.mark.parametrize("more", ["tied", "padded"])
def test_tied_embeddings_and_rows_beyond_the_vocabulary_are_as_stored(more, tmp_path):
    model = tiny_vlm("gemma3" if more == "tied" else "llava", n_layers=1)
    if more == "tied":
        model.hf.config.tie_word_embeddings = model.text.config.tie_word_embeddings = True
        model.hf.tie_weights()
        assert model.unembed.weight is model.text.embed_tokens.weight
    else:
        model.hf.resize_token_embeddings(len(model.tokenizer) + 14, mean_resizing=False)
    back = load_model(wanted(save(model, tmp_path / "m")))
    encoded = encode(back, tiny_sample(tmp_path))
    assert check_model(back, encoded).passed.all()
    with torch.inference_mode():
        assert torch.equal(model.hf(**encoded.inputs).logits, back.hf(**encoded.inputs).logits)


def test_a_byte_pair_tokenizer_that_takes_whole_words_first_is_served(tmp_path):
    core = json.loads(byte_level().backend_tokenizer.to_str())
    core["model"]["ignore_merges"] = True  # as Llama 3's
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)))
    model = replace(tiny_vlm("llama", prompt="{question} ASSISTANT:"), tokenizer=tokenizer)
    encoded = encode(model, tiny_sample(tmp_path, question="Is the ball left or right, blue?", objects=()))
    names = [encoded.tokens[p].strip() for p in encoded.positions["option_true"]]
    assert "".join(names) == "left" and "option_false" in encoded.positions


def test_a_package_that_a_processor_wants_is_named(tmp_path, monkeypatch):
    save(tiny_vlm("smolvlm"), tmp_path / "m")
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(ValueError, match="pip install num2words") as caught:
        load_model(wanted(tmp_path / "m"))
    assert "\n" not in str(caught.value)


def test_a_family_whose_picture_path_is_not_known_is_refused_before_its_weights_are_read(stored, tmp_path):
    folder = copy(stored, tmp_path / "m", without=["config.json"])
    MllamaConfig().save_pretrained(folder)
    with pytest.raises(ValueError, match="gemma3, .* holds 'mllama'.*adapter.py") as caught:
        load_model(wanted(folder))
    assert "\n" not in str(caught.value)


def test_a_decoder_without_the_parts_that_are_cut_is_refused(tmp_path):
    tokenizer = tiny_tokenizer(family="llama")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    hf = Phi3ForCausalLM(Phi3Config(vocab_size=len(tokenizer), pad_token_id=0, **small))
    hf.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="'phi3', is built otherwise.*v_proj") as caught:
        load_model(wanted(tmp_path / "m", prompt="{caption} {question}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stored", ["eager", "flash_attention_2"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
def test_attention_is_fused_in_every_part_whatever_a_checkpoint_says(family, stored, tmp_path):
    folder = save(tiny_vlm(family, n_layers=1), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for part in (config, *(config[name] for name in ("text_config", "vision_config") if name in config)):
        part["_attn_implementation"] = stored
        part |= {"return_dict": False, "output_hidden_states": True, "use_cache": False, "attention_dropout": 0.9}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(wanted(folder, prompt="{question}"))
    assert check_model(model, encode(model, tiny_sample(tmp_path))).passed.all()
    configs = [part.config for part in model.hf.modules() if hasattr(part, "config")]
    assert {config._attn_implementation for config in configs} == {"sdpa"}


def test_answers_are_greedy_whatever_settings_a_checkpoint_brings(tmp_path):
    model = tiny_vlm()
    settings = model.hf.generation_config
    settings.update(do_sample=True, temperature=3.0, repetition_penalty=9.0, eos_token_id=[2, 7])
    back = load_model(wanted(save(model, tmp_path / "m"))).hf.generation_config
    assert not back.repetition_penalty and not back.temperature and not back.do_sample
    assert back.eos_token_id == [2, 7]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "llava_next", *FAMILIES])
@pytest.mark.parametrize("ending", ["", "Fast"])
def test_picture_processors_stored_apart_as_on_the_hub_are_read(family, ending, tmp_path):
    folder, model = tmp_path / "m", tiny_vlm(family)
    file = save(model, folder) / "processor_config.json"
    config = json.loads(file.read_text())
    apart = config.pop("image_processor")
    apart["image_processor_type"] = apart["image_processor_type"].removesuffix("Pil") + ending
    (folder / "preprocessor_config.json").write_text(json.dumps(apart))
    file.write_text(json.dumps(config))
    sample, back = tiny_sample(tmp_path), load_model(wanted(folder))
    ours, theirs = encode(model, sample), encode(back, sample)
    assert ours.positions == theirs.positions
    assert torch.equal(ours.inputs["pixel_values"], theirs.inputs["pixel_values"])


@pytest.mark.parametrize("family", ["llava", *FAMILIES])
def test_loading_says_nothing(family, tmp_path, capfd):
    folder, sample = save(tiny_vlm(family), tmp_path / "m"), tiny_sample(tmp_path)
    capfd.readouterr()
    encode(load_model(wanted(folder)), sample)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("end", [":", "\n", " "])
def test_a_words_first_token_is_the_one_an_answer_begins_with(end):
    words, alone = ("Left", "left", "blue ball", "Yes"), lambda model, word: model.tokenizer.encode(word)[1]
    model = tiny_vlm(prompt=PROMPT[:-1] + end)
    if end == ":":  # as the paper counts it: the tokenizer writes the space into every word
        assert [model.first_token_id(word) for word in words] == [alone(model, word) for word in words]
    tokenizer = byte_level()
    other = replace(model, tokenizer=tokenizer)
    first = tokenizer.convert_ids_to_tokens([other.first_token_id(word) for word in words])
    spaced = ["ĠLeft", "Ġleft", "Ġblue", "ĠYes"]
    assert first == (spaced if end == ":" else ["Left", "left", "blue", "Yes"])
    both = [tokenizer.convert_ids_to_tokens(other.first_token_ids(word)) for word in words]
    assert both == [list(dict.fromkeys(pair)) for pair in zip(first, spaced, strict=True)]


def test_a_word_that_an_answer_begins_with_a_piece_of_has_that_piece_behind_a_space_too():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT / "assets" / "llava-smollm2")
    model = replace(tiny_vlm(prompt=PROMPT + "\n"), tokenizer=tokenizer)
    found = {word: tokenizer.convert_ids_to_tokens(model.first_token_ids(word)) for word in ("Cup", "cup", "Left")}
    assert found == {"Cup": ["C", "ĠCup", "ĠC"], "cup": ["cup", "Ġcup"], "Left": ["Left", "ĠLeft"]}


def byte_level():
    """Train a tokenizer like GPT-2's, to which a word with its space and one without are two."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(
        [" Left left blue Yes", "Left", "left", "blue ball", "Yes"] * 9,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_a_text_only_model_loads_without_a_processor(tmp_path):
    back = load_model(wanted(save(tiny_vlm("llama"), tmp_path / "m"), prompt="{caption} {question}", dtype="bfloat16"))
    assert back.processor is None and back.dtype == torch.bfloat16
    assert "captions" in encode(back, tiny_sample(tmp_path)).positions


GEOMETRY = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


def with_tower(folder, family, tower, strategy, *, without=()):
    """Store a tiny model with another vision tower and strategy, its processor file without some entries."""
    model = tiny_vlm(family, n_layers=1)
    config = model.hf.config
    if tower == "siglip":
        config.vision_config = SiglipVisionConfig(**VISION, image_size=24, patch_size=6, vision_use_head=False)
    config.vision_feature_select_strategy = strategy
    save(replace(model, hf=type(model.hf)(config)), folder)
    file = folder / "processor_config.json"
    held = json.loads(file.read_text()).items()
    file.write_text(json.dumps({name: value for name, value in held if name not in without}))
    return folder


@pytest.mark.parametrize("without", [(), GEOMETRY, GEOMETRY[2:]])
@pytest.mark.parametrize(("tower", "strategy", "n"), [("siglip", "full", 16), ("siglip", "default", 15),
                                                      ("clip", "full", 17), ("clip", "default", 16)])  # fmt: skip
def test_image_tokens_are_as_many_as_the_tower_gives_features(tower, strategy, n, without, tmp_path):
    model = load_model(wanted(with_tower(tmp_path / "m", "llava", tower, strategy, without=without)))
    encoded = encode(model, tiny_sample(tmp_path))
    assert len(encoded.positions["image"]) == n and text_inputs(model, encoded.inputs)[1].isfinite().all()
    assert ("image_related" in encoded.positions) == (n == 16)  # else no token is known to be a patch
    if n != 16:
        assert "image tokens are not the 16 patches" in encoded.positions.why_missing("image_related")


def test_a_tower_and_a_processor_that_cut_a_picture_differently_are_refused_at_load(stored, tmp_path):
    next_folder = with_tower(tmp_path / "next", "llava_next", "siglip", "default")
    other_size = copy(stored, tmp_path / "size", without=[])
    file = other_size / "processor_config.json"
    file.write_text(file.read_text().replace("24", "30"))
    for folder in (next_folder, other_size):
        with pytest.raises(ValueError, match="that cut a picture alike in ") as refused:
            load_model(wanted(folder))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (["config.json"], "no config.json"),
        (["*.safetensors"], "model.safetensors"),
        (["processor_config.json", "preprocessor_config.json"], "picture processor"),
        (["tokenizer*"], "no tokenizer.json"),
    ],
)
def test_a_folder_that_lacks_a_part_names_it(stored, tmp_path, without, said):
    folder = copy(stored, tmp_path / "broken", without=without)
    with pytest.raises(ValueError, match=said) as caught:
        load_model(wanted(folder))
    assert str(folder) in str(caught.value)


def test_weights_that_a_checkpoint_lacks_are_not_made_up(stored, tmp_path):
    folder = copy(stored, tmp_path / "holes", without=[])
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.2.mlp.up_proj.weight"))
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 are missing, .*layers.2.mlp.up_proj"):
        load_model(wanted(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "9 are missing"),
        ("shape", r"4 have others, such as .*\(3, 3\), not \(32, 32\)"),
        ("stray", "9 weights of"),
    ],
)
def test_a_load_that_fails_is_one_sentence_alone(stored, tmp_path, change, said):
    folder = copy(stored, tmp_path / "m", without=[])
    weights = load_file(folder / "model.safetensors")
    of_layer = {name: w for name, w in weights.items() if re.search(r"model\.layers\.1\.", name)}
    if change == "missing":
        weights = {name: w for name, w in weights.items() if name not in of_layer}
    elif change == "stray":
        weights |= {name.replace("layers.1.", "layers.9."): w.clone() for name, w in of_layer.items()}
    else:
        weights = {
            name: torch.zeros(3, 3) if "model.layers" in name and "q_proj" in name else w for name, w in weights.items()
        }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    before, reported = logging.get_verbosity(), BufferingHandler(99)
    logging.add_handler(reported)
    with pytest.raises(ValueError, match=said) as refused:
        load_model(wanted(folder))
    logging.remove_handler(reported)
    error = refused.value
    assert "\n" not in str(error) and not reported.buffer and error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None  # nor does a traceback of the library come first
    assert logging.get_verbosity() == before


def test_pickled_weights_are_not_read(stored, tmp_path):
    folder = copy(stored, tmp_path / "pickled", without=["*.safetensors"])
    torch.save(tiny_vlm().hf.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors only"):
        load_model(wanted(folder))


def test_a_missing_shard_and_a_cut_file_are_named(stored, tmp_path):
    folder = copy(stored, tmp_path / "shards", without=[])
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00002"):
        find_checkpoint(str(folder))
    for text, said in (("{", "index.json is no valid JSON"), ("[]", "Expected names and values in .*index.json, got")):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            find_checkpoint(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="Expected model weights"):
        load_model(wanted(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Expected a model configuration"):
        load_model(wanted(folder))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "assets/nowhere", "/no/such/folder", "a b c"])
def test_offline_an_unknown_checkpoint_is_one_sentence(name, monkeypatch):
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a folder") as caught:
        load_model(wanted(name))
    assert "\n" not in str(caught.value)


def test_without_a_network_there_is_no_storm_of_retries(monkeypatch):
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(sources, "HfApi", lambda: __import__("huggingface_hub").HfApi("http://127.0.0.1:9"))
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="can't be reached"):
        find_checkpoint("nobody/no-such-model")
    assert time.perf_counter() - begin < 5


def test_a_name_that_the_hub_refuses_is_said_to_be_wrong(monkeypatch):
    def refuse(*_, **__):
        response = SimpleNamespace(headers={}, request=None)
        raise RepositoryNotFoundError("404\n\nRepository Not Found", response=response)

    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "HfApi", lambda: SimpleNamespace(model_info=refuse))
    with pytest.raises(ValueError, match="is the name right"):
        find_checkpoint("nobody/no-such-model")


def test_a_cached_copy_is_used_without_asking_the_hub(stored, tmp_path, monkeypatch):
    commit = "1a2b" * 10
    repo = tmp_path / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    cached = copy(stored, repo / "snapshots" / commit, without=[])
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "HfApi", lambda: pytest.fail("asked the hub"))
    look = sources.snapshot_download
    monkeypatch.setattr(sources, "snapshot_download", lambda *a, **k: look(*a, cache_dir=tmp_path, **k))
    assert find_checkpoint("owner/name") == cached
    model, params = load_model(wanted("owner/name")), Params(checkpoint="owner/name")
    assert manifest(params, model)["depends_on"]["weights_sha256"] == commit
    (cached / "model.safetensors").unlink()  # an interrupted download does not pass for a model
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="complete in the local Hugging Face cache"):
        find_checkpoint("owner/name")


def test_a_repository_without_safetensors_says_how_to_get_them(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")

    def fetch(*_, local_files_only=False, **__):
        if local_files_only:
            raise sources.LocalEntryNotFoundError("not here")
        return str(tmp_path)

    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: None))
    monkeypatch.setattr(sources, "snapshot_download", fetch)
    with pytest.raises(ValueError, match="no model.safetensors.*save_pretrained") as caught:
        find_checkpoint("owner/name")
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_named(stored):
    with pytest.raises(ValueError, match="cuda:99"):
        load_model(wanted(stored, device="cuda:99"))


def test_the_attention_kernel_comes_back_after_an_error():
    model = tiny_vlm()
    with pytest.raises(RuntimeError), model.attention_kernel("eager"):
        assert model.text.config._attn_implementation == "eager"
        raise RuntimeError
    assert model.text.config._attn_implementation == "sdpa"


def test_the_decoder_can_be_run_again_from_what_it_was_called_with(tmp_path):
    model = tiny_vlm("llava_next")
    encoded = encode(model, tiny_sample(tmp_path))
    kwargs, logits = text_inputs(model, encoded.inputs)
    assert torch.equal(model.unembed(model.text(**kwargs).last_hidden_state[0, -1:]), logits)
    assert not model.text._forward_pre_hooks


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize(("there", "said"), [(False, "pip install bitsandbytes"), (True, "a CUDA device")])
def test_fewer_bits_are_refused_before_anything_is_downloaded(dtype, there, said, monkeypatch):
    monkeypatch.setattr(precision, "find_spec", lambda _: there or None)
    monkeypatch.setattr(load, "find_checkpoint", lambda *_: pytest.fail("looked for the weights"))
    with pytest.raises(ValueError, match=f"dtype {dtype} needs .*{said}.*bfloat16") as caught:
        load_model(wanted("nobody/no-such-model", dtype=dtype))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("dtype", "computed"), [("int8", torch.float16), ("nf4", torch.bfloat16)])
@pytest.mark.parametrize("family", ["llava", "idefics3", "llama"])
def test_bitsandbytes_is_asked_for_the_decoder_alone(family, dtype, computed, tmp_path, monkeypatch):
    def read(folder, **options):
        asked.update(options)
        raise RuntimeError("as far as a machine without the package gets")

    model, asked = tiny_vlm(family), {}
    kind = load.AutoModelForCausalLM if family == "llama" else load.AutoModelForImageTextToText
    monkeypatch.setattr(precision, "_check_quantization", lambda *_: None)
    monkeypatch.setattr(kind, "from_pretrained", read)
    with pytest.raises(ValueError, match="as far as"):
        load_model(wanted(save(model, tmp_path / "m"), dtype=dtype, prompt=model.prompt))
    config = asked["quantization_config"]
    assert asked["dtype"] == computed and asked["device_map"] == {"": torch.device("cpu")}
    assert (config.load_in_8bit, config.load_in_4bit) == (dtype == "int8", dtype == "nf4")
    if dtype == "nf4":
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", computed)
    matrices = {name for name, part in model.hf.named_modules() if isinstance(part, torch.nn.Linear)}
    left = {name for name in matrices if should_convert_module(name, config.llm_int8_skip_modules)}
    assert left == {name for name in matrices if "layers" in name and not PICTURE_PATH.search(name)}
    assert len(left) == 7 * model.n_layers


def test_other_precisions_ask_nothing_of_bitsandbytes(monkeypatch):
    monkeypatch.setattr(precision, "_check_quantization", lambda *_: pytest.fail("asked"))
    params = wanted("m", dtype="bfloat16")
    device = precision.find_device(params)
    options = precision.weights_options(params, device, load.AutoModelForCausalLM, MllamaConfig())
    assert options == {"dtype": torch.bfloat16, "device_map": {"": torch.device("cpu")}}


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_layer_that_adds_something_else_is_seen(family, tmp_path):
    model = tiny_vlm(family)
    encoded = encode(model, tiny_sample(tmp_path))
    assert check_model(model, encoded)["passed"].all()
    hook = model.layers[2].register_forward_hook(lambda _, __, output: output + 0.01)
    failed = check_model(model, encoded, strict=False).query("not passed")
    hook.remove()
    assert failed["check"].tolist() == ["attention and MLP are all that a layer adds"]
    assert "layer 2 still changes the stream by 1.0e-02" in failed["detail"].iloc[0]
