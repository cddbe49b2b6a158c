"""Removing is held against knocking out, counting against torch's counter, decoding against starting anew."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny import tiny_sample, tiny_tokenizer, tiny_vlm
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig

from benchmarks.pruning_timing import PARTS, cost_curves, measure_times, plan_times, summarize_times
from mmflow_utils.engine.checks import attention_pattern
from mmflow_utils.engine.closeness import check_close, rounding
from mmflow_utils.engine.pruning import (
    Pruning,
    compare_to_knockout,
    continue_prompt,
    greedy_decode,
    image_tokens_removed,
    prompt_embeds,
    read_prompt,
)
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.work import count_work, equal_work, prompt_lengths, work_of
from mmflow_utils.experiments.curation import answer, ask_questions
from mmflow_utils.experiments.pruning import WAY_COLORS, picture_sweep, prune_sweep
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import Variant

N_LAYERS, N_NEW = 4, 5
FAMILIES = [("llava", None), ("llava_next", 1), ("qwen2_5_vl", 2)]  # the last one counts in three dimensions
every_family = pytest.mark.parametrize(("family", "n_kv_heads"), FAMILIES)
every_kernel = pytest.mark.parametrize("kernel", ["sdpa", "eager"])


def ready(folder, family="llava", n_kv_heads=None, **options):
    model = tiny_vlm(family, n_kv_heads=n_kv_heads, n_layers=N_LAYERS, **options)
    return model, encode(model, tiny_sample(folder))


def image_of(encoded):
    return sorted(encoded.positions["image"] + encoded.positions.get("image_newline"))


def knocked_out(model, encoded, gone, *from_layers):
    """Give the last position's logits with some tokens blocked from every other token, the plain way."""
    others = tuple(p for p in range(encoded.positions.n_tokens) if p not in gone)
    planned = [Variant(layers=range(n, N_LAYERS), target=others, source=tuple(gone)) for n in from_layers]
    found = run_reference(model, encoded, planned).variants
    return found if len(from_layers) > 1 else found[0]


def first_logits(model, encoded, pruning):
    with image_tokens_removed(model, encoded, pruning) as removal:
        logits, cache = read_prompt(model, prompt_embeds(model, encoded))
    return logits, cache, removal


@every_kernel
@every_family
def test_removing_is_knocking_out(family, n_kv_heads, kernel, tmp_path):
    model, encoded = ready(tmp_path, family, n_kv_heads)
    with model.attention_kernel(kernel):
        plain = knocked_out(model, encoded, image_of(encoded), *range(N_LAYERS + 1))
        prunings = [Pruning(from_layer=n) for n in range(N_LAYERS + 1)]
        removed = torch.stack([first_logits(model, encoded, pruning)[0] for pruning in prunings])
    differences = (removed[:, None] - plain).abs().amax(-1)
    assert differences.diag().max() < 2e-5
    # The control: a layer more, or a layer less, is another thing.
    assert differences[~torch.eye(N_LAYERS + 1, dtype=torch.bool)].min() > 1e-3


@every_family
@pytest.mark.parametrize("choice", ["random", "attention"])
def test_tokens_that_are_kept_go_on_as_they_would_without_the_others(choice, family, n_kv_heads, tmp_path):
    model, encoded = ready(tmp_path, family, n_kv_heads)
    pruning = Pruning(from_layer=2, n_kept=5, choice=choice)
    logits, _, removal = first_logits(model, encoded, pruning)
    gone = [p for p in image_of(encoded) if p not in removal.kept]
    assert len(gone) == len(image_of(encoded)) - 5
    assert torch.allclose(logits, knocked_out(model, encoded, gone, 2), atol=2e-5)
    other = [p for p in image_of(encoded) if p not in gone] + gone[5:]
    assert not torch.allclose(logits, knocked_out(model, encoded, sorted(other), 2), atol=1e-3)


