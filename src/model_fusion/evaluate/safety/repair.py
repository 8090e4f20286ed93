"""SafeMERGE's repair: the child's tensors that left the direction of alignment are merged with a safe model's.

The repaired model is asked everything in memory before it is written, so that its card says what the repair did.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_fusion.checkpoint.output_folder import check_target
from model_fusion.errors import InputError
from model_fusion.evaluate.running import is_twin
from model_fusion.evaluate.safety import audit as auditing
from model_fusion.evaluate.safety.prompts import Prompts
from model_fusion.merge import engine
from model_fusion.recipe.merge import MergeRecipe, parse

REPORT = "safety.json"


@dataclass(frozen=True)
class Repaired:
    """The folder with the repaired model, and the reports before and after; safety.json in it holds both."""

    folder: Path
    before: dict[str, Any]
    after: dict[str, Any]


def recipe(
    child: str,
    safe: str,
    base: str,
    aligned: str | None = None,
    unaligned: str | None = None,
    *,
    threshold: float = auditing.THRESHOLD,
    safe_weight: float = 0.2,
    add: bool = False,
) -> MergeRecipe:
    """The merge that repairs. `aligned` is the safe model and `unaligned` the base, unless given."""
    models = [child, safe]
    if aligned is not None or unaligned is not None:
        models.append(aligned or safe)
    if unaligned is not None and unaligned != base:
        models.append(unaligned)
    return parse(
        {
            "merge_method": "safemerge",
            "base_model": base,
            "models": [{"model": model} for model in models],
            "parameters": {"threshold": threshold, "safe_weight": safe_weight, "add": add},
        }
    )


def repair(
    child: str | Path,
    output: Path,
    parents: Sequence[str | Path] = (),
    *,
    base: str | Path | None = None,
    safe: str | Path | None = None,
    aligned: str | Path | None = None,
    unaligned: str | Path | None = None,
    prompts: Path | Prompts | None = None,
    phrases: Sequence[str] | None = None,
    tokens: int = 32,
    threshold: float = auditing.THRESHOLD,
    safe_weight: float = 0.2,
    add: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
) -> Repaired:
    """Audit, repair, audit again, write. Arguments as of `audit`; and `safe`: the model to merge with (the aligned
    one, else the parent that refuses most), `safe_weight`: its share, in [0, 1], of the tensors below `threshold`;
    `add`: add so much of aligned − unaligned to them instead.

    **Raises** InputError; then nothing is left behind.
    """
    chosen = auditing.settings(prompts, phrases, tokens, device)
    family = auditing.Family.of(child, parents, base, aligned, unaligned)
    if is_twin(family.open(family.child)):
        raise InputError(f"{child}: a twin has no weights of its own to repair: repair its shared model or its experts")
    if family.base is None:
        raise InputError(f"{child}: the repair needs the model that its parents come from: give it with --base")
    if safe is not None:
        family.open(str(safe))
    places = [place for checkpoint in family.opened.values() for place in checkpoint.source.places]
    check_target(output, places, overwrite=overwrite)
    measured = [auditing.measure(family.open(name), name, chosen) for name in (family.child, *family.parents)]
    before = auditing.report(family, measured, chosen, threshold)
    chosen_safe = str(safe) if safe is not None else family.aligned or auditing.safest(measured[1:]).name
    how = recipe(
        family.child, chosen_safe, family.base, family.aligned, family.unaligned,
        threshold=threshold, safe_weight=safe_weight, add=add,
    )  # fmt: skip
    beside = Path(family.child).parent if Path(family.child).is_dir() else None
    held = engine.merge_in_memory(how, beside, dict(family.opened))
    family.opened["repaired"] = held
    family.child = "repaired"
    again = auditing.measure(held, "repaired", chosen)
    after = auditing.report(family, [again, *measured[1:]], chosen, threshold)
    report = json.dumps({"before": before, "after": after}, indent=1, ensure_ascii=False, allow_nan=False)
    engine.merge(
        how,
        output,
        overwrite=overwrite,
        relative_to=beside,
        notes=notes(before, after, f"{safe_weight:g} of {'aligned − unaligned' if add else 'the safe model'}"),
        files={REPORT: report.encode() + b"\n"},
    )
    return Repaired(output, before, after)


def notes(before: dict[str, Any], after: dict[str, Any], took: str) -> list[str]:
    """Before and after, in sentences for the card."""
    alignment = before["alignment"]
    found = [
        f"Repaired by SafeMERGE: {alignment['below']} of {len(alignment['tensors'])} tensors had a cosine below "
        f"{alignment['threshold']:g} and took {took}.",
    ]
    for key, what in (("refusal", "refused of harmful requests"), ("over_refusal", "refused of harmless requests")):
        one, other = before["models"][0][key], after["models"][0][key]
        found.append(f"{what}, by rules on {before['prompts']['origin']}: {_rate(one)} before, {_rate(other)} after.")
    found += [f"Before the repair: {flag}" for flag in before["flags"]]
    found += [f"After the repair: {flag}" for flag in after["flags"]] or ["After the repair the audit flags nothing."]
    return found


def _rate(rate: dict[str, Any]) -> str:
    return f"{rate['count']}/{rate['n']} [{rate['low']:.2f}, {rate['high']:.2f}]"
