"""How an answer in words is read: the one number in it, the one known answer in it, or the text as it stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from model_fusion.fuse.number import NUMBER, number

MANY = 20
"""Numbers are read as values, not as names, where more than this many different ones are answers."""


@dataclass(frozen=True)
class Reading:
    """`read(text)`: what the text says, None where it cannot be told. `label` says how, for a table's head."""

    label: str
    read: Callable[[str], str | float | None]
    numbers: bool = False


def plain(text: str) -> str:
    """`text` without outer white space, a full stop at the end, and case."""
    return text.strip().rstrip(".").casefold()


def one_of(answers: Iterable[str]) -> Callable[[str], str | None]:
    """Reads the one of `answers` that stands in a text as whole words; None for none and for several."""
    known = sorted({plain(answer) for answer in answers}, key=len, reverse=True)  # "not odd" before "odd"
    # Not inside a word, nor a part of another number (5 in -5, 10 in 10.5).
    found = re.compile(rf"(?<![\w.-])(?:{'|'.join(map(re.escape, known))})(?!\w|[.,]\d)")

    def read(text: str) -> str | None:
        said = set(found.findall(plain(text)))
        return said.pop() if len(said) == 1 else None

    return read


def reading_of(answers: Sequence[str], names: Iterable[str] = ()) -> Reading:
    """How texts are read that should be one of `answers` (those of all examples): as numbers where they are many
    different numbers; as the one known answer in the text where few answers come often; else exactly. `names` are
    further known answers."""
    known = {plain(answer) for answer in answers}
    if len(known) > MANY and all(NUMBER.fullmatch(answer) for answer in known):
        return Reading("the number in the answer", number, numbers=True)
    if 2 * len(known) <= len(answers):
        return Reading("the known answer in it", one_of([*known, *names]))
    return Reading("exact match", plain)
