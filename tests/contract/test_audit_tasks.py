"""Every control runs on every built-in task, through the registry only; the trained answers are not judged here."""

from dataclasses import replace
from pathlib import Path

import pytest

from model_fusion.evaluate.audit import AuditSettings, run_audit
from model_fusion.evaluate.controls import CONTROLS, TOLD
from model_fusion.evaluate.tasks import task
from model_fusion.fuse.bridges import Gated
from model_fusion.fuse.model import FusedModel
from tiny_llm import tiny_llama, word_tokenizer

OPTIONS = {"blackjack": {"expert": "untrained"}, "digits": {}, "diabetes": {"labels": 60}}
# The untrained Blackjack expert decides the same everywhere; a continuous value has no class names to bias.
SKIPPED = {"blackjack": {"4c"}, "digits": set(), "diabetes": {"11"}}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_control_runs(name: str, tmp_path: Path) -> None:
    made = task(name, **OPTIONS[name])
    if made.draw is None:  # fewer questions are enough, except where a score needs them all
        made = replace(made, test=made.test[:40], all_inputs=made.all_inputs[:40])
    made = replace(made, paraphrases=made.paraphrases[:1])
    answers = sorted({example.answer for example in (*made.train, *made.validation)})
    tokenizer = word_tokenizer([made.prompt, *TOLD.values(), *answers])
    fused = FusedModel.build(
        tiny_llama(tokenizer),
        tokenizer=tokenizer,
        experts={made.expert_name: made.expert},
        bridge=Gated(layers=(1,), width=16),
    )
    fused.task = {"training": {"steps": 4, "batch_size": 8}}
    report = run_audit(fused, made, AuditSettings(1, ()), journal=tmp_path / "journal", progress=False)
    assert {skipped["control"] for skipped in report["skipped"]} == SKIPPED[name]
    rows = {row["control"]: row["scores"] for row in report["rows"]}
    assert set(rows) == set(CONTROLS) - SKIPPED[name]
    assert rows["1"]["agreement"]["mean"] == 1.0
    # With no LLM, a linear head on the expert's output has nearly all of its skill.
    assert rows["7"]["agreement"]["mean"] >= 0.8
    exchanged = [row for row in report["rows"] if row["control"] == "12"]
    assert len(exchanged) == len(made.exchanged)
