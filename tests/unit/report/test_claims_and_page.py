"""Claims follow from the numbers by rules; the page holds them, escaped, with its plots inline."""

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from model_fusion.evaluate.statistics import interval
from model_fusion.report.claims import claims
from model_fusion.report.page import page
from model_fusion.report.plots import printable
from model_fusion.report.table import print_audit, shown


def row(control: str, scores: list[float], against: list[float] | None = None, **more: Any) -> dict[str, Any]:
    """A row of made-up agreement scores; `against`: the fusion's on the same seeds."""
    found: dict[str, Any] = {
        "control": control,
        "name": f"control <{control}>",
        "variant": "",
        "labels": None,
        "rules_out": "something",
        "seeded": len(scores) > 1,
        "scores": {"agreement": interval(scores).to_json()},
        "by_seed": {str(seed): {"agreement": value} for seed, value in enumerate(scores)},
        **more,
    }
    if against is not None:
        same = scores if len(scores) > 1 else scores * len(against)
        found["difference"] = {"agreement": interval([a - b for a, b in zip(against, same, strict=True)]).to_json()}
    return found


FUSED = [1.0, 0.99, 1.0, 0.98, 1.0]


@pytest.fixture
def report() -> dict[str, Any]:
    metric = {"name": "agreement", "label": "agreement", "higher_is_better": True, "digits": 3}
    turn = {"prompt": "<|table|> & you?", "fused": "fine", "oracle": "well"}
    gates = [
        {"token": "Hit $5\n", "prompt": True, "gate": {"25": 0.1}},
        {"token": "é", "prompt": False, "gate": {"25": 0.9}},
    ]
    return {
        "fusion": {"folder": "out", "base": "smollm2", "bridge": {"kind": "gated"}, "reads": "output"},
        "task": {"name": "cards", "labels": 200, "questions": 280, "test": 80, "classes": 2, "metric": metric,
                 "landmarks": {"always stick": 0.6}},
        "seeds": {"count": 5, "enough": True, "quick": False, "vary": "the start"},
        "training": {},
        "machine": {},
        "versions": {},
        "rows": [
            row("fused", FUSED),
            row("1", [1.0], FUSED),
            row("3", [0.4], FUSED, variant="badly"),
            row("3", [1.0], FUSED, variant="plainly"),
            row("4b", [0.5, 0.52, 0.48, 0.5, 0.51], FUSED),
            row("5", [0.6, 0.7, 0.5, 0.6, 0.65], FUSED),
            row("5", [0.99, 0.99, 1.0, 0.99, 0.98], FUSED, labels=32),
            row("fused", FUSED, labels=32),
            row("7", [1.0], FUSED),
            row("10", [0.3], FUSED),
            row("11", [1.0], FUSED),
            row("12", [0.97, 0.98, 0.99, 0.96, 0.97], variant="exchanged"),
        ],
        "skipped": [{"control": "6", "name": "raw input", "why": "no numbers"}],
        "cost": {"seconds": 10.0, "cpu_seconds": 9.0},
        "speech": {"prompts": 50, "kl_mean": 1.4, "kl_by_prompt": [1.4], "identical_without_expert": True,
                   "perplexity": {"bridge_on": 36.0, "bridge_off": 36.0, "beside_expert": 41.5, "told_instead": 40.0,
                                  "bytes": 2793}, "samples": [turn],
                   "gates": {"about the task": gates, "unrelated": []}},
        "answers": [],
    }  # fmt: skip


def verdict(report: dict[str, Any], start: str) -> bool | None:
    (found,) = (claim for claim in claims(report) if claim.claim.startswith(start))
    return found.supported


def test_claims_follow_the_numbers(report: dict[str, Any]) -> None:
    assert verdict(report, "The fused model answers with the expert's skill") is True
    assert verdict(report, "The answers depend on the row's own signal") is True
    assert verdict(report, "A trained expert is needed. (32 labels)") is False
    assert verdict(report, "The LLM reads the expert") is True
    assert verdict(report, "The LLM adds skill to the expert") is False
    assert verdict(report, "The fusion answers better than a tool call") is True
    assert verdict(report, "The fusion answers better than a logit bias") is False
    assert verdict(report, "The fusion answers better than the LLM plainly told") is False
    assert verdict(report, "The fusion passes on more than one bit") is False
    assert verdict(report, "Without the expert") is True
    assert verdict(report, "With the expert present") is False


