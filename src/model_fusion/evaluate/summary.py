"""From the finished cells of an audit to rows with intervals and paired differences. Plain JSON types throughout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model_fusion.evaluate.controls import CONTROLS, FUSED
from model_fusion.evaluate.statistics import interval, paired
from model_fusion.evaluate.tasks.base import Metric

Scores = dict[int, dict[str, float]]
"""Scores by seed."""
Group = tuple[str, str, int | None]
"""(control, variant, labels)."""


def summarise(cells: Mapping[str, Mapping[str, Any]], metric: Metric) -> dict[str, Any]:
    """`rows`: one a control, variant and label count, with each score's interval over seeds and the paired
    difference "fusion minus control" on the same seeds and labels (a control without seeds counts for each).
    `skipped`: controls that make no sense here, and why. `cost`: seconds in all."""
    grouped: dict[Group, Scores] = {}
    skipped: dict[str, str] = {}
    for cell in cells.values():
        if "not_applicable" in cell:
            skipped[cell["control"]] = cell["not_applicable"]
        for outcome in cell.get("outcomes", ()):
            key = (cell["control"], outcome["variant"], cell["labels"])
            grouped.setdefault(key, {})[cell["seed"]] = outcome["scores"]
    order = list(CONTROLS)
    rows = [
        _row(group, scores, grouped.get((FUSED, "", group[2])), metric)
        for group, scores in sorted(grouped.items(), key=lambda pair: (order.index(pair[0][0]), -(pair[0][2] or 10**9)))
    ]
    return {
        "rows": rows,
        "skipped": [{"control": key, "name": CONTROLS[key].name, "why": why} for key, why in skipped.items()],
        "cost": {
            "seconds": sum(cell.get("seconds", 0.0) for cell in cells.values()),
            "cpu_seconds": sum(cell.get("cpu_seconds", 0.0) for cell in cells.values()),
        },
    }


def skill_recovered(rows: Sequence[Mapping[str, Any]], metric: Metric) -> float | None:
    """(fusion - LLM alone) / (expert - LLM alone) of the metric's means; None where one was not measured, or where
    the expert is no better than the LLM told the input in words."""
    means = {
        row["control"]: row["scores"][metric.name]["mean"]
        for row in rows
        if row["labels"] is None and not row["variant"] and metric.name in row["scores"]
    }
    if not {FUSED, "1", "2"} <= set(means):
        return None
    room = (means["1"] - means["2"]) * (1 if metric.higher_is_better else -1)
    return None if room <= 0 else float((means[FUSED] - means["2"]) / (means["1"] - means["2"]))


def _row(group: Group, scores: Scores, fusion: Scores | None, metric: Metric) -> dict[str, Any]:
    key, variant, labels = group
    control = CONTROLS[key]
    names = [name for name in next(iter(scores.values())) if all(name in one for one in scores.values())]
    row: dict[str, Any] = {
        "control": key,
        "name": control.name,
        "variant": variant,
        "labels": labels,
        "rules_out": control.rules_out,
        "seeded": control.seeded,
        "scores": {name: interval([one[name] for one in scores.values()]).to_json() for name in names},
        "by_seed": {str(seed): scores[seed] for seed in sorted(scores)},
    }
    if fusion is not None and key != FUSED:
        # What has no seed is the same number beside every seed of the fusion.
        same = scores if control.seeded else dict.fromkeys(fusion, next(iter(scores.values())))
        compared = [name for name in dict.fromkeys((metric.name, "agreement", "paraphrases")) if name in names]
        row["difference"] = {
            name: paired(_column(fusion, name), _column(same, name)).to_json()
            for name in compared
            if all(name in one for one in fusion.values()) and set(fusion) & set(same)
        }
    return row


def _column(scores: Scores, name: str) -> dict[int, float]:
    return {seed: one[name] for seed, one in scores.items()}