def test_all_in_float64_too(tmp_path):
    model, encoded = ready(tmp_path, dtype=torch.float64)
    logits, cache, _ = first_logits(model, encoded, Pruning(from_layer=1))
    assert logits.dtype == cache.layers[3].keys.dtype == torch.float64
    assert (logits - knocked_out(model, encoded, image_of(encoded), 1)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_up_to_its_rounding(dtype, tmp_path):
    model, encoded = ready(tmp_path, n_kv_heads=2, dtype=dtype)
    for pruning in (Pruning(from_layer=1), Pruning(from_layer=2, n_kept=4, choice="attention")):
        assert compare_to_knockout(model, encoded, pruning) <= rounding(dtype)


def test_fused_attention_stays_fused_no_layer_is_given_a_mask(tmp_path):
    model, encoded = ready(tmp_path)
    embeds, masks = prompt_embeds(model, encoded), []
    with image_tokens_removed(model, encoded, Pruning(from_layer=2)):
        for layer in model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
            )
        _, cache = read_prompt(model, embeds)
        continue_prompt(model, 7, cache, encoded.positions.n_tokens, 3)
    assert masks == [None] * (3 * N_LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("from_layer", [0, 2])
@pytest.mark.parametrize(
    ("family", "n_kv_heads", "kernel"), [("llava", 2, "eager"), *((*one, "sdpa") for one in FAMILIES)]
)
def test_decoding_is_starting_anew_for_each_token(from_layer, family, n_kv_heads, kernel, tmp_path):
    model, encoded = ready(tmp_path, family, n_kv_heads)
    anew = []
    for _ in range(N_NEW):
        longer = encode(model, encoded.sample, answer_prefix=anew)
        anew.append(int(knocked_out(model, longer, image_of(longer), from_layer).argmax()))
    pruning = Pruning(from_layer=from_layer)
    with model.attention_kernel(kernel), image_tokens_removed(model, encoded, pruning):
        prompt = prompt_embeds(model, encoded)
        logits, cache = read_prompt(model, prompt)
        new = continue_prompt(model, int(logits.argmax()), cache, int(prompt[1].max()) + 1, N_NEW)
    assert new == anew


def test_a_wrong_rotary_position_would_show(tmp_path):
    model, encoded = ready(tmp_path)
    with image_tokens_removed(model, encoded, Pruning(from_layer=0)) as removal:
        _, cache = read_prompt(model, prompt_embeds(model, encoded))
        right = [cache.layers[0].keys.clone()]
        continue_prompt(model, 7, cache, encoded.positions.n_tokens, 2)
        right.append(cache.layers[0].keys[:, :, -1].clone())
        _, cache = read_prompt(model, prompt_embeds(model, encoded))
        continue_prompt(model, 7, cache, len(removal.kept), 2)  # counted without the image
    assert torch.equal(cache.layers[0].keys[:, :, :-1], right[0])
    assert not torch.allclose(cache.layers[0].keys[:, :, -1], right[1], atol=1e-3)


@every_family
def test_removed_tokens_are_neither_computed_nor_cached(family, n_kv_heads, tmp_path):
    model, encoded = ready(tmp_path, family, n_kv_heads)
    n_tokens, n_image, rows = encoded.positions.n_tokens, len(image_of(encoded)), []
    hooks = [model.mlp(i).register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1])) for i in range(4)]
    embeds = prompt_embeds(model, encoded)
    rows.clear()
    with image_tokens_removed(model, encoded, Pruning(from_layer=3, n_kept=2)):
        _, cache = read_prompt(model, embeds)
        continue_prompt(model, 7, cache, n_tokens, 3)
    for hook in hooks:
        hook.remove()
    lengths = prompt_lengths(N_LAYERS, n_tokens, n_image, Pruning(from_layer=3, n_kept=2))
    assert lengths == [n_tokens] * 3 + [n_tokens - n_image + 2]
    assert rows == lengths + [1] * (2 * N_LAYERS)
    assert [layer.keys.shape[2] for layer in cache.layers] == [n + 2 for n in lengths]


