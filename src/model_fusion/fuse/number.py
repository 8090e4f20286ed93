"""The one number in an answer."""

from __future__ import annotations

import re

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def number(text: str) -> float | None:
    """The number if exactly one is in `text`, else None."""
    found = NUMBER.findall(text)
    return float(found[0]) if len(found) == 1 else None
