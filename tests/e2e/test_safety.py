"""The safety audit and its repair on tiny models whose refusals are known, and through the command."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

import model_fusion as mf
from model_fusion.cli.main import app
from model_fusion.dynamic.router import Router
from model_fusion.errors import InputError
from model_fusion.evaluate import running
from model_fusion.evaluate.safety import audit as auditing
from model_fusion.evaluate.safety.direction import states
from model_fusion.evaluate.safety.prompts import Prompts
from model_fusion.evaluate.safety.refusal import answers
from model_fusion.report import safety
from safety_fixtures import BENIGN, HARMFUL, make


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("safety"))


def audited(models: Path, child: str, parents: Sequence[str], **more: Any) -> dict[str, Any]:
    return mf.audit_safety(
        models / child, [models / name for name in parents], prompts=models / "requests.json", tokens=4, **more
    )


def test_an_unsafe_child_of_a_safe_parent_is_flagged(models: Path) -> None:
    report = audited(models, "skilled", ["safe", "base"], base=models / "base")
    child, safe, base = report["models"]
    assert (child["role"], safe["role"]) == ("child", "parent")
    assert child["refusal"]["count"] == base["refusal"]["count"] == 0
    assert safe["refusal"]["count"] == len(HARMFUL)
    assert safe["over_refusal"]["count"] == 0
    assert any(flag.startswith("UNSAFE CHILD: it refuses 0 of 10") for flag in report["flags"])
    assert str(models) not in " ".join(report["flags"])
    assert report["direction_of"] == str(models / "safe")
    assert safe["told_apart"] == safe["direction"]["ordered"][report["direction_layer"]] == 1.0
    assert report["warning"].startswith("Safe parents can give an unsafe child")


def test_of_equal_parents_the_clearer_direction_is_taken(models: Path, tmp_path: Path) -> None:
    """`blind` refuses nothing, as `base`, and its states hardly depend on the request."""
    model, tokenizer = running.load(models / "base")
    model.get_input_embeddings().weight.data[tokenizer("bad good")["input_ids"]] = 0.0
    model.save_pretrained(tmp_path / "blind")
    tokenizer.save_pretrained(tmp_path / "blind")
    for parents in ([tmp_path / "blind", models / "base"], [models / "base", tmp_path / "blind"]):
        report = mf.audit_safety(models / "skilled", parents, prompts=models / "requests.json", tokens=4)
        assert [row["refusal"]["count"] for row in report["models"]] == [0, 0, 0]
        assert report["direction_of"] == str(models / "base")


def test_a_twin_is_audited_by_what_it_answers_and_not_repaired(models: Path, tmp_path: Path) -> None:
    """A twin of the safe model twice is the safe model, whatever its router says."""
    skilled, tokenizer = running.load(models / "skilled")
    safe = running.load(models / "safe")[0].state_dict()
    parts = mf.exclusive(skilled.state_dict(), [safe, safe], 1.0)
    mf.TwinForCausalLM(skilled, parts, Router(48, 2).eval(), ["a", "b"]).save_pretrained(tmp_path / "twin")
    tokenizer.save_pretrained(tmp_path / "twin")
    parents, requests = [models / "safe", models / "skilled"], models / "requests.json"
    report = mf.audit_safety(tmp_path / "twin", parents, base=models / "base", prompts=requests, tokens=4)
    assert [row["refusal"]["count"] for row in report["models"]] == [len(HARMFUL), len(HARMFUL), 0]
    assert report["models"][0]["told_apart"] == 1.0
    assert (report["flags"], report["alignment"]) == ([], None)
    with pytest.raises(InputError, match="repair its shared model or its experts"):
        mf.repair_safety(tmp_path / "twin", tmp_path / "out", parents, base=models / "base", prompts=requests)


def test_few_requests_have_no_direction(models: Path) -> None:
    one = Prompts(tuple(HARMFUL[:1]), tuple(BENIGN[:1]), "one of each")
    report = mf.audit_safety(models / "skilled", [models / "safe"], prompts=one, tokens=4)
    assert report["direction_of"] is None
    assert [row["told_apart"] for row in report["models"]] == [None, None]
    assert "too few requests of a kind to say" in safety.audited(report)
    json.dumps(report, allow_nan=False)


def test_a_safe_child_is_not_flagged(models: Path) -> None:
    assert audited(models, "safe", ["safe", "base"])["flags"] == []
    assert audited(models, "safe", ["safe", "base"])["alignment"] is None


def test_no_safe_parent_is_said(models: Path) -> None:
    assert "No parent is safe" in audited(models, "skilled", ["base"])["flags"][0]


def test_an_over_cautious_child_is_flagged(models: Path) -> None:
    swapped = Prompts(tuple(BENIGN), tuple(HARMFUL), "swapped")
    report = mf.audit_safety(models / "safe", [models / "base"], prompts=swapped, tokens=4)
    assert any(flag.startswith("OVER-CAUTIOUS CHILD: it refuses 10 of 10") for flag in report["flags"])


def test_answers_and_states_do_not_depend_on_the_batch(models: Path) -> None:
    model, tokenizer = running.load(models / "safe")
    texts = [*HARMFUL, *BENIGN, "do good tea sun dog hat", "tea"]
    one = [answers(model, tokenizer, [text], tokens=4)[0] for text in texts]
    assert answers(model, tokenizer, texts, tokens=4, batch_size=7) == one
    prompts = Prompts(tuple(texts[:3]), tuple(texts[-3:]), "mixed lengths")
    apart = [states(model, tokenizer, prompts, batch_size=size).benign for size in (1, 3)]
    assert torch.allclose(*apart, atol=1e-5)


def test_every_model_runs_on_the_device_asked_for(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[object] = []
    real = PreTrainedModel.to
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, *where: (moved.append(where), real(self, *where))[1])
    audited(models, "skilled", ["safe", "base"], device="cpu:0")
    assert moved == [("cpu:0",)] * 3


def test_a_tokenizer_without_padding_or_end_is_padded_all_the_same(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "safe", tmp_path / "bare")
    settings = json.loads((tmp_path / "bare/tokenizer_config.json").read_text())
    kept = {key: value for key, value in settings.items() if key not in ("pad_token", "eos_token", "padding_side")}
    (tmp_path / "bare/tokenizer_config.json").write_text(json.dumps(kept))
    model, tokenizer = running.load(tmp_path / "bare")
    texts = [*HARMFUL, "do good tea sun dog hat"]
    assert answers(model, tokenizer, texts, tokens=4) == answers(*running.load(models / "safe"), texts, tokens=4)


def test_parents_and_base_of_a_merged_folder_are_known_from_its_lineage(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    entries = [{"model": name, "parameters": {"weight": 0.4}} for name in ("safe", "skilled")]
    mf.merge({"merge_method": "task_arithmetic", "base_model": "base", "models": entries}, tmp_path / "child")
    report = mf.audit_safety(tmp_path / "child", prompts=models / "requests.json", tokens=4)
    assert [row["model"] for row in report["models"][1:]] == ["safe", "skilled"]
    assert report["alignment"]["base"] == "base"


def test_the_repair_adds_what_was_lost_and_its_card_says_before_and_after(models: Path, tmp_path: Path) -> None:
    done = mf.repair_safety(
        models / "skilled", tmp_path / "out", [models / "safe", models / "base"], base=models / "base", threshold=2.0,
        safe_weight=1.0, add=True, prompts=models / "requests.json", tokens=4,
    )  # fmt: skip
    parts = [load_file(models / name / "model.safetensors") for name in ("skilled", "safe", "base")]
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        child, safe, base = (part[name].double() for part in parts)
        assert torch.allclose(tensor.double(), child + safe - base, atol=1e-5), name
    assert done.before["models"][0]["refusal"]["count"] == 0
    assert done.after["models"][0]["refusal"]["count"] == len(HARMFUL)
    assert done.after["flags"] == []
    mf.verify(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "0/10 [0.00, 0.28] before, 10/10 [0.72, 1.00] after" in card
    assert "Before the repair: UNSAFE CHILD" in card
    assert "After the repair the audit flags nothing." in card
    assert "Beyond what the notes under Method say" in card
    saved = json.loads((tmp_path / "out/safety.json").read_text())
    assert saved["after"] == json.loads(json.dumps(done.after))
    assert "safety.json" in json.loads((tmp_path / "out/model_fusion.json").read_text())["files"]


def test_a_blend_takes_its_share_only_below_the_threshold(models: Path, tmp_path: Path) -> None:
    report = audited(models, "skilled", ["safe"], base=models / "base")
    cosines = {row["tensor"]: row["cosine"] for row in report["alignment"]["tensors"]}
    threshold = sorted(cosines.values())[len(cosines) // 2]
    mf.repair_safety(
        models / "skilled", tmp_path / "out", [models / "safe"], base=models / "base", threshold=threshold,
        safe_weight=0.25, prompts=models / "requests.json", tokens=4,
    )  # fmt: skip
    child, safe = (load_file(models / name / "model.safetensors") for name in ("skilled", "safe"))
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        share = 0.25 if cosines[name] < threshold else 0.0
        assert torch.allclose(tensor, (1 - share) * child[name] + share * safe[name], atol=1e-6), name


def command(models: Path, *words: str) -> Any:
    asked = ["--prompts", str(models / "requests.json"), "--tokens", "4"]
    return CliRunner().invoke(
        app, ["safety", str(models / "skilled"), "--parent", str(models / "safe"), *asked, *words]
    )


def test_the_command_audits_and_repairs(models: Path, tmp_path: Path) -> None:
    seen = command(models, "--base", str(models / "base"), "--json", str(tmp_path / "audit.json"))
    assert seen.exit_code == 0, seen.output
    assert "UNSAFE CHILD" in seen.output
    assert auditing.WARNING in seen.output
    assert json.loads((tmp_path / "audit.json").read_text())["flags"]
    done = command(
        models, "--base", str(models / "base"), "--repair", "-o", str(tmp_path / "out"), "--add", "--threshold", "2",
        "--safe-weight", "1",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Nothing to flag" in done.output
    assert (tmp_path / "out/config.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repair"], "--repair and --output go together"),
        (["-o", "OUT"], "--repair and --output go together"),
        (["--repair", "-o", "OUT"], "give it with --base"),
        (["--base", "nowhere"], "no such folder"),
        (["--repair", "-o", "OUT", "--base", "BASE", "--safe", "nowhere"], "no such folder"),
        (["--repair", "-o", "OUT", "--base", "BASE", "--safe-weight", "1.5"], r"safe_weight must lie in \[0, 1\]"),
        (["--repair", "-o", "BASE", "--base", "BASE"], "is, holds or lies in the input"),
        (["--prompts", "none.json"], "no such prompts file"),
        (["--device", "abacus"], "--device 'abacus' cannot be used here"),
        (["--prompts", "BASE/config.json"], "expected a list"),
        (["--json", "nowhere/a.json"], "no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    models: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    places = {"OUT": str(tmp_path / "out"), "BASE": str(models / "base")}
    done = command(models, *(word.replace("BASE", places["BASE"]).replace("OUT", places["OUT"]) for word in words))
    assert isinstance(done.exception, InputError), done.output
    with pytest.raises(InputError, match=message):
        raise done.exception
    assert "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_a_child_without_parents_or_a_language_model_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give them with --parent"):
        mf.audit_safety(models / "skilled")
    bare = tmp_path / "weights.safetensors"
    bare.write_bytes((models / "base/model.safetensors").read_bytes())
    with pytest.raises(InputError, match="no language model"):
        mf.audit_safety(bare, [models / "safe"])
    shutil.copytree(models / "base", tmp_path / "odd")
    config = json.loads((tmp_path / "odd/config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(InputError, match=r"transformers knows no model of type 'unheard_of'$"):
        mf.audit_safety(tmp_path / "odd", [models / "safe"])
