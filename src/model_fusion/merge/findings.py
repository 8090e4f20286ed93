"""What a look at models gives reason to warn of. Thresholds stand here, each with its reason."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Protocol

WRONG_BASE = 0.7
"""‖δ‖ / ‖base‖ of two unrelated models of equal norm is √2; fine-tunes lie far below 0.5."""
UNEQUAL = 10.0
"""Where one task vector is this many times as long as another, equal weights mean the longer one."""
PEAK = 300.0
"""max|θ| / rms: a Gaussian tensor of 10⁹ elements has 6.1, language models' outlier weights reach about 100."""
OUTLIER = 10.0
"""A tensor that changed this many times as much as its role's median."""


class _Looked(Protocol):
    @property
    def model(self) -> str: ...
    @property
    def vocabulary_is(self) -> str | None: ...
    @property
    def licences(self) -> list[str | None]: ...
    @property
    def dtypes(self) -> list[str]: ...


def findings(
    looked: Sequence[_Looked],
    groups: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Any],
    names: Sequence[str],
    base: str | None,
) -> list[str]:
    """Warnings, the gravest first. `groups` and `tensors` as `inspect` makes them."""
    total = groups["total"]["all"]
    found = [f"NaN or Inf in {place}" for place in total.get("not finite in", [])]
    if base is not None:
        found += _of_base(total["models"], base)
    found += _vocabularies(looked)
    found += _outliers(tensors, groups["by role"], names)
    if base is not None:
        found += _low_rank(total["models"], base)
    return found + _licences(looked) + _dtypes(looked)


def _of_base(models: Mapping[str, Any], base: str) -> list[str]:
    found = []
    lengths = {name: model["delta to base"] for name, model in models.items()}
    for name, length in lengths.items():
        if length == 0.0:
            found.append(f"{name} equals the base {base}: it adds nothing")
        elif length is not None and length > WRONG_BASE:
            found.append(f"{name} is {length:.2f} × the base's own norm away from {base}: is that its base?")
    return found + unequal(lengths)


def unequal(lengths: Mapping[str, float | None]) -> list[str]:
    """A warning where the longest task vector dwarfs the shortest. `lengths`: name → ‖τ‖; 0 and None are left out."""
    changed = {name: length for name, length in lengths.items() if length}
    if len(changed) < 2:
        return []
    least, most = min(changed, key=lambda n: changed[n]), max(changed, key=lambda n: changed[n])
    ratio = changed[most] / changed[least]
    text = f"{most}'s task vector is {ratio:.0f} × as long as {least}'s: weigh them, or check the base"
    return [text] if ratio > UNEQUAL else []


def _vocabularies(looked: Sequence[_Looked]) -> list[str]:
    odd = [model for model in looked if model.vocabulary_is not in (None, "equal")]
    return [f"{m.model}'s vocabulary is not the others' ({m.vocabulary_is}): set tokenizer_source" for m in odd]


def _outliers(tensors: Mapping[str, Any], roles: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        changes: dict[str, list[float]] = {}
        for tensor in tensors.values():
            length = tensor["models"][name]["delta to base"]
            if length:
                changes.setdefault(tensor["role"], []).append(length)
        middle = {role: median(lengths) for role, lengths in changes.items()}
        for label, tensor in tensors.items():
            own = tensor["models"][name]
            if (own["peak to rms"] or 0.0) > PEAK:
                found.append(f"{name}: {label} has an element of {own['peak to rms']:.0f} × its rms")
            length = own["delta to base"]
            if length and length > OUTLIER * middle[tensor["role"]]:
                times = length / middle[tensor["role"]]
                found.append(f"{name}: {label} changed {times:.0f} × as much as the median of its role")
    more = len(found) - 10
    return found[:10] + ([f"{more} more outlier tensors (in the JSON)"] if more > 0 else [])


def _low_rank(models: Mapping[str, Any], base: str) -> list[str]:
    return [
        f"{name}'s differences have rank {model['rank']:g} (median of {model['matrices']} matrices): "
        f"`model-fusion lora extract {name} --base {base}` would hold them"
        for name, model in models.items()
        if model.get("rank") is not None and model["matrices of full rank"] == 0 and model["rank"] > 0
    ]


def _licences(looked: Sequence[_Looked]) -> list[str]:
    named = {licence for model in looked for licence in model.licences if licence}
    silent = [model.model for model in looked if None in model.licences]
    found = [f"licences differ: {', '.join(sorted(named))}"] if len(named) > 1 else []
    return found + ([f"no licence named by {', '.join(silent)}"] if silent else [])


def _dtypes(looked: Sequence[_Looked]) -> list[str]:
    every = {tuple(model.dtypes) for model in looked}
    return ["dtypes differ: set dtype in the recipe"] if len(every) > 1 else []
