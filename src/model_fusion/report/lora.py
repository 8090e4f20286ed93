"""What `lora extract` and `lora merge` say when they are done. Takes results by their fields, imports no room."""

from collections.abc import Sequence
from typing import Any


def extracted(made: Any) -> str:
    """Ranks and kept energy by the last part of the name, then what is held whole or not at all."""
    lines = [f"{'tensors':<28}{'count':>6}{'rank':>12}{'kept energy: least':>22}{'all':>8}"]
    groups: dict[str, list[Any]] = {}
    for kept in made.kept:
        groups.setdefault(".".join(kept.name.split(".")[-3:-1]), []).append(kept)
    for name, group in groups.items():
        total = sum(kept.energy for kept in group) or 1.0
        share = sum(kept.energy * kept.share for kept in group) / total
        ranks = _range([kept.rank for kept in group])
        lines.append(f"{name:<28}{len(group):>6}{ranks:>12}{min(k.share for k in group):>22.4f}{share:>8.4f}")
    lines.append(f"wrote {made.folder}: {len(made.kept)} matrix pairs, kept energy {made.share:.4f}")
    if made.saved:
        lines.append(f"kept whole (modules_to_save): {_some(made.saved)}")
    if made.left:
        names = [
            f"{left.name}" + (f" (changed by {left.change:.2g})" if left.change is not None else "")
            for left in made.left
        ]
        reasons = "; ".join(sorted({left.why for left in made.left}))
        lines.append(f"NOT in the adapter: {_some(names)}: {reasons}")
    return "\n".join(lines)


def combined(made: Any) -> str:
    """Ranks and the least kept share."""
    least = min(made.shares, key=lambda name: made.shares[name])
    kept = f"kept energy of the exact sum at least {made.shares[least]:.4f} ({least})"
    return f"wrote {made.folder}: {len(made.ranks)} matrix pairs of rank {_range(list(made.ranks.values()))}, {kept}"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}–{high}"


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
