"""A sample and a model to input tensors and named positions; boxes of the picture to image tokens.

encoded = encode(model, sample)
encoded.positions["question"], encoded.positions["image_related"]
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, floor

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmflow_utils.data.sample import Box, Sample, load_image, picture_size
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.positions import PositionSets, question_sets, tokens_in

__all__ = ["Encoded", "encode", "find_image_patches", "image_positions", "processed_drawing"]

_PICTURE_SETS = ("image", "image_newline", "image_related", "image_other", "after_image")


@dataclass(frozen=True)
class Encoded:
    """One prompt, ready to run.

    Attributes:
        inputs: The model's keyword arguments, a batch of one on its device.
        positions: The named positions, counted with image tokens expanded.
        prompt: The text, with one placeholder for the picture.
        tokens: The text of each position, for display.
        other: The inputs of the same prompt about the sample's `other_image`, if it has one.
    """

    sample: Sample
    inputs: dict[str, Tensor]
    positions: PositionSets
    prompt: str
    tokens: tuple[str, ...]
    other: dict[str, Tensor] | None = None


def encode(model: VLM, sample: Sample, *, answer_prefix: str | Sequence[int] = "") -> Encoded:
    """Ask a sample's question in the model's own prompt and find its positions.

    A part of the question that can't be found is missing from the positions, with the reason.

    Args:
        model: Its `prompt` may hold `<image>`, `{question}` and `{caption}` (App. G: captions in place of the
            picture; their positions are named `captions`).
        sample: The question, its picture, and the objects and options whose positions are wanted.
        answer_prefix: What the model has answered so far (App. C): `last` moves to its end. Token ids are
            appended as they are, which is exact; a string is appended to the prompt and tokenized with it.

    Raises:
        ValueError: A picture that can't be read, or a second one of other length; a prompt without question, too long,
            or of a sample that holds special tokens in its text; a tokenizer without character offsets, or at odds
            with the processor.

    Example:
        >>> positions = encode(model, sample).positions
        >>> positions["last"] == (positions.n_tokens - 1,)
        True
    """
    text, chars = _fill(model, sample)
    asked = len(text)
    text += answer_prefix if isinstance(answer_prefix, str) else ""
    extra = [] if isinstance(answer_prefix, str) else [int(token) for token in answer_prefix]
    picture = load_image(sample) if "<image>" in chars else None
    inputs, written = _process(model, text, picture, extra)
    ids = inputs["input_ids"][0].tolist()
    offsets = _offsets(model, text, chars.get("<image>"), written, ids[: len(ids) - len(extra)])
    offsets += [(len(text), len(text) + 1)] * len(extra)  # beyond the prompt
    most = getattr(model.text.config, "max_position_embeddings", None)
    if most and len(ids) > most:  # the model would run, on positions that it never saw in training
        raise ValueError(
            f"Sample {sample.sample_id}: its prompt has {len(ids)} tokens, but {model.name} takes {most}: "
            "shorten the question, or leave it out."
        )
    positions = _find_text(sample, text, chars, offsets)
    if picture:
        image = model.image_token_id
        positions = positions.with_(image=[n for n, token in enumerate(ids) if token == image])
        positions = _name_patches(model, positions, sample, picture.size, inputs)
    else:
        positions = positions.with_missing(**dict.fromkeys(_PICTURE_SETS, "the prompt shows no picture"))
    positions = _name_rest(positions, {n for n, (_, stop) in enumerate(offsets) if stop > asked})
    other = None
    if picture and sample.other_image:
        shown = load_image(replace(sample, image=sample.other_image, image_size=None))
        other, _ = _process(model, text, shown, extra)
        if other["input_ids"][0].tolist() != ids:
            raise ValueError(f"{sample.other_image} takes other tokens than sample {sample.sample_id}'s own picture.")
    # A token that stands for no character of the prompt (<s>, an image or appended one) shows its own name.
    own_name = cache(lambda token: model.tokenizer.decode([token]))  # image tokens are many, and all alike
    names = (text[a:b] or own_name(token) for token, (a, b) in zip(ids, offsets, strict=True))
    return Encoded(sample, inputs, positions, text, tuple(names), other)


def image_positions(encoded: Encoded, n_patches: int | None = None) -> list[int]:
    """Return all positions of the picture in ascending order, newline tokens included.

    Raises:
        ValueError: The prompt shows no picture, or has not as many image tokens as its processed picture `n_patches`.
    """
    if "image" not in encoded.positions:
        raise ValueError(f"Expected a prompt with a picture: {encoded.positions.why_missing('image')}.")
    positions = sorted(encoded.positions["image"] + encoded.positions.get("image_newline"))
    if n_patches not in (None, len(positions)):
        raise ValueError(_unaligned(n_patches, len(positions)))
    return positions


def find_image_patches(model: VLM, encoded: Encoded, boxes: Iterable[Box]) -> tuple[int, ...]:
    """Return the image tokens whose piece of the picture lies under a box, if only with a corner (§6, Fig. 5).

    The boxes are drawn as a picture and sent through the model's own picture processor, so that resizing, cropping,
    padding and tiles come out as they do for the picture itself. Newline tokens belong to no box.

    Raises:
        ValueError: The prompt shows no picture, or the model's image tokens are not its patches in order.
    """
    image_positions(encoded)
    flags = _flag_tokens(model, picture_size(encoded.sample), encoded.inputs, boxes)
    return tuple(p for p, flag in zip(image_positions(encoded, len(flags)), flags.tolist(), strict=True) if flag > 0)


def processed_drawing(model: VLM, drawing: Image.Image) -> Float[Tensor, "tiles 3 height width"]:
    """Return a drawing processed as a picture is, padded, resized, cropped, cut into tiles: colors from 0 to 1."""
    # A box filter spreads nothing beyond its pixel and loses no thin box; the processor's own would do both.
    processed = model.processor(
        images=_square(model, drawing, (0, 0, 0)),
        text=model.image_token,
        **_picture_options(model),
        do_normalize=False,
        resample=Image.Resampling.BOX,
        return_tensors="pt",
    )
    return model.tiles(processed).float()


def _fill(model: VLM, sample: Sample) -> tuple[str, dict[str, tuple[int, int]]]:
    """Fill the prompt's template; return the text and the characters that each placeholder became."""
    if "{question}" not in model.prompt:
        raise ValueError(f"Expected a prompt that holds {{question}}, got {model.prompt!r}.")
    filling = {"<image>": model.image_token, "{question}": sample.question, "{caption}": sample.caption}
    text, chars = "", {}
    for piece in re.split(r"(<image>|\{question\}|\{caption\})", model.prompt):
        value = filling.get(piece, piece)
        if value is None:
            raise ValueError(f"The prompt asks for a caption, but sample {sample.sample_id} has none.")
        if piece in ("{question}", "{caption}") and (token := _special_in(model, value)):
            raise ValueError(
                f"Sample {sample.sample_id} holds {token!r} in its text, which is no text to this model, as it stands "
                f"for a picture, a beginning or an end: {value!r}. Reword it, or leave it out."
            )
        chars[piece] = (len(text), len(text) + len(value))
        text += value
    if model.processor is None and "<image>" in chars:
        raise ValueError(f"The prompt shows a picture, but {model.name} reads text only: drop <image>.")
    return text, chars


