"""Texts that say the same but for a decimal that stood on a tie, which another processor's rounding tips."""

import re
from itertools import zip_longest

DECIMAL = re.compile(r"[-−+]?\d+\.\d+")
WORD = re.compile(rf"{DECIMAL.pattern}|\w+|[^\w\s]")


class Said(str):
    """What a cell said: equal to another text if nothing but one decimal differs, by one in its last digit."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or (isinstance(other, str) and only_a_tie(self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def only_a_tie(text: str, other: str) -> bool:
    """Return whether two texts differ in one decimal alone, wherever it is said, and there by a last digit.

    Rounding tips one number in hundreds; where several move, something was computed otherwise.
    """
    different = {pair for pair in zip_longest(*map(WORD.findall, (text, other)), fillvalue="") if pair[0] != pair[1]}
    return len(different) == 1 and near(*different.pop())


def near(a: str, b: str) -> bool:
    """Return whether two words are decimals that differ by no more than a last digit."""
    if not (DECIMAL.fullmatch(a) and DECIMAL.fullmatch(b)):
        return False
    digits = len(a.partition(".")[2])
    return digits == len(b.partition(".")[2]) and abs(_number(a) - _number(b)) < 1.01 * 10**-digits


def _number(text: str) -> float:
    return float(text.replace("−", "-"))
