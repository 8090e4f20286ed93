"""What is particular to one kind of expert: taps, columns, words, and what each refuses."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import (
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from expert_cases import (
    CASES,
    ITEMS,
    NAMES,
    TABLE,
    VALUE,
    X,
    Y,
    check_contract,
    check_roundtrip,
    forest,
    graph,
    network,
)
from model_fusion.errors import InputError, IntegrityError
from model_fusion.fuse.experts import (
    ClassDecision,
    Expert,
    Field,
    Given,
    InputSchema,
    ValueDecision,
    load_expert,
    save_expert,
)


def test_dropout_is_off_and_the_modules_mode_is_left_alone() -> None:
    module = network().train()
    check_contract(Expert.from_torch(module, TABLE, classes=NAMES), (1, 4))
    assert all(part.training for part in module.modules())


def test_torch_refusals(tmp_path: Path) -> None:
    expert = CASES["torch"].build()
    config = save_expert(expert, tmp_path)
    with pytest.raises(InputError, match="given=the module"):
        load_expert(tmp_path, config)
    with pytest.raises(IntegrityError, match=r"3\.bias has shape \[2\], the module has \[5\]"):
        load_expert(tmp_path, config, given=network(5))
    with pytest.raises(InputError, match="no submodule 'nothing'"):
        Expert.from_torch(network(), TABLE, classes=NAMES, tap="nothing")
    with pytest.raises(InputError, match="3 classes are named"):
        Expert.from_torch(network(), TABLE, classes=("a", "b", "c"))
    torch.save(network(), tmp_path / "whole.pt")
    with pytest.raises(InputError, match="state_dict"):
        Expert.from_torch(network(), TABLE, classes=NAMES, weights=tmp_path / "whole.pt")
    torch.save(network(seed=4).state_dict(), tmp_path / "state.pt")
    filled = Expert.from_torch(network(), TABLE, classes=NAMES, weights=tmp_path / "state.pt")
    expected = Expert.from_torch(network(seed=4), TABLE, classes=NAMES)
    assert torch.equal(filled.encode(ITEMS).values, expected.encode(ITEMS).values)
    assert not torch.equal(filled.encode(ITEMS).values, expert.encode(ITEMS).values)


def test_a_sequence_tap_keeps_its_values() -> None:
    class Steps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = torch.nn.Linear(1, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.steps(x[..., None]).mean((1, 2))

    expert = Expert.from_torch(Steps(), TABLE, tap="steps")
    assert expert.feature_shape == (3, 4)


def test_preprocess_and_words_must_be_given_again(tmp_path: Path) -> None:
    def ten_times(items: Any) -> np.ndarray:
        return np.asarray(items, dtype=np.float32) * 10

    expert = Expert.from_onnx(graph(), TABLE, classes=NAMES, preprocess=ten_times, words=str.upper)
    config = save_expert(expert, tmp_path)
    with pytest.raises(InputError, match="preprocess"):
        load_expert(tmp_path, config)
    with pytest.raises(InputError, match="words"):
        load_expert(tmp_path, config, given=Given(preprocess=ten_times))
    given = Given(preprocess=ten_times, words=str.upper)
    check_roundtrip(expert, tmp_path, given)
    assert set(expert.describe(ITEMS)) <= {"HIT", "STICK"}
    with pytest.raises(AssertionError):
        check_roundtrip(expert, tmp_path, Given(preprocess=lambda items: ten_times(items) + 1, words=str.upper))


def test_a_table_of_words_is_saved(tmp_path: Path) -> None:
    table = {"hit": "take a card", "stick": "stand"}
    expert = Expert.from_sklearn(forest(), TABLE, words=table)
    assert expert.describe([(21, 5, False), (5, 5, False)]) == ["stand", "take a card"]
    check_roundtrip(expert, tmp_path, None)
    with pytest.raises(InputError, match="stick"):
        Expert.from_sklearn(forest(), TABLE, words={"hit": "take a card"})


def test_sklearn_matches_the_estimator() -> None:
    model = forest()
    decision = Expert.from_sklearn(model, TABLE).decide(ITEMS)
    assert isinstance(decision, ClassDecision)
    expected = model.predict_proba(np.asarray(ITEMS, dtype=float))
    assert np.allclose(decision.log_probs.exp().numpy(), expected, atol=1e-5)
    assert not np.allclose(decision.log_probs.exp().numpy(), expected[:, ::-1], atol=1e-5)
    leaves = Expert.from_sklearn(model, TABLE, tap="leaves").encode(ITEMS).values.reshape(len(ITEMS), 5, 2)
    assert np.allclose(leaves.mean(1).numpy(), expected, atol=1e-5)
    regression = RandomForestRegressor(5, random_state=0).fit(X, VALUE)
    value = Expert.from_sklearn(regression, TABLE).decide(ITEMS)
    assert isinstance(value, ValueDecision)
    assert value.spread is not None
    votes = np.stack([tree.predict(np.asarray(ITEMS, dtype=float)) for tree in regression.estimators_])
    assert np.allclose(value.value.numpy(), votes.mean(0), atol=1e-4)
    assert np.allclose(value.spread.numpy(), votes.std(0), atol=1e-4)


def test_data_frames_are_read_by_name(tmp_path: Path) -> None:
    frame = pd.DataFrame(X, columns=["total", "dealer", "ace"])
    model = make_pipeline(StandardScaler(), RandomForestClassifier(5, random_state=0)).fit(frame, Y)
    for tap in ("output", "leaves"):
        expert = Expert.from_sklearn(model, TABLE, tap=tap)
        batch = pd.DataFrame(np.asarray(ITEMS, dtype=float), columns=frame.columns)
        expected = expert.encode(ITEMS).values
        assert torch.equal(expert.encode(batch[["ace", "total", "dealer"]]).values, expected)
        wrong = batch.rename(columns={"ace": "total", "total": "ace"})
        assert not torch.equal(expert.encode(wrong).values, expected)
    with pytest.raises(InputError, match="lacks the columns ace"):
        expert.encode(batch[["total", "dealer"]])
    check_roundtrip(expert, tmp_path, None)
    callable_expert = CASES["callable"].build()
    assert torch.equal(callable_expert.encode(batch).values, callable_expert.encode(ITEMS).values)


def test_pickle_needs_the_flag_and_warns(tmp_path: Path) -> None:
    expert = Expert.from_sklearn(forest(), TABLE, save_as="joblib")
    config = save_expert(expert, tmp_path)
    with pytest.raises(InputError, match="allow_pickle=True"):
        load_expert(tmp_path, config)
    with pytest.raises(InputError, match="allow_pickle=True"):
        Expert.from_sklearn(tmp_path / "estimator.joblib", TABLE)
    with pytest.warns(UserWarning, match="runs whatever code"):
        again = load_expert(tmp_path, config, allow_pickle=True)
    assert torch.equal(again.encode(ITEMS).values, expert.encode(ITEMS).values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_expert(Expert.from_sklearn(forest(), TABLE), tmp_path)
        Expert.from_sklearn(tmp_path / "estimator.skops", TABLE)


class Doubler(StandardScaler):  # type: ignore[misc]
    """A type from outside scikit-learn."""


def test_foreign_types_and_library_functions_are_refused_by_name(tmp_path: Path) -> None:
    model = make_pipeline(Doubler(), KNeighborsClassifier(3)).fit(X, Y)
    with pytest.raises(InputError, match="Doubler"):
        save_expert(Expert.from_sklearn(model, TABLE), tmp_path)
    name = f"{Doubler.__module__}.Doubler"
    config = save_expert(Expert.from_sklearn(model, TABLE, trusted=(name,)), tmp_path)
    with pytest.raises(InputError, match="Doubler"):
        load_expert(tmp_path, config)
    load_expert(tmp_path, config, given=Given(trusted=(name,)))
    runs_text = make_pipeline(FunctionTransformer(np.testing.assert_equal), KNeighborsClassifier(3))
    runs_text[-1].fit(X, Y)
    with pytest.raises(InputError, match="numpy"):
        save_expert(Expert.from_sklearn(runs_text, TABLE, feature_shape=(1, 2)), tmp_path)


def test_onnx_refusals(tmp_path: Path) -> None:
    narrow = InputSchema((Field("total", "int", 4, 21), Field("dealer", "int", 1, 10)))
    with pytest.raises(InputError, match=r"\['any', 3\], got \[1, 2\]"):
        Expert.from_onnx(graph(), narrow, classes=NAMES)
    with pytest.raises(InputError, match="no value 'nothing' to tap; there are y, inner"):
        Expert.from_onnx(graph(), TABLE, classes=NAMES, tap="nothing")
    with pytest.raises(InputError, match="not a readable ONNX"):
        Expert.from_onnx(b"not a graph", TABLE)
    model = onnx.load_model_from_string(graph())
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "elsewhere.bin")
    with pytest.raises(InputError, match="another file"):
        Expert.from_onnx(model.SerializeToString(), TABLE, classes=NAMES)


def test_callable_refusals(tmp_path: Path) -> None:
    config = save_expert(CASES["callable"].build(), tmp_path)
    assert config["saved"] is False
    with pytest.raises(InputError, match="given=the function"):
        load_expert(tmp_path, config)
    with pytest.raises(InputError, match="not probabilities"):
        Expert.from_callable(lambda items: [[3.0, 4.0]] * len(items), TABLE, classes=NAMES)
    features = Expert.from_callable(lambda items: np.ones((len(items), 5)), TABLE, output="features")
    assert features.feature_shape == (1, 5)
    with pytest.raises(InputError, match="no decision"):
        features.decide(ITEMS)


def test_only_registered_kinds_and_plain_file_names_are_loaded(tmp_path: Path) -> None:
    config = save_expert(CASES["onnx"].build(), tmp_path)
    with pytest.raises(InputError, match="expert kind"):
        load_expert(tmp_path, {**config, "kind": "os.system"})
    with pytest.raises(IntegrityError, match="outside its folder"):
        load_expert(tmp_path, {**config, "sha256": {"../graph.onnx": "0"}})
    with pytest.raises(IntegrityError, match="no SHA-256"):
        load_expert(tmp_path, {**config, "sha256": {}})


def test_text_and_categories_reach_the_pipeline_as_they_are(tmp_path: Path) -> None:
    notes = InputSchema((Field("note", "text"),))
    reader = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(
        ["good", "bad day", "good day", "bad"], [1, 0, 1, 0]
    )
    expert = Expert.from_sklearn(reader, notes, words={"1": "praise", "0": "blame"})
    assert expert.describe(["a good one", "so bad"]) == ["praise", "blame"]
    colours = InputSchema((Field("colour", "category", choices=("red", "blue")), Field("size", "float")))
    frame = pd.DataFrame({"colour": ["red", "blue", "red", "blue"], "size": [1.0, 2.0, 3.0, 4.0]})
    encoder = ColumnTransformer([("one", OneHotEncoder(), ["colour"])], remainder="passthrough")
    model = make_pipeline(encoder, LogisticRegression()).fit(frame, ["x", "y", "x", "y"])
    expert = Expert.from_sklearn(model, colours)
    assert expert.describe([("red", 2.0), {"size": 2.0, "colour": "blue"}]) == ["x", "y"]
    again = load_expert(tmp_path, save_expert(expert, tmp_path))
    assert again.describe([("red", 2.0), ("blue", 2.0)]) == ["x", "y"]


def test_naming_experts_imports_no_library() -> None:
    code = (
        "import sys, model_fusion.fuse.experts; "
        "print([m for m in ('torch', 'sklearn', 'onnxruntime', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