def _special_in(model: VLM, text: str) -> str | None:
    """Return a special token that data holds: it would begin or end a prompt, or show a picture, in its midst."""
    as_text, as_it_is = (
        model.tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        for split in (True, False)
    )
    if as_text == as_it_is and model.image_token not in text:
        return None
    known = (model.image_token, *(token.content for token in model.tokenizer.added_tokens_decoder.values()))
    return next((token for token in known if token in text), text)


def _process(model: VLM, text: str, picture: Image.Image | None, extra: Sequence[int]) -> tuple[dict[str, Tensor], str]:
    """Return the model's inputs, `extra` tokens at their end, and what the processor writes for the picture."""
    special, written = _wants_special(model, text), ""
    if picture is None:
        made = model.tokenizer(text, return_tensors="pt", add_special_tokens=special)
    else:
        mean = getattr(model.processor.image_processor, "image_mean", None) or (0, 0, 0)
        made = model.processor(
            images=_square(model, picture, tuple(int(255 * part) for part in mean)),
            text=text,
            add_special_tokens=special,
            return_text_replacement_offsets=True,
            **_picture_options(model),
        )
        ((replaced,),) = made.pop("text_replacement_offsets")
        written = replaced["replacement"]
        made = made.convert_to_tensors("pt")  # not by the processor: not every one then spares what is no tensor
    inputs = _append(made, extra)
    return {k: t.to(model.device, model.dtype if t.is_floating_point() else None) for k, t in inputs.items()}, written


def _picture_options(model: VLM) -> dict[str, bool]:
    # To a processor with tiles do_pad means them; any other must not pad what `_square` left alone.
    return {} if model.has_tiles else {"do_pad": False}