@every_family
@pytest.mark.parametrize("from_layer", [1, 3])
def test_attention_keeps_what_the_librarys_own_pattern_ranks_first(from_layer, family, n_kv_heads, tmp_path):
    model, encoded = ready(tmp_path, family, n_kv_heads)
    _, _, removal = first_logits(model, encoded, Pruning(from_layer=from_layer, n_kept=4, choice="attention"))
    received = attention_pattern(model, encoded, from_layer - 1)[:, -1].mean(0)
    ranked = sorted(image_of(encoded), key=lambda p: -received[p])
    kept = [p for p in removal.kept if p in image_of(encoded)]
    assert kept == sorted(ranked[:4]) != sorted(ranked[-4:])


def test_random_choices_are_seeded_and_nested(tmp_path):
    model, encoded = ready(tmp_path)
    kept = [
        {*first_logits(model, encoded, Pruning(from_layer=2, n_kept=n, seed=seed))[2].kept}
        for n, seed in ((4, 0), (4, 0), (8, 0), (4, 1))
    ]
    assert kept[0] == kept[1] < kept[2] and kept[0] != kept[3]


def test_nothing_is_left_behind_even_by_an_error(tmp_path):
    model, encoded = ready(tmp_path)
    before = first_logits(model, encoded, None)[0]
    with (
        pytest.raises(RuntimeError),
        image_tokens_removed(model, encoded, Pruning(from_layer=1, n_kept=1, choice="attention")),
    ):
        raise RuntimeError
    assert torch.equal(first_logits(model, encoded, None)[0], before)
    assert model.text.config._attn_implementation == "sdpa"
    assert not any(layer._forward_pre_hooks for layer in model.layers)


@every_family
@pytest.mark.parametrize("from_layer", [1, 3, N_LAYERS])
def test_the_librarys_generate_says_the_same(from_layer, family, n_kv_heads, tmp_path):
    model, encoded = ready(tmp_path, family, n_kv_heads)
    pruning = Pruning(from_layer=from_layer)
    ids = greedy_decode(model, encoded, pruning, max_new_tokens=6)
    with image_tokens_removed(model, encoded, pruning):
        said = answer(model, encoded, max_new_tokens=6)
    assert model.tokenizer.decode(ids, skip_special_tokens=True).strip() == said


def test_decoding_stops_where_the_model_does(tmp_path):
    model, encoded = ready(tmp_path)
    new = greedy_decode(model, encoded, max_new_tokens=4)
    model.hf.generation_config.eos_token_id = new[1]
    assert greedy_decode(model, encoded, max_new_tokens=4) == new[: new.index(new[1]) + 1]


def test_the_comparison_to_the_knockout_can_fail(tmp_path):
    model, encoded = ready(tmp_path)
    for pruning in (Pruning(from_layer=1), Pruning(from_layer=2, n_kept=3), Pruning(from_layer=4)):
        assert compare_to_knockout(model, encoded, pruning) < 1e-5
    assert compare_to_knockout(model, encoded, Pruning(from_layer=1), knockout_from=2) > 1e-3
    said = r"Removing image tokens \(.*\) and knocking them out differ by .* on sample q1, more than the tolerance of"
    with pytest.raises(ValueError, match=said):
        compare_to_knockout(model, encoded, Pruning(from_layer=1), knockout_from=2, tolerance=1e-3)


def test_what_is_no_number_is_not_close(tmp_path):
    _, encoded = ready(tmp_path)
    numbers = torch.tensor([0.25, 0.5])
    assert check_close(encoded, numbers, numbers + 0.125) == 0.125
    with pytest.raises(ValueError, match="differ by nan in weight on sample q1, .*: try again"):
        check_close(encoded, numbers * torch.nan, numbers, unit="weight", advice="try again")


@pytest.mark.parametrize(
    ("pruning", "words"),
    [
        (Pruning(from_layer=5), "from_layer must be 0 to 4"),
        (Pruning(from_layer=-1), "from_layer must be 0 to 4"),
        (Pruning(from_layer=1, n_kept=17), "n_kept must be 0 to the prompt's 16"),
        (Pruning(from_layer=0, n_kept=1, choice="attention"), "set from_layer to 1 or more"),
        (Pruning(from_layer=1, choice="best"), "one of random, attention, got 'best'"),
    ],
)
def test_what_can_not_be_removed_is_refused(pruning, words, tmp_path):
    model, encoded = ready(tmp_path)
    with pytest.raises(ValueError, match=words):
        greedy_decode(model, encoded, pruning)


