"""The prompt, token by token, colored by position set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from IPython.display import HTML
from matplotlib.colors import to_rgb

from mmflow_utils.plots.style import SET_COLORS, ordered, set_color
from mmflow_utils.prompts.flows import pretty_name

_IMAGE_SETS = ("image", "image_newline", "image_related", "image_other")


def plot_prompt(tokens: Sequence[str], positions: Any) -> HTML:
    """Show a prompt's tokens, colored by position set, with a legend.

    A token has the color of the smallest set that holds it (an option within the question). Sets that are
    mere remainders (question_without_..., after_...) or unions (options) aren't drawn. A run of image tokens is a chip.

    Args:
        tokens: The prompt's tokens as text, one per position.
        positions: The prompt's `PositionSets`, or a mapping from name to positions.

    Returns:
        HTML without scripts, all text escaped, legible on light and dark pages: text keeps the page's color.

    Raises:
        ValueError: A set holds a position that the tokens don't have.
    """
    sets = {name: tuple(at) for name, at in getattr(positions, "sets", positions).items()}
    remainders = ("options",) * ("option_true" in sets) + ("after_image", "after_question")
    drawn = [n for n in sets if sets[n] and "_without_" not in n and n not in remainders]
    if (furthest := max((p for name in drawn for p in sets[name]), default=-1)) >= len(tokens):
        raise ValueError(f"a set holds position {furthest}, but there are {len(tokens)} tokens: are images expanded?")
    owner: dict[int, str] = {}
    for name in sorted(drawn, key=lambda n: -len(sets[n])):  # smaller sets last, so that they win
        owner |= dict.fromkeys(sets[name], name)
    image = {p for name in _IMAGE_SETS for p in sets.get(name, ())}
    chips = []
    for is_image, neighbors in groupby(range(len(tokens)), image.__contains__):
        run = list(neighbors)
        if is_image and len(run) > 3:
            chips.append(_image_chip(run, owner))
        else:
            chips += [_token_chip(tokens[p], p, owner.get(p)) for p in run]
    legend = [
        f'<span style="white-space:nowrap">{_dot(n)}{escape(pretty_name(n))} ({len(sets[n])})</span>'
        for n in ordered(drawn, tuple(SET_COLORS))
    ]
    absent = [f"{escape(pretty_name(n))}: {escape(why)}" for n, why in getattr(positions, "missing", {}).items()]
    note = f'<div style="font-size:0.85em;opacity:0.75">Not in this prompt: {"; ".join(absent)}</div>' if absent else ""
    return HTML(
        '<div class="mmflow-prompt" style="max-width:60em;line-height:2.1">'
        f'<div style="display:flex;flex-wrap:wrap;gap:0 1.2em;font-size:0.9em">{"".join(legend)}</div>'
        f'<div style="font-family:monospace;overflow-wrap:anywhere">{"".join(chips)}</div>{note}</div>'
    )


def _dot(name: str) -> str:
    # A border in the text's color, since dark colors would vanish on a dark page.
    square = "display:inline-block;width:0.8em;height:0.8em;margin-right:0.35em;border-radius:2px"
    return f'<span style="{square};background:{set_color(name)};border:1px solid currentColor"></span>'


def _chip_style(name: str | None) -> str:
    base = "unicode-bidi:isolate;padding:0.1em 0.15em;margin:0 1px;border-radius:3px"
    if name is None:
        return f"{base};opacity:0.75"
    if name == "last":  # its near-black would vanish on a dark page
        return f"{base};background:rgba(128,128,128,0.3);border-bottom:3px solid currentColor"
    red, green, blue = (round(255 * part) for part in to_rgb(set_color(name)))
    return f"{base};background:rgba({red},{green},{blue},0.22);border-bottom:3px solid {set_color(name)}"


def _token_chip(token: str, position: int, name: str | None) -> str:
    shown = token.replace("<0x0A>", "⏎").replace("Ċ", "⏎").replace("\n", "⏎")
    shown = shown.replace("▁", "·").replace("Ġ", "·").replace(" ", "·")
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in shown) or "∅"
    hint = f"position {position}" + (f": {pretty_name(name)}" if name else "")
    return f'<span title="{escape(hint)}" style="{_chip_style(name)}">{escape(shown)}</span><wbr>'


def _image_chip(run: list[int], owner: Mapping[int, str]) -> str:
    kinds = Counter(owner[p] for p in run)
    parts = [f"{_dot(n)}{k} {escape(pretty_name(n).lower())}" for n, k in kinds.most_common()]
    inner = f" = {' + '.join(parts)}" if len(kinds) > 1 else ""
    hint = f"positions {run[0]} to {run[-1]}"
    return f'<span title="{hint}" style="{_chip_style("image")}">{len(run)} image tokens{inner}</span><wbr>'
