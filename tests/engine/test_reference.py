"""The oracle itself is held against attention computed by hand, and against the library's own patterns."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_pair, tiny_sample, tiny_tokenizer, tiny_vlm
from transformers import MistralConfig

from mmflow_utils.engine import reference as engine
from mmflow_utils.engine.checks import attention_from, attention_pattern, check_model
from mmflow_utils.engine.reference import intervene, run_reference
from mmflow_utils.models.adapter import text_inputs
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import FLOW_TO_LAST, IMAGE_TO_QUESTION, Variant, variants
from mmflow_utils.prompts.other_pictures import with_other_pictures

EDGES = ["mask", "zero_value", "mean_value"]
MODULES = ["attention_output", "mlp_output"]


def ready(folder, family="llava", **options):
    model = tiny_vlm(family, **options)
    if family == "llama":
        model = tiny_vlm(family, prompt="{caption} {question} ASSISTANT:", **options)
    return model, encode(model, tiny_sample(folder))


def sliding(window):
    tokenizer = tiny_tokenizer()
    return MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        pad_token_id=tokenizer.pad_token_id,
    )


def norm(x, weight, eps):
    return weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def turn(x, theta):
    """Rotate each position's (first half, second half) pairs by position x frequency."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)[None]
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def one_layer_by_hand(model, resid, variant, other=None):
    """Compute a one-layer decoder with loops over heads and targets, and no line of the library.

    `resid` is what enters it, and `other` what enters it when it sees another picture.
    """
    layer, config = model.layers[0], model.text.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    theta = config.rope_parameters["rope_theta"]
    x, y = (
        norm(one, layer.input_layernorm.weight, config.rms_norm_eps)
        for one in (resid, resid if other is None else other)
    )
    q, k, v = (x @ getattr(layer.self_attn, f"{name}_proj").weight.T for name in "qkv")
    elsewhere = y @ layer.self_attn.v_proj.weight.T
    mixed = torch.zeros(len(resid), heads * width)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        kv = head // (heads // kv_heads)  # neighboring heads share keys and values
        shared = slice(kv * width, (kv + 1) * width)
        query, key, value = turn(q[:, own], theta), turn(k[:, shared], theta), v[:, shared]
        for t in range(len(resid)):
            scores = key[: t + 1] @ query[t] / math.sqrt(width)
            values = value[: t + 1].clone()
            closed = [s for s in variant.source if s <= t] if t in variant.target else []
            if variant.intervention == "mask":
                scores[closed] = -math.inf
            elif variant.intervention == "resample":
                values[closed] = elsewhere[closed, shared]
            elif closed:
                values[closed] = values[closed].mean(0) if variant.intervention == "mean_value" else 0.0
            weights = scores.exp() / scores.exp().sum() if len(closed) <= t or variant.intervention != "mask" else 0
            mixed[t, own] = weights @ values if torch.is_tensor(weights) else 0.0
    attended = mixed @ layer.self_attn.o_proj.weight.T
    if variant.intervention == "attention_output":
        attended[list(variant.target)] = 0.0
    resid = resid + attended
    x = norm(resid, layer.post_attention_layernorm.weight, config.rms_norm_eps)
    up, gate = x @ layer.mlp.up_proj.weight.T, x @ layer.mlp.gate_proj.weight.T
    out = (up * gate * torch.sigmoid(gate)) @ layer.mlp.down_proj.weight.T
    if variant.intervention == "mlp_output":
        out[list(variant.target)] = 0.0
    final = norm(resid + out, model.final_norm.weight, config.rms_norm_eps)
    return final @ model.unembed.weight.T


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("intervention", EDGES + MODULES)
def test_one_layer_by_hand(intervention, n_kv_heads, tmp_path):
    model, encoded = ready(tmp_path, "llama", n_layers=1, n_kv_heads=n_kv_heads)
    last, words = encoded.positions.last, model.text.embed_tokens.weight[encoded.inputs["input_ids"][0]]
    source = () if intervention in MODULES else (0, 3, 4, 8, last)
    one = Variant(layers=range(1), target=(5, last), source=source, intervention=intervention)
    for read in (last, 5, 6):
        run = run_reference(model, encoded, [one], read=read)
        assert torch.allclose(run.variants[0], one_layer_by_hand(model, words, one)[read], atol=2e-5)
        clean = Variant(layers=range(0), target=(0,))
        assert torch.allclose(run.base, one_layer_by_hand(model, words, clean)[read], atol=2e-5)
        changed = not torch.allclose(run.base, run.variants[0], atol=1e-3)
        assert changed == (read != 6)  # one layer carries nothing from 5 to 6


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_another_pictures_values_by_hand(n_kv_heads, tmp_path):
    model = tiny_vlm(n_layers=1, n_kv_heads=n_kv_heads)
    encoded = encode(model, tiny_pair(tmp_path))
    own, other = (text_inputs(model, inputs)[0]["inputs_embeds"][0] for inputs in (encoded.inputs, encoded.other))
    image, last = encoded.positions["image"], encoded.positions.last
    one = Variant(layers=range(1), target=(image[4], last), source=image[2:9], intervention="resample")
    for read in (last, image[4], last - 1):
        run = run_reference(model, encoded, [one], read=read)
        assert torch.allclose(run.variants[0], one_layer_by_hand(model, own, one, other)[read], atol=2e-5)
        assert torch.allclose(run.base, run.variants[0], atol=1e-3) == (read == last - 1)