def test_sliding_windows_and_prompts_without_picture_are_refused(tmp_path):
    text = MistralConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, pad_token_id=0,
    )  # fmt: skip
    model = tiny_vlm(text_config=text)
    with pytest.raises(ValueError, match="sliding windows"):
        greedy_decode(model, encode(model, tiny_sample(tmp_path)), Pruning(from_layer=1))
    model = tiny_vlm("llama", prompt="{question} ASSISTANT:")
    with pytest.raises(ValueError, match="shows no picture"):
        greedy_decode(model, encode(model, tiny_sample(tmp_path)), Pruning(from_layer=1))


@every_family
@pytest.mark.parametrize("pruning", [None, Pruning(from_layer=2), Pruning(from_layer=1, n_kept=3)])
def test_counted_work_is_what_torch_counts(pruning, family, n_kv_heads, tmp_path):
    model, encoded = ready(tmp_path, family, n_kv_heads)
    config, embeds = model.text.config, prompt_embeds(model, encoded)
    lengths = prompt_lengths(N_LAYERS, encoded.positions.n_tokens, len(image_of(encoded)), pruning)
    work = count_work(config, lengths, n_new=3)
    # torch's counter knows plain matrix products everywhere, fused attention only on a GPU.
    with model.attention_kernel("eager"), image_tokens_removed(model, encoded, pruning):
        counted = []
        with FlopCounterMode(display=False) as counter:
            logits, cache = read_prompt(model, embeds)
        counted.append(counter.get_total_flops())
        for n in (2, 3):
            n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            if n == 2:
                assert n_bytes == work.cache_bytes
            with FlopCounterMode(display=False) as counter:
                continue_prompt(model, int(logits.argmax()), cache, encoded.positions.n_tokens + n - 2, 2)
            counted.append(counter.get_total_flops())
    assert counted == [work.first_token_flops, *work.next_token_flops]


def test_work_by_hand():
    config = SimpleNamespace(
        hidden_size=2, intermediate_size=3, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
        vocab_size=5,
    )  # fmt: skip
    # Weights of a layer: q and o 2 x 2, k and v 2 x 1, gate, up and down 2 x 3; the unembedding is 2 x 5.
    weights, unembed = 2 * 4 + 2 * 2 + 3 * 6, 2 * 10
    work = count_work(config, [4, 1], n_new=2, itemsize=2)
    scores_and_values = 2 * (2 * 1) * (4 * 4 + 1 * 1) * 2  # two heads of width 1, twice: scores, mixed values
    assert work.first_token_flops == 2 * weights * 5 + scores_and_values + unembed
    assert work.next_token_flops == (2 * weights * 2 + 2 * (2 * 1) * (5 + 2) * 2 + unembed,)
    assert work.cache_bytes == 2 * 1 * 1 * 5 * 2
    with pytest.raises(ValueError, match="2 prompt lengths, one a layer"):
        count_work(config, [4])


def test_equal_work_is_equal_up_to_a_token(tmp_path):
    model, encoded = ready(tmp_path, "llava_next", 2)
    n_image = len(image_of(encoded))

    def flops(pruning):
        return work_of(model, encoded, pruning).first_token_flops

    for n_without in range(3):
        target = flops(Pruning(from_layer=N_LAYERS - n_without))
        rival = equal_work(model, encoded, Pruning(from_layer=N_LAYERS - n_without), choice="random")
        assert flops(rival) <= target
        assert rival.n_kept == n_image or flops(replace(rival, n_kept=rival.n_kept + 1)) > target
    # The last two of four layers are those from layer 2 on; a third is more than layer 2 on can save.
    assert rival == Pruning(from_layer=2, n_kept=0)
    assert equal_work(model, encoded, Pruning(from_layer=1), choice="random") is None
    # Beyond the last layer there is none to remove from, as for FastV's in a model of one layer.
    intact = Pruning(from_layer=N_LAYERS)
    assert equal_work(model, encoded, intact, choice="random", from_layer=N_LAYERS + 1) is None
    assert equal_work(model, encoded, intact, choice="random", from_layer=N_LAYERS) is not None


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    model = tiny_vlm("llava_next", n_layers=N_LAYERS, n_kv_heads=2)
    samples = [
        tiny_sample(folder, sample_id=f"q{n}", seed=n, answer="?", question=question)
        for n, question in enumerate(("What is it?", "Is it red or blue?"))
    ]
    # Labels that one of the two answers meets, whatever its letter case.
    said = answer(model, encode(model, samples[0]))
    samples[0] = replace(samples[0], answer=said.upper())
    return model, samples, prune_sweep(model, samples, removed=[1, 2, 4], progress=False)