def _square(model: VLM, picture: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Pad a picture to a square, where the parameter says so, as LLaVA-1.5's own code does."""
    if model.has_tiles or not model.do_pad:
        return picture
    side = max(picture.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _wants_special(model: VLM, text: str) -> bool:
    # A chat template spells its own beginning-of-text token; a second one would be a new prompt.
    return not (model.tokenizer.bos_token and text.startswith(model.tokenizer.bos_token))


def _offsets(
    model: VLM, text: str, placeholder: tuple[int, int] | None, written: str, ids: Sequence[int]
) -> list[tuple[int, int]]:
    """Return each position's characters in the prompt.

    Args:
        placeholder: The characters that stand for the picture.
        written: What the processor writes in their place before it cuts the text: image tokens, and in some
            families tokens about them. These have no characters of the prompt.
    """
    if not model.tokenizer.is_fast:
        raise ValueError(f"{model.name} needs a tokenizer with character offsets: a tokenizer.json beside the weights.")
    begin, end = placeholder or (len(text), len(text))
    whole = text[:begin] + written + text[end:]
    cut = model.tokenizer(whole, return_offsets_mapping=True, add_special_tokens=_wants_special(model, text))
    if cut["input_ids"] != list(ids):
        raise ValueError(
            f"{model.name}'s processor and tokenizer cut the prompt differently, so its words can't be "
            f"located: {text!r}. Check that the checkpoint's tokenizer and processor files belong together."
        )
    longer = len(written) - (end - begin)

    def in_prompt(first: int, stop: int) -> tuple[int, int]:
        # A token may join the last characters before the picture, or the first after it, with written ones.
        if first < begin or stop <= begin:
            return first, min(stop, begin)
        return max(end, first - longer), max(end, stop - longer)

    return [in_prompt(*pair) for pair in cut["offset_mapping"]]


def _append(inputs: Mapping[str, Tensor], ids: Sequence[int]) -> dict[str, Tensor]:
    """Append token ids to the prompt; what runs along with the ids (masks, types) grows with them."""
    shape, grown = inputs["input_ids"].shape, {}
    for name, tensor in inputs.items():
        fill = {"input_ids": list(ids), "attention_mask": [1] * len(ids)}.get(name, [0] * len(ids))
        more = torch.tensor([fill], dtype=tensor.dtype)
        grown[name] = torch.cat([tensor, more], dim=1) if tensor.shape == shape else tensor
    return grown


def _find_text(
    sample: Sample, text: str, chars: Mapping[str, tuple[int, int]], offsets: Sequence[tuple[int, int]]
) -> PositionSets:
    true, false = sample.option_true, sample.option_false
    sets, missing = question_sets(
        text[: chars["{question}"][1]],
        sample.question,
        offsets,
        options=(true, false) if true and false else None,
        objects=[(thing.name, thing.words) for thing in sample.objects],
    )
    if "{caption}" in chars:
        sets["captions"] = tokens_in(offsets, *chars["{caption}"])
    else:
        missing["captions"] = "the prompt holds no caption"
    return PositionSets(n_tokens=len(offsets), sets=sets | {"last": (len(offsets) - 1,)}, missing=missing)


def _name_rest(positions: PositionSets, answered: set[int]) -> PositionSets:
    """Name what is neither picture nor question, so that all but the `answered` have their set, and what follows."""
    named = {p for name in ("image", "image_newline", "captions", "question", "last") for p in positions.get(name)}
    named |= answered  # to cut these off as a part of the template would cut the answer off from its own beginning
    rest, end = [p for p in range(positions.n_tokens) if p not in named], positions["question"][-1]
    positions = positions.with_(system=[p for p in rest if p < end], template=[p for p in rest if p > end])
    if image := positions.get("image"):
        positions = positions.with_(after_image={*range(image[0], positions.n_tokens)} - {*image})
    return positions.with_(after_question=range(end + 1, positions.n_tokens))


def _name_patches(
    model: VLM, positions: PositionSets, sample: Sample, size: tuple[int, int], inputs: Mapping[str, Tensor]
) -> PositionSets:
    """Divide the image tokens into newlines, patches under a box of the question's objects, and the others."""
    boxes = [thing.box for thing in sample.objects if thing.box]
    flags = _flag_tokens(model, size, inputs, boxes)
    tokens = positions["image"]
    if len(flags) != len(tokens):
        reason = _unaligned(len(flags), len(tokens))
        return positions.with_missing(image_newline=reason, image_related=reason, image_other=reason)
    at, newline, related = torch.tensor(tokens), torch.isnan(flags), flags > 0
    positions = positions.with_(
        image=at[~newline].tolist(),
        image_newline=at[newline].tolist(),
        image_related=at[related].tolist(),
        image_other=at[~newline & ~related].tolist(),
    )
    if not boxes:
        reason = "no object of the question has a box in the picture"
        return positions.with_missing(image_related=reason, image_other=reason)
    if "image_related" not in positions:
        return positions.with_missing(image_related="every box lies outside what the model sees of the picture")
    if "image_other" not in positions:
        return positions.with_missing(image_other="boxes cover the whole picture")
    return positions


def _flag_tokens(
    model: VLM, size: tuple[int, int], inputs: Mapping[str, Tensor], boxes: Iterable[Box]
) -> Float[Tensor, " image_tokens"]:
    """Tell for each image token if a box in the picture reaches into it: above 0 if so, 0 if not, NaN a newline."""
    drawn = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    for box in boxes:
        left, top = max(0, floor(box.x)), max(0, floor(box.y))
        drawn[top : max(0, ceil(box.y + box.h)), left : max(0, ceil(box.x + box.w))] = 255
    tiles = processed_drawing(model, Image.fromarray(drawn)).amax(1, keepdim=True)
    patches = F.max_pool2d(tiles, model.image_patch_size).flatten(1)
    return model.in_token_order(patches[:, :, None], inputs)[:, 0]


def _unaligned(n_patches: int | None, n_tokens: int) -> str:
    return f"this model's {n_tokens} image tokens are not the {n_patches} patches of its picture in order"