def test_another_picture_is_needed_and_the_same_one_changes_nothing(tmp_path):
    model, sample = tiny_vlm("llava_next"), tiny_pair(tmp_path)
    same, none = (encode(model, replace(sample, other_image=path)) for path in (sample.image, None))
    edit = variants(same.positions, IMAGE_TO_QUESTION, window=3, n_layers=4, intervention="resample")
    run = run_reference(model, same, edit)
    assert torch.allclose(run.variants, run.base.expand_as(run.variants), atol=1e-5)
    with pytest.raises(ValueError, match="no other_image to resample: see with_other_pictures"):
        run_reference(model, none, edit)
    wider = tiny_sample(tmp_path, size=(28, 60), sample_id="wider")
    with pytest.raises(ValueError, match="takes other tokens than sample q1's own"):
        encode(model, replace(sample, other_image=wider.image))


def test_each_sample_gets_another_picture_of_its_layout(tmp_path):
    model = tiny_vlm("llava_next")
    sizes = {"a": (40, 28), "b": (28, 60), "c": (40, 28), "d": (28, 60), "e": (40, 40), "f": (40, 28)}
    samples = [tiny_sample(tmp_path, sample_id=name, size=size) for name, size in sizes.items()]
    samples.append(replace(samples[0], sample_id="a2"))
    found = {s.sample_id: s.other_image.stem for s in with_other_pictures(model, samples[::-1])}
    assert found == {"a": "c", "c": "f", "f": "a", "b": "d", "d": "b", "a2": "c"}  # no other picture is as square as e