@pytest.mark.slow
def test_the_sweep_has_each_way_at_each_depth_that_it_can_reach(swept):
    _, samples, result = swept
    frame = result.frame
    ours, random, fastv, _ = ("No image in the last layers", "Random tokens", "FastV", "Smaller picture")
    assert {ours, random, fastv} == {*frame.way} < {*WAY_COLORS}
    depths = {way: sorted({*part.n_layers_without}) for way, part in frame.groupby("way")}
    assert depths == {ours: [0, 1, 2, 4], random: [0, 1, 2], fastv: [0, 1, 2]}
    assert len(frame) == len(samples) * 10 and result.max_check_diff < 1e-4
    here = frame.set_index(["sample_id", "n_layers_without", "way"]).sort_index()
    assert (here.xs(0, level="n_layers_without")[["work_pct", "cache_pct", "same_pct"]] == 100).all(axis=None)
    assert (here.xs(ours, level="way").loc["q0"].n_kept.tolist()) == [here.n_image.iloc[0], 0, 0, 0]
    per_token = 100 / (frame.n_image.max() + 1)
    wide = frame.pivot(index=["sample_id", "n_layers_without"], columns="way", values="work_pct").dropna()
    assert (wide[random] <= wide[ours]).all() and (wide[ours] - wide[random] < per_token).all()


def test_a_row_says_what_the_model_says(swept):
    model, samples, result = swept
    frame = result.frame
    judged = ask_questions(model, samples, progress=False)
    intact = frame[(frame.n_layers_without == 0) & (frame.way == "Random tokens")]
    assert intact.prediction.tolist() == judged.prediction.tolist()
    assert (intact.correct_pct == 100).tolist() == judged.correct.tolist() == [True, False]
    encoded = encode(model, samples[1])
    ids = greedy_decode(model, encoded, Pruning(from_layer=2))
    row = frame[(frame.sample_id == "q1") & (frame.n_layers_without == 2) & (frame.n_kept == 0)].iloc[0]
    assert row.prediction == model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert (frame.same_pct == 100).tolist() == [
        said == judged.prediction[judged.sample_id == name].item()
        for said, name in zip(frame.prediction, frame.sample_id, strict=True)
    ]


def test_a_depth_that_is_not_there_is_refused(swept):
    model, samples, _ = swept
    with pytest.raises(ValueError, match="0 to 4 in this model"):
        prune_sweep(model, samples, removed=[5], progress=False)


def test_a_model_with_positions_in_three_dimensions_is_pruned_as_any_other(tmp_path):
    model, sample = tiny_vlm("qwen2_5_vl", n_layers=2), tiny_sample(tmp_path)
    embeds, at = prompt_embeds(model, encoded := encode(model, sample))
    assert at.shape[0] == 3 and int(at.max()) + 1 < embeds.shape[1]
    result = prune_sweep(model, [sample], removed=[1, 2], max_new_tokens=4, progress=False)
    assert result.max_check_diff < 1e-5
    intact = result.frame[result.frame.n_layers_without == 0]
    assert {*intact.prediction} == {answer(model, encoded, max_new_tokens=4)}
    assert len(measure_times(model, encoded, {"intact": None}, n_new=2, n_rounds=1)) == len(PARTS)


