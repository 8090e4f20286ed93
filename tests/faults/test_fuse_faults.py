"""What is wrong with a recipe is told before the LLM is loaded: exit code 2, one line, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fuse_fixtures as toy
from model_fusion.fuse.experts import Expert, Field, InputSchema
from model_fusion.fuse.experts.folder import write_expert
from model_fusion.fuse.model import FusedModel

Change = Callable[[Path, dict[str, Any]], None]
SCHEMA = InputSchema((Field("left", "float", 0, 10), Field("right", "float", 0, 10)))


def row(folder: Path, number: int = 3, **values: Any) -> None:
    found = toy.rows(10)
    found[number].update(values)
    toy.write_rows(folder / "train.jsonl", found)


def sensor(recipe: dict[str, Any], **values: Any) -> None:
    recipe["experts"]["sensor"].update(values)


def pickled(folder: Path, recipe: dict[str, Any]) -> None:
    import joblib
    from sklearn.dummy import DummyClassifier

    joblib.dump(DummyClassifier().fit([[0, 0], [1, 1]], ["low", "high"]), folder / "expert.joblib")
    sensor(recipe, file="expert.joblib")


def wide(folder: Path, recipe: dict[str, Any]) -> None:
    toy.write_skops(folder / "wide.skops", columns=5)
    sensor(recipe, file="wide.skops")


def tampered(folder: Path, recipe: dict[str, Any]) -> None:
    write_expert(Expert.from_onnx(folder / "expert.onnx", SCHEMA, classes=("low", "high")), folder / "kept")
    toy.write_onnx(folder / "kept" / "graph.onnx", operator="Neg")
    recipe["experts"]["sensor"] = {"file": "kept"}


def damaged_saved(folder: Path, recipe: dict[str, Any]) -> None:
    (folder / "kept").mkdir()
    (folder / "kept" / "expert.json").write_text("{")
    recipe["experts"]["sensor"] = {"file": "kept"}


def torch_weights(folder: Path, recipe: dict[str, Any]) -> None:
    (folder / "net.safetensors").write_bytes(b"")
    sensor(recipe, file="net.safetensors")


def bad_base(folder: Path, recipe: dict[str, Any]) -> None:
    (folder / "llm").mkdir()
    (folder / "llm" / "config.json").write_text('{"model_type": "lama"}')
    (folder / "llm" / "model.safetensors").write_bytes(b"")
    recipe["base"] = "llm"


def csv(folder: Path, recipe: dict[str, Any], text: str) -> None:
    (folder / "train.csv").write_text(text)
    recipe["data"] = {"file": "train.csv", "prompt": toy.PROMPT}


WRONG: dict[str, tuple[Change, str]] = {
    "missing expert file": (lambda f, r: sensor(r, file="none.onnx"), "none.onnx: no such file"),
    "missing expert folder": (
        lambda f, r: r["experts"].update(sensor={"file": "none"}),
        "no such file or folder",
    ),
    "wrong width, onnx": (lambda f, r: sensor(r, inputs=toy.FIELDS[:1]), "change the input schema or preprocess"),
    "wrong width, sklearn": (wide, "expecting 5 features"),
    "classes of another number": (lambda f, r: sensor(r, classes=["a", "b", "c"]), "3 classes are named"),
    "class names as truth values": (lambda f, r: sensor(r, classes=[False, True]), "put class names in quotes"),
    "no inputs": (lambda f, r: r["experts"]["sensor"].pop("inputs"), "inputs is missing"),
    "unknown tap": (lambda f, r: sensor(r, tap="middle"), "middle"),
    "option of another kind": (lambda f, r: sensor(r, columns=["a"]), "columns has no meaning for a onnx expert"),
    "pickle": (pickled, "allow_pickle=True if you wrote the file yourself"),
    "torch weights alone": (torch_weights, "export it with torch.onnx.export"),
    "tampered expert": (tampered, "graph.onnx is not the file that was saved"),
    "damaged expert": (damaged_saved, "expert.json: damaged"),
    "placeholder misspelt": (lambda f, r: row(f, prompt="High? <|sensr|>"), "did you mean 'sensor'?"),
    "placeholder of nothing": (lambda f, r: row(f, prompt=f"<|xyz|> {toy.PROMPT}"), "unknown placeholder <|xyz|>"),
    "no placeholder": (lambda f, r: row(f, prompt="High?"), "line 4: the prompt and the inputs do not fit"),
    "no input": (lambda f, r: row(f, inputs={}), "an input for expert 'sensor' is missing"),
    "unknown expert in a row": (
        lambda f, r: row(f, inputs={"senser": [1, 2]}),
        "unknown expert 'senser'",
    ),
    "NaN in a row": (lambda f, r: row(f, inputs={"sensor": [1, float("nan")]}), "line 4: expert 'sensor': right:"),
    "NaN from the expert": (lambda f, r: toy.write_onnx(f / "expert.onnx", operator="Sqrt"), "NaN or infinity"),
    "value out of bounds": (lambda f, r: row(f, inputs={"sensor": [1, 99]}), "right: expected 0 to 10, got 99"),
    "too few values": (lambda f, r: row(f, inputs={"sensor": [1]}), "its input is left (float), right (float)"),
    "no answer": (lambda f, r: row(f, answer=" "), "line 4: no answer"),
    "unknown key in a row": (lambda f, r: row(f, anser="low"), "unknown key 'anser'; did you mean 'answer'?"),
    "not JSON": (lambda f, r: (f / "train.jsonl").write_text("{]\n") and None, "line 1: not valid JSON"),
    "empty data": (lambda f, r: toy.write_rows(f / "train.jsonl", []), "holds no example"),
    "two examples": (lambda f, r: toy.write_rows(f / "train.jsonl", toy.rows(2)), "2 examples; give at least 3"),
    "no data file": (lambda f, r: (f / "train.jsonl").unlink(), "no such data file"),
    "unknown data format": (lambda f, r: r.update(data="train.xls"), "expected a .jsonl or .csv file"),
    "unknown column": (lambda f, r: csv(f, r, "sensor,anwser\n1 2,low\n"), "did you mean 'answer'?"),
    "bad words in a column": (
        lambda f, r: csv(f, r, "sensor,answer\n1 2,low\n1 x,low\n"),
        "line 3: expert",
    ),
    "answer beyond the context": (lambda f, r: row(f, answer="low " * 9000), "shorten its prompt or answer"),
    "validation share": (lambda f, r: r.update(validation=1.5), "less than 1"),
    "validation file": (lambda f, r: r.update(validation="held.jsonl"), "held.jsonl: no such data file"),
    "unknown key": (lambda f, r: r.update(bridg="gated"), "unknown key 'bridg'; did you mean 'bridge'?"),
    "unknown key of an expert": (
        lambda f, r: sensor(r, clases=[]),
        "experts.sensor: unknown key 'clases'",
    ),
    "unknown key of a field": (lambda f, r: sensor(r, inputs=[{"name": "a", "typ": "int"}]), "did you mean 'type'?"),
    "unknown key of the training": (lambda f, r: r.update(training={"step": 3}), "did you mean 'steps'?"),
    "training of a wrong type": (lambda f, r: r.update(training={"steps": "many"}), "training.steps:"),
    "training out of range": (lambda f, r: r.update(training={"batch_size": 0}), "batch_size must be at least 1"),
    "seed twice": (lambda f, r: r.update(training={"seed": 1}), "seed is the recipe's own key"),
    "language under training": (lambda f, r: r.update(training={"keep_language": 1}), "the recipe's own key"),
    "unknown objective": (lambda f, r: r.update(objective="align me"), "objective"),
    "language beside aligning": (
        lambda f, r: r.update(objective="align", keep_language=1),
        "keep_language belongs to the objective `answers`",
    ),
    "nothing to align": (
        lambda f, r: r.update(objective="align", bridge="tool"),
        "the tool bridge has nothing to align",
    ),
    "a prompt to align without a placeholder": (
        lambda f, r: (row(f, prompt="High?", inputs={}), r.update(objective="align"))[1],
        "exactly one placeholder",
    ),
    "language below nothing": (lambda f, r: r.update(keep_language=-1), "keep_language"),
    "unknown bridge": (lambda f, r: r.update(bridge="gatd"), "did you mean 'gated'"),
    "bridge of a wrong type": (lambda f, r: r.update(bridge=3), "give a bridge's name"),
    "unknown setting of a bridge": (
        lambda f, r: r.update(bridge={"kind": "gated", "depth": 1}),
        "setting 'depth'",
    ),
    "layer that is not there": (lambda f, r: r["bridge"].update(layers=[99]), "layers 0 to 29"),
    "unknown task": (
        lambda f, r: (r.pop("experts"), r.update(data={"task": "blackjak"}))[1],
        "mean 'blackjack'?",
    ),
    "unknown option of a task": (
        lambda f, r: (r.pop("experts"), r.update(data={"task": "diabetes", "options": {"label": 9}}))[1],
        "unexpected keyword argument 'label'",
    ),
    "task and experts": (lambda f, r: r.update(data={"task": "digits"}), "remove `experts`"),
    "no experts": (lambda f, r: r.update(experts={}), "no expert is named"),
    "base that is not there": (lambda f, r: r.update(base="./none"), "no such folder or GGUF file"),
    "base of an unknown type": (bad_base, "cannot be loaded as a causal LM"),
}


@pytest.fixture
def no_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads the LLM's weights fails the test."""

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the LLM was loaded")

    monkeypatch.setattr("model_fusion.fuse.model.load_llm", loaded)
    monkeypatch.setattr("model_fusion.fuse.saving.load_llm", loaded)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    message: str,
    *arguments: Any,
) -> None:
    """Exit code 2, one line on standard error that holds `message`, nothing on standard output, nothing written."""
    before = files(folder)
    code = toy.command(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert code == 2, out + err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert message in err
    assert out == ""
    assert files(folder) == before


@pytest.mark.usefixtures("no_llm")
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_refused_before_the_llm_is_loaded(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG[case]
    toy.write_all(tmp_path)
    data = toy.recipe()
    change(tmp_path, data)
    recipe = toy.write_recipe(tmp_path, data)
    refused(tmp_path, monkeypatch, capsys, message, "fuse", recipe, "-o", tmp_path / "out")


def test_the_right_recipe_passes_the_same_check(no_llm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard of the cases above is red when a recipe gets as far as the LLM."""
    with pytest.raises(AssertionError, match="the LLM was loaded"):
        toy.command(monkeypatch, "fuse", toy.write_all(tmp_path), "-o", tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.usefixtures("no_llm")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("out", None, "is a file; name a folder"),
        ("out/mine.txt", "mine", "holds something else than a fusion"),
        ("out/fusion_config.json", "{}", "exists already"),
        (".out.training/run.json", '{"key": "other", "dtype": "float32"}', "an interrupted run lies in .out.training"),
    ],
)
def test_an_output_in_use_is_left_alone(
    name: str,
    content: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = toy.write_all(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content or "")
    refused(tmp_path, monkeypatch, capsys, message, "fuse", recipe, "-o", tmp_path / "out")


@pytest.mark.usefixtures("no_llm")
def test_a_run_of_another_recipe_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.write_all(tmp_path)
    (tmp_path / ".out.training").mkdir()
    (tmp_path / ".out.training" / "run.json").write_text('{"key": "other", "dtype": "float32"}')
    (tmp_path / ".out.training" / "state.pt").write_bytes(b"")
    message = "belongs to a run with another recipe"
    refused(tmp_path, monkeypatch, capsys, message, "fuse", recipe, "-o", tmp_path / "out", "--resume")


@pytest.mark.usefixtures("no_llm")
def test_several_processes_want_one_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.write_all(tmp_path, dtype="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(tmp_path, monkeypatch, capsys, "dtype: give one in the recipe", "fuse", recipe, "-o", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "line 1: not valid YAML"),
        ("", "expected one YAML document, found 0"),
        ("- a", "expected keys such as"),
        ("data: x\n---\ndata: y", "found 2"),
    ],
)
def test_a_file_that_is_no_recipe(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yml").write_text(text)
    refused(tmp_path, monkeypatch, capsys, message, "fuse", tmp_path / "recipe.yml", "-o", tmp_path / "out")
    refused(tmp_path, monkeypatch, capsys, "no such recipe", "fuse", tmp_path / "none.yml", "-o", tmp_path / "out")


# ---- questions to a saved fusion ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    toy.write_onnx(folder / "expert.onnx")
    expert = Expert.from_onnx(folder / "expert.onnx", SCHEMA, classes=("low", "high"))
    opinion = Expert.from_callable(lambda items: np.zeros((len(items), 2)), SCHEMA, output="logits", classes=("a", "b"))
    fused = FusedModel.build("smollm2", experts={"sensor": expert}, bridge="gated", dtype=torch.float32)
    fused.save_pretrained(folder / "out")
    FusedModel.build(
        fused.base, tokenizer=fused.tokenizer, experts={"opinion": opinion}, bridge="gated"
    ).save_pretrained(folder / "code")
    return folder


@pytest.fixture
def fusion(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "out", tmp_path / "out"))


def resigned(fusion: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the config as somebody would who signs it again."""
    from model_fusion.fuse.saving import _digest

    config = json.loads((fusion / "fusion_config.json").read_text())
    del config["self"]
    change(config)
    (fusion / "fusion_config.json").write_text(json.dumps({**config, "self": _digest(config)}))


QUESTION = ("--prompt", toy.PROMPT, "--input", "sensor=1 2")
BAD_QUESTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "words": (("--prompt", toy.PROMPT, "--input", "sensor=1 x"), "its input is left (float), right (float)"),
    "bounds": (("--prompt", toy.PROMPT, "--input", "sensor=1 11"), "right: expected 0 to 10, got 11"),
    "JSON": (("--prompt", toy.PROMPT, "--input", "sensor=[1,"), "not valid JSON"),
    "no equals sign": (("--prompt", toy.PROMPT, "--input", "1 2"), "write NAME=VALUE"),
    "expert": (("--prompt", toy.PROMPT, "--input", "senso=1 2"), "unknown expert 'senso'; did you mean 'sensor'?"),
    "placeholder": (("--prompt", "<|sensorr|>", "--input", "sensor=1 2"), "did you mean 'sensor'?"),
    "no input": (("--prompt", toy.PROMPT), "an input for expert 'sensor' is missing"),
    "no placeholder": (("--prompt", "High?", "--input", "sensor=1 2"), "the placeholder <|sensor|> is missing"),
    "no prompt": ((), "give either --prompt or --prompts"),
    "no file": (("--prompts", "none.jsonl"), "none.jsonl: no such data file"),
}


@pytest.mark.usefixtures("no_llm")
@pytest.mark.parametrize("case", BAD_QUESTIONS)
def test_a_wrong_question_is_refused_before_the_llm_is_loaded(
    case: str, fusion: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD_QUESTIONS[case]
    refused(fusion.parent, monkeypatch, capsys, message, "generate", fusion, *arguments)


def tampered_bridge(fusion: Path) -> None:
    data = bytearray((fusion / "bridge.safetensors").read_bytes())
    data[-1] ^= 1
    (fusion / "bridge.safetensors").write_bytes(data)


def edited(fusion: Path) -> None:
    config = json.loads((fusion / "fusion_config.json").read_text())
    config["bridge"]["width"] = 7
    (fusion / "fusion_config.json").write_text(json.dumps(config))


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no fusion": (lambda f: (f / "fusion_config.json").unlink(), "expected the output of `model-fusion fuse`"),
    "damaged config": (lambda f: (f / "fusion_config.json").write_text("{"), "damaged"),
    "edited config": (edited, "was changed after it was saved"),
    "tampered bridge": (tampered_bridge, "bridge.safetensors is not the file that was saved"),
    "missing bridge": (lambda f: (f / "bridge.safetensors").unlink(), "bridge.safetensors is missing"),
    "tampered expert": (
        lambda f: toy.write_onnx(f / "experts" / "sensor" / "graph.onnx", operator="Neg"),
        "graph.onnx is not the file that was saved",
    ),
    "missing expert": (lambda f: (f / "experts" / "sensor" / "graph.onnx").unlink(), "graph.onnx is missing"),
    "another base": (
        lambda f: resigned(f, lambda c: c["base"].update(hash="0" * 64)),
        "has changed since this bridge was trained",
    ),
    "base gone": (lambda f: resigned(f, lambda c: c["base"].update(name="./gone")), "no such folder or GGUF file"),
    "newer format": (lambda f: resigned(f, lambda c: c.update(format=99)), "upgrade model-fusion"),
}


@pytest.mark.usefixtures("no_llm")
@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_changed_fusion_is_refused_before_the_llm_is_loaded(
    case: str, verb: str, fusion: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = BAD_FOLDERS[case]
    change(fusion)
    question = QUESTION if verb == "generate" else ()
    refused(fusion.parent, monkeypatch, capsys, message, verb, fusion, *question)


@pytest.mark.usefixtures("no_llm")
def test_code_that_no_file_holds_is_asked_for(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "load it with given=the function; in Python: FusedModel.from_pretrained(…, given={'opinion': …})"
    refused(saved / "code", monkeypatch, capsys, message, "chat", saved / "code")


def test_sampling_that_makes_no_sense(
    fusion: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_llm: None
) -> None:
    refused(fusion, monkeypatch, capsys, "give 0 (greedy)", "generate", fusion, *QUESTION, "--temperature", "-1")
    refused(fusion, monkeypatch, capsys, "give at least 1", "generate", fusion, *QUESTION, "--max-new-tokens", "0")
