"""Fuse recipes, data files, inputs as people write them, and the names that the package exports."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fuse_fixtures as toy
import model_fusion as mf
from model_fusion.errors import InputError
from model_fusion.fuse.data import read_examples
from model_fusion.fuse.experts import Expert, Field, InputSchema
from model_fusion.fuse.experts.folder import read_expert, write_expert
from model_fusion.fuse.inputs import check_item, parse_item, parse_pairs
from model_fusion.recipe import fuse as recipes

SCHEMA = InputSchema((Field("left", "float", 0, 10), Field("right", "float", 0, 10)))
TABLE = InputSchema((Field("sum", "int", 4, 21), Field("dealer", "int", 1, 10), Field("usable_ace", "bool")))


def test_paths_count_from_the_recipes_folder(tmp_path: Path) -> None:
    folder = tmp_path / "some" / "where"
    (folder / "llm").mkdir(parents=True)
    file = toy.write_recipe(folder, toy.recipe(base="llm", data="../train.jsonl", validation="held.csv"))
    read = recipes.load(file)
    assert read.base == str(folder / "llm")
    assert read.experts["sensor"].file == folder / "expert.onnx"
    assert read.data.file == tmp_path / "some" / "train.jsonl"
    assert read.validation is not None
    assert read.validation.file == folder / "held.csv"
    assert recipes.load(toy.write_recipe(folder, toy.recipe(base="smollm2"))).base == "smollm2"


@pytest.mark.parametrize(
    ("file", "kind"),
    [("a.onnx", "onnx"), ("a.skops", "sklearn"), ("a.joblib", "sklearn"), ("a.pt", "torch"), ("folder", "saved")],
)
def test_the_kind_follows_from_the_files_name(file: str, kind: str) -> None:
    inputs = None if kind == "saved" else [{"name": "x", "type": "float"}]
    spec = recipes.ExpertSpec.model_validate({"file": file, **({"inputs": inputs} if inputs else {})})
    assert spec.resolved_kind() == kind


def test_a_validation_share_and_class_names_as_text() -> None:
    read = recipes.parse(toy.recipe(validation=0.3))
    assert read.validation is not None
    assert read.validation.share == 0.3
    spec = recipes.ExpertSpec.model_validate({"file": "a.onnx", "inputs": toy.FIELDS, "classes": [0, 1]})
    assert spec.classes == ["0", "1"]


def test_csv_and_jsonl_tell_the_same(tmp_path: Path) -> None:
    toy.write_rows(tmp_path / "a.jsonl", [{"inputs": {"s": [1, 2.5]}, "answer": "low"}, {"prompt": "Hi", "answer": 7}])
    (tmp_path / "a.csv").write_text("prompt,s,answer\n,1 2.5,low\nHi,,7\n")
    (tmp_path / "b.csv").write_text('prompt,s,answer\n,"[1, 2.5]",low\nHi,,7\n')
    found = [read_examples(tmp_path / name, {"s": SCHEMA}, prompt="<|s|>") for name in ("a.jsonl", "a.csv", "b.csv")]
    assert found[0] == found[1] == found[2]
    assert found[0][0] == mf.Example("<|s|>", {"s": (1.0, 2.5)}, "low")
    assert found[0][1] == mf.Example("Hi", {}, "7")
    (tmp_path / "c.csv").write_text("prompt,s,answer\n,1 2.6,low\nHi,,7\n")
    assert read_examples(tmp_path / "c.csv", {"s": SCHEMA}, prompt="<|s|>") != found[0]


def test_a_placeholder_that_occurs_twice_wants_two_inputs(tmp_path: Path) -> None:
    row = {"prompt": "<|s|> or <|s|>?", "inputs": {"s": [[1, 2], "3 4"]}, "answer": "low"}
    toy.write_rows(tmp_path / "a.jsonl", [row])
    assert read_examples(tmp_path / "a.jsonl", {"s": SCHEMA})[0].inputs == {"s": [(1.0, 2.0), (3.0, 4.0)]}
    toy.write_rows(tmp_path / "a.jsonl", [{**row, "inputs": {"s": [[1, 2]]}}])
    with pytest.raises(InputError, match=r"line 1: .* occurs 2 times: give a list of 2 inputs"):
        read_examples(tmp_path / "a.jsonl", {"s": SCHEMA})


def test_words_and_json() -> None:
    assert parse_item("t", TABLE, "16 10 no") == parse_item("t", TABLE, "[16, 10, false]") == (16, 10, False)
    assert parse_item("t", TABLE, '{"usable_ace": "yes", "sum": 16, "dealer": 10}') == (16, 10, True)
    assert check_item("t", TABLE, "16 10 no") == check_item("t", TABLE, [16, 10, 0])
    text = InputSchema((Field("note", "text"),))
    assert parse_item("n", text, "it's all one text") == "it's all one text"
    picture = InputSchema((Field("picture", "array", shape=(2, 2)),))
    assert np.array_equal(parse_item("p", picture, "[[1, 2], [3, 4]]"), np.array([[1, 2], [3, 4]], dtype=np.float32))
    schemas = {"t": TABLE, "n": text}
    assert parse_pairs(["t=16 10 no", "n=a=b", "t=20 1 yes"], schemas) == {
        "t": [(16, 10, False), (20, 1, True)],
        "n": ["a=b"],
    }
    for wrong in ("16 10", "16 10 perhaps", "99 1 no", "[16, 10", "16 '10 no"):
        with pytest.raises(InputError, match=r"its input is sum \(int\), dealer \(int\), usable_ace \(bool\)"):
            parse_item("t", TABLE, wrong)


def test_an_expert_saved_on_its_own_comes_back(tmp_path: Path) -> None:
    toy.write_onnx(tmp_path / "expert.onnx")
    expert = Expert.from_onnx(tmp_path / "expert.onnx", SCHEMA, classes=("low", "high"))
    write_expert(expert, tmp_path / "kept")
    again = read_expert(tmp_path / "kept")
    assert again.describe([(1, 2), (9, 9)]) == expert.describe([(1, 2), (9, 9)]) == ["low", "high"]
    assert again.inputs == SCHEMA
    with pytest.raises(InputError, match="is no saved expert"):
        write_expert(expert, tmp_path)


def test_the_verb_and_the_package_share_a_name() -> None:
    importlib.import_module("model_fusion.fuse.inputs")  # as any user of the package may
    assert callable(mf.fuse)
    assert mf.fuse is sys.modules["model_fusion.fuse"]
    with pytest.raises(InputError, match="no such recipe"):
        mf.fuse("none.yml", "out")


def test_names_are_there_without_torch() -> None:
    code = "import sys, model_fusion as mf, model_fusion.cli.main; mf.fuse; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_that_a_spreadsheet_saved(suffix: str, encoding: str, tmp_path: Path) -> None:
    """Spreadsheets put a byte order mark before the first column's name."""
    text = {
        ".csv": f"prompt,sensor,answer\n{toy.PROMPT},1 2,low\n",
        ".jsonl": f'{{"prompt": "{toy.PROMPT}", "inputs": {{"sensor": [1, 2]}}, "answer": "low"}}\n',
    }
    file = tmp_path / f"rows{suffix}"
    file.write_text(text[suffix], encoding=encoding)
    (row,) = read_examples(file, {"sensor": SCHEMA})
    assert (row.prompt, row.inputs, row.answer) == (toy.PROMPT, {"sensor": (1.0, 2.0)}, "low")