def test_a_target_with_nothing_left_gets_nothing_by_hand_too(tmp_path):
    model, encoded = ready(tmp_path, "llama", n_layers=1)
    everything = tuple(range(encoded.positions.n_tokens))
    variant = Variant(layers=range(1), target=(6,), source=everything)
    run = run_reference(model, encoded, [variant], read=6)
    by_hand = one_layer_by_hand(model, model.text.embed_tokens.weight[encoded.inputs["input_ids"][0]], variant)[6]
    assert torch.allclose(run.variants[0], by_hand, atol=2e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_starved_target_is_one_whose_attention_output_is_zeroed(kernel, family, tmp_path):
    model, encoded = ready(tmp_path, family, n_kv_heads=2)
    layers, target = range(1, 3), encoded.positions["question"]
    starved = Variant(layers=layers, target=target, source=tuple(range(encoded.positions.n_tokens)))
    zeroed = Variant(layers=layers, target=target, intervention="attention_output")
    with model.attention_kernel(kernel):
        run = run_reference(model, encoded, [starved, zeroed])
    assert run.variants.isfinite().all()
    assert torch.allclose(run.variants[0], run.variants[1], atol=1e-5)
    assert not torch.allclose(run.variants[0], run.base, atol=1e-2)


def test_the_first_position_starves_when_it_loses_itself(tmp_path):
    model, encoded = ready(tmp_path)
    lonely = Variant(layers=range(4), target=(0,), source=(0,))
    mixed = []
    hook = model.output_proj(2).register_forward_hook(lambda _, args, __: mixed.append(args[0][0]))
    run_reference(model, encoded, [lonely], read=0)
    hook.remove()
    clean, starved = mixed
    assert clean[0].abs().max() > 0.1 and not starved[0].any()
    assert starved[1:].abs().amax(-1).min() > 0  # nobody else is touched


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_what_sets_attend_to_is_the_librarys_own_averaged_and_one_pass_gives_all(family, tmp_path):
    model, encoded = ready(tmp_path, family, n_kv_heads=2)
    with model.attention_kernel("eager"), torch.inference_mode():
        library = torch.cat(model.hf(**encoded.inputs, output_attentions=True).attentions)
    passes = []
    hook = model.hf.base_model.register_forward_hook(lambda *_: passes.append(1))
    seen = attention_from(model, encoded, ["question", "last"])
    hook.remove()
    assert list(seen) == ["question", "last"] and len(passes) == 1
    for name, weights in seen.items():
        expected = library[:, :, list(encoded.positions[name])].mean(2)
        assert weights.shape == expected.shape and torch.allclose(weights, expected, atol=1e-6)
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert not torch.allclose(seen["question"], seen["last"], atol=1e-3)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_patterns_lose_the_blocked_edges_and_renormalize(family, tmp_path):
    model, encoded = ready(tmp_path, family, n_kv_heads=2)
    image, question = list(encoded.positions["image"]), list(encoded.positions["question"])
    variant = Variant(layers=range(1, 3), target=tuple(question), source=tuple(image))
    clean = [attention_pattern(model, encoded, n) for n in range(4)]
    blocked = [attention_pattern(model, encoded, n, variant) for n in range(4)]
    assert torch.equal(clean[0], blocked[0])
    for n in (1, 2):
        assert not blocked[n][:, question][:, :, image].any()
        assert torch.allclose(blocked[n].sum(-1), torch.ones(()), atol=1e-5)
    expected = clean[1].clone()
    for t in question:
        expected[:, t, image] = 0.0
    expected /= expected.sum(-1, keepdim=True)
    assert torch.allclose(blocked[1], expected, atol=1e-6)
    assert clean[1][:, question][:, :, image].sum(-1).min() > 0.01  # there was something to block
    assert (blocked[3][:, question][:, :, image] > 0).all()  # after the window the edges are back


@pytest.mark.parametrize("intervention", EDGES)
def test_what_blocks_nothing_changes_nothing(intervention, tmp_path):
    model, encoded = ready(tmp_path)
    last, every = encoded.positions["last"], range(4)
    nothing = [
        Variant(layers=every, target=last, intervention=intervention),
        Variant(layers=range(2, 2), target=last, source=(1, 2), intervention=intervention),
        Variant(layers=every, target=(4, 5), source=(9, 10), intervention=intervention),  # in the future
    ]
    run = run_reference(model, encoded, nothing)
    assert torch.allclose(run.variants, run.base.expand(3, -1), atol=1e-5)


def test_the_mean_of_one_value_is_itself_and_of_many_is_not(tmp_path):
    model, encoded = ready(tmp_path)
    last, image = encoded.positions["last"], encoded.positions["image"]
    one = Variant(layers=range(4), target=last, source=last, intervention="mean_value")
    many = Variant(layers=range(4), target=last, source=image, intervention="mean_value")
    run = run_reference(model, encoded, [one, many])
    assert torch.allclose(run.variants[0], run.base, atol=1e-5)
    assert not torch.allclose(run.variants[1], run.base, atol=1e-2)


def test_windows_interventions_and_targets_all_matter(tmp_path):
    model, encoded = ready(tmp_path)
    positions = encoded.positions
    rows = [
        Variant(layers=range(0, 2), target=positions["last"], source=positions["image"]),
        Variant(layers=range(1, 3), target=positions["last"], source=positions["image"]),
        Variant(layers=range(0, 2), target=positions["last"], source=positions["question"]),
        Variant(layers=range(0, 2), target=positions["question"], source=positions["image"]),
        Variant(layers=range(0, 2), target=positions["last"], source=positions["image"], intervention="zero_value"),
        Variant(layers=range(0, 2), target=positions["last"], intervention="mlp_output"),
    ]
    run = run_reference(model, encoded, rows)
    every = torch.cat([run.base[None], run.variants])
    assert torch.pdist(every, p=math.inf).min() > 1e-2


def test_a_position_before_every_target_is_untouched_and_after_is_not(tmp_path):
    model, encoded = ready(tmp_path)
    variant = Variant(layers=range(0, 3), target=encoded.positions["question"], source=encoded.positions["image"])
    first, later = encoded.positions["question"][0], encoded.positions["question"][-1] + 2
    for read, moved in ((first - 1, False), (first, True), (later, True)):
        run = run_reference(model, encoded, [variant], read=read)
        assert (not torch.allclose(run.variants[0], run.base, atol=1e-4)) == moved


@pytest.mark.parametrize("family", ["llava", "llava_next", "llama"])
def test_base_and_stream_are_the_librarys_own(family, tmp_path):
    model, encoded = ready(tmp_path, family)
    for read in (encoded.positions.last, 3):
        run = run_reference(model, encoded, [], read=read)
        with torch.inference_mode():
            out = model.hf(**encoded.inputs, output_hidden_states=True)
        assert torch.allclose(run.base, out.logits[0, read], atol=1e-5)
        theirs = torch.stack([h[0, read] for h in out.hidden_states[:-1]])
        assert torch.allclose(run.resid_post[:-1], theirs, atol=1e-6)
        assert torch.allclose(model.unembed(model.final_norm(run.resid_post[-1])), run.base, atol=1e-5)
        assert run.variants.shape == (0, len(model.tokenizer))


@pytest.mark.parametrize("intervention", EDGES + MODULES)
def test_kernels_agree(intervention, tmp_path):
    model, encoded = ready(tmp_path, "llava_next", n_kv_heads=2)
    flows = FLOW_TO_LAST + IMAGE_TO_QUESTION
    rows = variants(encoded.positions, flows, window=3, n_layers=4, layers=[0, 2], intervention=intervention)
    fused = run_reference(model, encoded, rows)
    with model.attention_kernel("eager"):
        plain = run_reference(model, encoded, rows)
    assert torch.allclose(fused.variants.softmax(-1), plain.variants.softmax(-1), atol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_sliding_window_stays_closed_under_the_knockout(kernel, tmp_path):
    model, encoded = ready(tmp_path, text_config=sliding(8))
    last, n = encoded.positions.last, encoded.positions.n_tokens
    near = Variant(layers=range(4), target=(last,), source=(last - 2, last - 1))
    pattern = attention_pattern(model, encoded, 1, near)
    far = torch.ones(n, n, dtype=torch.bool).tril(-8)
    assert not pattern[:, far].any()
    assert not pattern[:, last, last - 2 : last].any()
    assert (pattern[:, last, last - 7 : last - 2] > 0).all()
    outside = Variant(layers=range(1), target=(last,), source=tuple(range(last - 7)))
    starved = Variant(layers=range(1), target=(last,), source=tuple(range(last - 7, n)))
    zeroed = Variant(layers=range(1), target=(last,), intervention="attention_output")
    with model.attention_kernel(kernel):
        run = run_reference(model, encoded, [near, outside, starved, zeroed])
    assert not torch.allclose(run.variants[0], run.base, atol=1e-2)
    assert torch.allclose(run.variants[1], run.base, atol=1e-5)  # those edges were closed already
    assert torch.allclose(run.variants[2], run.variants[3], atol=1e-5)


def test_half_precision_runs_and_stays_near(tmp_path):
    model, encoded = ready(tmp_path)
    half, same = ready(tmp_path, dtype=torch.bfloat16)
    rows = variants(encoded.positions, FLOW_TO_LAST, window=3, n_layers=4)
    exact, rough = run_reference(model, encoded, rows), run_reference(half, same, rows)
    assert rough.variants.dtype == torch.float32 and rough.variants.isfinite().all()
    assert torch.allclose(exact.variants.softmax(-1), rough.variants.softmax(-1), atol=0.02)


@pytest.mark.parametrize(
    ("variant", "read", "said"),
    [
        (Variant(layers=range(3, 5), target=(1,)), None, "layers are 0 to 3"),
        (Variant(layers=range(1), target=(999,)), None, "names position 999"),
        (Variant(layers=range(1), target=(1,), source=(999,)), None, "names position 999"),
        (Variant(layers=range(1), target=(1,)), 999, "from 0 to"),
        (Variant(layers=range(1), target=(1,)), -1, "from 0 to"),
    ],
)
def test_what_is_not_there_is_named(variant, read, said, tmp_path):
    model, encoded = ready(tmp_path)
    with pytest.raises(ValueError, match=said):
        run_reference(model, encoded, [variant], read=read)


def hooks_of(model):
    return [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.hf.modules()]


@pytest.mark.parametrize("intervention", EDGES + MODULES)
def test_no_hook_outlives_an_error(intervention, tmp_path):
    model, encoded = ready(tmp_path)
    source = () if intervention in MODULES else (1,)
    variant = Variant(layers=range(4), target=(2,), source=source, intervention=intervention)
    run_reference(model, encoded, [])  # the library installs hooks of its own in the vision tower, and keeps them
    before = hooks_of(model)
    with pytest.raises(RuntimeError), intervene(model, variant, encoded.positions.n_tokens):
        raise RuntimeError

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_reference(model, encoded, [variant], progress=stop)
    assert hooks_of(model) == before


@pytest.mark.parametrize("family", ["llava", "llava_next", "llama"])
def test_the_checks_pass_on_a_sound_model(family, tmp_path):
    frame = check_model(*ready(tmp_path, family, n_kv_heads=2))
    assert frame["passed"].all(), frame.to_string()
    assert len(frame) == 6


def test_the_checks_see_a_mask_that_does_nothing(tmp_path, monkeypatch):
    model, encoded = ready(tmp_path)
    monkeypatch.setattr(engine, "_mask_edges", lambda *_: None)
    failed = check_model(model, encoded, strict=False).query("not passed")
    assert failed["check"].tolist() == ["blocked attention is 0, the rest renormalizes"]


def test_the_checks_see_a_wrong_head_and_wrong_positions(tmp_path, monkeypatch):
    model, encoded = ready(tmp_path)
    moved = [p + 1 for p in encoded.positions["question"]]
    object.__setattr__(encoded, "positions", encoded.positions.with_(question=moved))
    monkeypatch.setattr(type(model), "final_norm", torch.nn.Identity())
    failed = check_model(model, encoded, strict=False).query("not passed").set_index("check").detail
    # Every clean run is held against the library's own output, so that none of them is made.
    wrong = failed[failed.str.startswith("Norm and unembedding and the library's own output differ")]
    assert {*failed.index} - {*wrong.index} == {"positions are the words they are called"}
    assert "head of normed residual stream gives the logits" in wrong and len(failed) == 4
    assert "question's positions read" in failed.iloc[-1]
    with pytest.raises(
        ValueError, match="The check that attention and MLP .* fails on sample q1: Norm and unembedding"
    ):
        check_model(model, encoded)
