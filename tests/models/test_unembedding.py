"""What a library's model does after its matrix is part of the unembedding: lens, engines and checks see it too."""

from dataclasses import replace

import pytest
import torch
from tiny import fill_weights, save, tiny_sample, tiny_tokenizer, tiny_vlm, wanted
from tiny_families import FAMILIES
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    StableLmConfig,
)
from transformers.models.auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mmflow_utils.engine.checks import check_model
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.experiments.lens import lens_logits, logit_lens
from mmflow_utils.models.load import load_model
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import Flow, variants

QUESTION_TO_LAST = Flow(source="question", target="last")


class Masked(LlamaForCausalLM):
    """A wrapper that never says some words, as Chameleon's doesn't say its image tokens."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., 10:40] = torch.finfo(out.logits.dtype).min
        return out


def text_only(config, kind=None, **shape):
    vocabulary = len(tiny_tokenizer(family="llama"))
    sizes = dict(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, pad_token_id=3)
    config = config(**sizes, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **shape)
    hf = (kind or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])(config).eval().requires_grad_(False)
    fill_weights(hf, 0)
    if hf._supports_sdpa:
        hf.set_attn_implementation("sdpa")
    return replace(tiny_vlm("llama", prompt="{question} ASSISTANT:"), hf=hf)


WRAPPERS = {
    "divided": lambda: text_only(GraniteConfig, logits_scaling=8, residual_multiplier=0.5, embedding_multiplier=3),
    "multiplied": lambda: text_only(CohereConfig, logit_scale=0.25),
    "capped": lambda: text_only(Gemma3TextConfig, head_dim=8, final_logit_softcapping=3.0),
    "masked": lambda: text_only(LlamaConfig, Masked),
}


@pytest.mark.parametrize("after", WRAPPERS)
def test_what_comes_after_the_matrix_is_in_every_number(after, tmp_path):
    model = WRAPPERS[after]()
    encoded = encode(model, tiny_sample(tmp_path))
    with torch.inference_mode():
        out = model.hf(**encoded.inputs, output_hidden_states=True)
        matrix_alone = model.unembed.matrix(out.hidden_states[-1][0, -1])
    own = out.logits[0, -1].float()
    assert (matrix_alone - own).abs().max() > 0.1  # the wrapper does something
    planned = variants(encoded.positions, [QUESTION_TO_LAST], window=1, n_layers=model.n_layers)
    run, plain = run_sweep(model, encoded, planned), run_reference(model, encoded, planned)
    for base in (run.base, plain.base, lens_logits(model, plain.resid_post)[-1]):
        torch.testing.assert_close(base, own, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(run.variants, plain.variants, atol=1e-4, rtol=1e-4)
    # The last layer by hand: the library's own model, with the edges closed in its mask.
    assert check_model(model, encoded)["passed"].all()
    assert logit_lens(model, [encoded.sample], progress=False).max_check_diff < 1e-5


@pytest.mark.parametrize("family", ["llava", "llava_next", *FAMILIES])
def test_each_family_unembeds_as_its_own_model_does(family):
    model, states = tiny_vlm(family, n_layers=1), torch.randn(2, 3, 32)
    assert torch.equal(model.unembed(states), model.unembed.matrix(states))
    assert "forward" not in vars(model.hf.base_model)


def test_a_wrapper_that_does_more_than_it_shows_is_refused_by_every_engine(tmp_path, monkeypatch):
    model = tiny_vlm()
    encoded = encode(model, tiny_sample(tmp_path))
    monkeypatch.setattr(type(model), "unembed", property(lambda self: self.hf.lm_head))
    head = model.hf.forward
    scaled = lambda *args, **kwargs: (out := head(*args, **kwargs)).__class__(logits=out.logits / 8)  # noqa: E731
    monkeypatch.setattr(model.hf, "forward", scaled)
    for measure in (run_sweep, run_reference):
        with pytest.raises(ValueError, match="Norm and unembedding and the library's own output differ by .* fit this"):
            measure(model, encoded, [])


@pytest.mark.parametrize("kind", [NemotronConfig, StableLmConfig])
def test_attention_in_code_of_its_own_is_for_the_reference_alone(kind, tmp_path):
    model = text_only(kind)
    encoded = encode(model, tiny_sample(tmp_path))
    planned = variants(encoded.positions, [QUESTION_TO_LAST], window=1, n_layers=model.n_layers)
    with pytest.raises(ValueError, match="attends in code of its own.*set method to reference"):
        run_sweep(model, encoded, planned)
    assert check_model(model, encoded)["passed"].all()
    assert run_reference(model, encoded, planned).variants.isfinite().all()


def test_attention_that_the_fused_kernel_can_not_do_is_refused_at_load(tmp_path):
    folder = save(text_only(Gemma2Config, head_dim=8, attn_logit_softcapping=2.0), tmp_path / "m")
    with pytest.raises(ValueError, match="does not support an attention implementation") as refused:
        load_model(wanted(folder, prompt="{question}"))
    assert "\n" not in str(refused.value) and issubclass(Gemma2ForCausalLM, torch.nn.Module)
