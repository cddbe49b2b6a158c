"""The conversations in which LLaVA's own code asks the paper's models, and whether a prompt is one, token for token.

problem, detail = judge_prompt(model, sample, own=False)

A model whose vocabulary has tokens for turns is asked in its own chat template; one without, in Vicuna's words.
"""

from typing import Any

from mmflow_utils.data.sample import Sample
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded

__all__ = ["PAPER", "expected_text", "judge_text", "judge_tokens"]

ASKED = "<image>\n{question} \nAnswer the question using a single word or phrase."
# llava/conversation.py: system, roles and separators as they stand there, put together as get_prompt() does.
_VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
           "The assistant gives helpful, detailed, and polite answers to the user's questions.")  # fmt: skip
_LLAMA_3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def _llama_3_turn(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"


PAPER = {
    "vicuna_v1": " ".join([_VICUNA, f"USER: {ASKED}", "ASSISTANT:"]),
    "llava_llama_3": "<|eot_id|>".join(
        [_llama_3_turn("system", _LLAMA_3), _llama_3_turn("user", ASKED), _llama_3_turn("assistant", " \n")]
    ),
}
_TURNS = {"<|start_header_id|>": "llava_llama_3", "<|im_start|>": "", "<start_of_turn>": ""}  # "": its own template
# What LLaVA's tokenizer_image_token makes of vicuna_v1 with Llama's vocabulary: up to the picture, right after it, at
# the end. As many public records of its input_ids have it, whichever tokenizer's code runs here.
# fmt: off
BEFORE = (
    1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892, 13173,
    29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901, 29871,
)
# fmt: on
AFTER, AT_END = (29871, 13), (319, 1799, 9047, 13566, 29901)


def expected_text(model: VLM) -> tuple[str, str]:
    """Name the conversation that a model's vocabulary calls for, and spell it with its placeholders.

    Raises:
        ValueError: It should have a chat template of its own, but its files hold none.
    """
    known = model.tokenizer.get_vocab()
    name = next((name for turn, name in _TURNS.items() if turn in known), "vicuna_v1")
    text = PAPER[name] if name else _own_template(model)
    return name or "the checkpoint's chat template", text if model.processor else text.replace("<image>", "{caption}")


def _own_template(model: VLM) -> str:
    """Fill the checkpoint's chat template with the paper's question, and put our placeholder for the picture back."""
    asker = next((part for part in (model.processor, model.tokenizer) if getattr(part, "chat_template", None)), None)
    if asker is None:
        raise ValueError("Expected a chat_template beside the tokenizer, which knows turns, but there is none.")
    said: Any = ASKED.partition("\n")[2]
    for content in ([{"type": "image"}, {"type": "text", "text": said}], ASKED):
        try:
            turns = [{"role": "user", "content": content}]
            text = asker.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template for text alone adds a list to a text: jinja raises what it likes
            continue
        return text.removeprefix(model.tokenizer.bos_token or "").replace(model.image_token, "<image>")
    raise ValueError("Expected a chat_template that takes a picture and a text, but the checkpoint's takes neither.")


def judge_text(model: VLM, *, own: bool) -> str:
    """Hold a model's prompt against its conversation, and say which one it is.

    Args:
        model: Its weights may be missing.
        own: It was trained in this project, where conversations begin with the user's turn.

    Raises:
        ValueError: The first difference.
    """
    name, text = expected_text(model)
    if model.prompt == text:
        return name
    if own and (begin := text.find(model.prompt[:8])) > 0:
        name, text = f"{name} from the user's turn on, as it was trained", text[begin:]
        if model.prompt == text:
            return name
    at = next((n for n, (a, b) in enumerate(zip(model.prompt, text, strict=False)) if a != b), len(model.prompt))
    here, there = (repr(words[max(0, at - 8) : at + 24]) for words in (model.prompt, text))
    raise ValueError(f"The prompt has {here} where {name} has {there}, from character {at} on.")


def judge_tokens(model: VLM, encoded: Encoded, *, own: bool) -> str:
    """Hold a prompt's tokens against LLaVA's own way: the texts about the picture are cut each by itself.

    Raises:
        ValueError: The first token that differs.
    """
    sample, ids = encoded.sample, encoded.inputs["input_ids"][0].tolist()
    before, after = _cut(model, sample, apart=not own)
    middle = ids[len(before) : len(ids) - len(after)]
    for place, ours, theirs in (
        ("from the beginning", ids[: len(before)], before),
        ("from the picture on", ids[len(ids) - len(after) :], after),
    ):
        _same(model, place, ours, theirs)
    known = {*model.tokenizer.get_added_vocab().values(), model.image_token_id}
    stray = [token for token in middle if token not in known and model.tokenizer.decode([token]).strip()]
    if stray:
        raise ValueError(f"Expected image tokens between the two texts, got {model.tokenizer.decode(stray[:8])!r}.")
    if not own and before[1:4] == list(BEFORE[1:4]):  # Llama's vocabulary, so numbers can be compared
        _same(model, "from the beginning", before, list(BEFORE))
        _same(model, "right after the picture", after[:2], list(AFTER))
        _same(model, "at the end", after[-5:], list(AT_END))
    return f"{len(before)} tokens before the picture, {len(after)} after it"


def _cut(model: VLM, sample: Sample, *, apart: bool) -> tuple[list[int], list[int]]:
    """Cut what stands before and after the picture, each by itself or the whole at once."""
    text = model.prompt.replace("{question}", sample.question).replace("{caption}", sample.caption or "")
    begins = bool(model.tokenizer.bos_token) and not text.startswith(model.tokenizer.bos_token)
    if "<image>" not in text:
        return model.tokenizer(text, add_special_tokens=begins)["input_ids"], []
    if apart:
        before, after = text.split("<image>")
        first, then = (model.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
        return [model.tokenizer.bos_token_id] * begins + first, then
    ids = model.tokenizer(text.replace("<image>", model.image_token), add_special_tokens=begins)["input_ids"]
    at = ids.index(model.image_token_id)
    return ids[:at], ids[at + 1 :]


def _same(model: VLM, place: str, ours: list[int], theirs: list[int]) -> None:
    if ours == theirs:
        return
    at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    here, there = (model.tokenizer.convert_ids_to_tokens(part[at : at + 3]) for part in (ours, theirs))
    raise ValueError(f"Token {at} {place} begins {here} here, but {there} in LLaVA's own code.")