def test_other_numbers_turn_each_claim_round(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    by = {(r["control"], r["labels"], r["variant"]): r for r in other["rows"]}
    by["fused", None, ""]["scores"]["agreement"]["mean"] = 0.9
    by["4b", None, ""]["difference"]["agreement"] = interval([0.1, -0.1, 0.0, 0.05, 0.0]).to_json()
    by["12", None, "exchanged"]["scores"]["agreement"]["mean"] = 0.6
    by["10", None, ""]["difference"]["agreement"] = interval([-0.1, -0.12]).to_json()
    other["task"]["classes"] = 10
    other["speech"]["kl_mean"] = 0.05
    other["speech"]["identical_without_expert"] = False
    other["speech"]["perplexity"]["bridge_on"] = 40.0
    assert verdict(other, "The fused model answers with the expert's skill") is False
    assert verdict(other, "The answers depend on the row's own signal") is False
    assert verdict(other, "The LLM reads the expert") is False
    assert verdict(other, "The fusion answers better than a tool call") is False
    assert verdict(other, "Without the expert") is False
    assert verdict(other, "With the expert present") is True
    assert not any("one bit" in claim.claim for claim in claims(other))


def test_unreadable_answers_are_told(report: dict[str, Any]) -> None:
    def because() -> str:
        return next(c.because for c in claims(report) if c.claim.startswith("The fusion answers better than a tool"))

    assert "can be read" not in because()
    next(r for r in report["rows"] if r["control"] == "10")["scores"]["parsed"] = interval([0.25]).to_json()
    assert "only 25% of the control's answers hold an answer that can be read" in because()


def test_a_metric_where_less_is_better(report: dict[str, Any]) -> None:
    report["task"]["metric"] = {"name": "error", "label": "error", "higher_is_better": False, "digits": 2}
    for entry in report["rows"]:
        entry["difference"] = {"error": interval([-5.0, -5.1, -4.9, -5.0, -5.2]).to_json()}
    assert verdict(report, "The fusion answers better than a tool call") is True
    report["task"]["metric"]["higher_is_better"] = True
    assert verdict(report, "The fusion answers better than a tool call") is False


def test_too_few_seeds_leave_claims_open(report: dict[str, Any]) -> None:
    report["seeds"] |= {"count": 2, "enough": False, "quick": True}
    assert verdict(report, "The answers depend on the row's own signal") is None
    assert verdict(report, "The fusion can do what a tool call cannot") is None


def test_the_page_is_whole_and_escaped(report: dict[str, Any]) -> None:
    text = page(report, claims(report), lambda figure: figure.subplots().plot([0, 1]))
    assert text.startswith("<!doctype html>")
    assert text.count("<svg") == 5  # controls, exchanged experts, few labels, the task's picture, one gate plot
    assert "&lt;|table|&gt; &amp; you?" in text
    assert "<|table|>" not in text
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "What the evidence does not support" in text
    assert "not applicable: no numbers" in text
    assert "QUICK LOOK" not in text
    assert page(report, claims(report)) == page(report, claims(report))
    report["seeds"] |= {"count": 2, "enough": False, "quick": True}
    assert "QUICK LOOK, 2 seeds: not an audit" in page(report, claims(report))


def test_the_table_shows_intervals_and_verdicts(report: dict[str, Any]) -> None:
    report["claims"] = [claim.to_json() for claim in claims(report)]
    out = io.StringIO()
    print_audit(report, Console(file=out, width=220))
    assert "0.994 [0.983, 1.005]" in out.getvalue()
    assert "not supported: The LLM adds skill" in out.getvalue()
    assert "raw input: not applicable, no numbers" in out.getvalue()


def test_formats() -> None:
    assert shown({"mean": 0.5, "low": None, "high": None}, 2) == "0.50"
    assert shown({"mean": -0.5, "low": -1, "high": 0.25}, 2, signed=True) == "-0.50 [-1.00, +0.25]"
    assert printable(" Hit $5\né") == "_Hit_USD5\\n?"