def test_a_family_for_which_removal_is_not_proven_is_refused_whatever_is_checked(tmp_path):
    model, sample = tiny_vlm("gemma3", n_layers=2), tiny_sample(tmp_path)
    said = "A prompt read without its picture's path .* differ by .*removing image tokens isn't proven for tiny-gemma3"
    for n_check in (0, 2):
        with pytest.raises(ValueError, match=said) as refused:
            prune_sweep(model, [sample], removed=[1], n_check=n_check, progress=False)
        assert "n_check" not in str(refused.value)
    with pytest.raises(ValueError, match="isn't proven"):
        greedy_decode(model, encode(model, sample))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_the_whole_picture_gives_the_models_own_answer_in_every_family(family, tmp_path):
    model, sample = tiny_vlm(family, n_layers=2), tiny_sample(tmp_path, size=(96, 96))
    frame = picture_sweep(model, [sample], scales=(1.0, 0.25), max_new_tokens=4, progress=False).frame
    said = answer(model, encode(model, sample), max_new_tokens=4)
    assert frame.prediction[0] == said and frame.same_pct[0] == 100
    assert frame.prediction[1] == said or frame.same_pct[1] == 0


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_smaller_picture_saves_work_only_where_there_are_tiles(family, tmp_path):
    model = tiny_vlm(family, n_layers=1)
    sample = tiny_sample(tmp_path, size=(96, 96))
    frame = picture_sweep(model, [sample], scales=(1.0, 0.25), progress=False).frame.set_index("scale")
    assert frame.loc[1.0, ["work_pct", "cache_pct", "same_pct"]].tolist() == [100, 100, 100]
    assert (frame.loc[0.25, "work_pct"] < 100) == (family == "llava_next")
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        picture_sweep(model, [sample], scales=(2.0,), progress=False)


def test_times_are_measured_in_each_part_and_beside_what_is_counted(tmp_path):
    model, encoded = ready(tmp_path)
    ways = plan_times(model, encoded)
    assert [*ways] == ["intact", *(f"no image in the last {n}" for n in (1, 2, 3))]
    deeper = tiny_vlm(n_layers=8)
    assert plan_times(deeper, encoded)["FastV, at the work of half"] == Pruning(
        from_layer=2, n_kept=5, choice="attention"
    )
    times = measure_times(model, encoded, ways, n_new=3, n_rounds=2)
    assert len(times) == 4 * 2 * len(PARTS) and (times.seconds > 0).all()
    wide = times.pivot(index=["way", "round"], columns="part", values="seconds")
    total = wide["first token with image"] + wide["next tokens"]
    assert total.tolist() == pytest.approx(wide["end to end"].tolist())
    table = summarize_times(times)
    here = table[table.way == "no image in the last 1"].set_index("part").counted_pct
    own, full = (work_of(model, encoded, one, n_new=3) for one in (Pruning(from_layer=3), None))
    assert here["first token"] == 100 * own.first_token_flops / full.first_token_flops < 100
    assert here["next tokens"] == 100 * sum(own.next_token_flops) / sum(full.next_token_flops) < 100
    curves = cost_curves(table, n_layers=N_LAYERS)
    measured = curves[(curves.cost == "measured time") & (curves.part == "first token")]
    assert measured.share_pct.tolist()[:4] == [0, 25, 50, 75] and measured["mean"].iloc[0] == 100
    assert {*curves.part[curves.cost == "counted work"]} == {"first token", "next tokens"}


def test_times_are_compared_within_their_round():
    seconds = {"intact": (1.0, 2.0, 4.0), "half": (0.5, 1.2, 1.0)}
    shared = {"part": "first token", "from_layer": 2, "n_kept": 0, "counted_pct": 60.0}
    times = pd.DataFrame(
        {"way": way, "round": n, "seconds": taken, **shared}
        for way, several in seconds.items()
        for n, taken in enumerate(several)
    )
    table = summarize_times(times).set_index("way")
    found = table.loc["half", ["n", "ms", "pct", "pct_q1", "pct_q3", "counted_pct"]].tolist()
    assert found == pytest.approx([3, 1000, 50, 37.5, 55, 60])
    assert table.loc["intact", "pct"] == 100
    with pytest.raises(ValueError, match="'intact' among the ways timed, got half"):
        summarize_times(times[times.way == "half"])
