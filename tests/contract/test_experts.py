"""Every kind of expert keeps one contract, whatever it is made of."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC

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
from model_fusion.fuse.experts.scored import ScoredExpert

TABLE = InputSchema((Field("total", "int", 4, 21), Field("dealer", "int", 1, 10), Field("ace", "bool")))
ITEMS = [(16, 10, False), (12, 3, True), (21, 1, False), (8, 6, False)]
RNG = np.random.default_rng(0)
X = np.column_stack([RNG.integers(4, 22, 200), RNG.integers(1, 11, 200), RNG.integers(0, 2, 200)]).astype(float)
Y = np.where(X[:, 0] >= 17, "stick", "hit")
VALUE = X[:, 0] * 2.0 + X[:, 1]
NAMES = ("hit", "stick")


def network(outputs: int = 2, seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, outputs)
    )


def graph() -> bytes:
    weights = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["x", "s"], ["inner"]),
        helper.make_node("MatMul", ["inner", "w"], ["y"]),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 2])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.float32([0.1]), "s")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def likely_stick(items: list[Any]) -> list[list[float]]:
    return [[1 - total / 22, total / 22] for total, _, _ in items]


def forest() -> RandomForestClassifier:
    return RandomForestClassifier(5, random_state=0).fit(X, Y)


def scaled() -> Any:
    return make_pipeline(StandardScaler(), KNeighborsClassifier(3)).fit(X, Y)


@dataclass
class Case:
    build: Callable[[], Expert]
    shape: tuple[int, int]
    given: Callable[[], Any] = lambda: None


CASES = {
    "torch": Case(lambda: Expert.from_torch(network(), TABLE, classes=NAMES), (1, 4), lambda: network(seed=9)),
    "torch-tap": Case(
        lambda: Expert.from_torch(network(), TABLE, classes=NAMES, tap="1"), (1, 8), lambda: network(seed=9)
    ),
    "torch-value": Case(lambda: Expert.from_torch(network(1), TABLE), (1, 1), lambda: network(1, seed=9)),
    "forest": Case(lambda: Expert.from_sklearn(forest(), TABLE), (1, 4)),
    "forest-leaves": Case(lambda: Expert.from_sklearn(forest(), TABLE, tap="leaves"), (1, 10)),
    "forest-value": Case(
        lambda: Expert.from_sklearn(RandomForestRegressor(5, random_state=0).fit(X, VALUE), TABLE), (1, 1)
    ),
    "boosting-leaves": Case(
        lambda: Expert.from_sklearn(GradientBoostingClassifier(n_estimators=5).fit(X, Y), TABLE, tap="leaves"),
        (1, 64),
    ),
    "boosting-value": Case(
        lambda: Expert.from_sklearn(HistGradientBoostingRegressor(max_iter=5).fit(X, VALUE), TABLE), (1, 1)
    ),
    "neighbours": Case(lambda: Expert.from_sklearn(scaled(), TABLE, tap="neighbours"), (3, 3)),
    "svm": Case(lambda: Expert.from_sklearn(LinearSVC().fit(X, Y), TABLE, tap="decision_function"), (1, 1)),
    "onnx": Case(lambda: Expert.from_onnx(graph(), TABLE, classes=NAMES), (1, 4)),
    "onnx-tap": Case(lambda: Expert.from_onnx(graph(), TABLE, classes=NAMES, tap="inner"), (1, 3)),
    "callable": Case(lambda: Expert.from_callable(likely_stick, TABLE, classes=NAMES), (1, 4), lambda: likely_stick),
    "callable-value": Case(
        lambda: Expert.from_callable(lambda items: [t for t, _, _ in items], TABLE, output="value"),
        (1, 1),
        lambda: lambda items: [t for t, _, _ in items],
    ),
}
each = pytest.mark.parametrize("name", CASES)


def check_contract(expert: Expert, shape: tuple[int, int]) -> None:
    features = expert.encode(ITEMS)
    assert expert.feature_shape == shape
    assert features.values.shape == (len(ITEMS), *shape)
    assert features.values.dtype == torch.float32
    assert features.mask.shape == features.values.shape[:2]
    assert features.mask.dtype == torch.bool
    assert bool(features.mask.all())
    assert torch.equal(expert.encode(ITEMS).values, features.values)
    alone = torch.cat([expert.encode([item]).values for item in ITEMS])
    assert torch.allclose(alone, features.values, atol=1e-5)
    decision = expert.decide(ITEMS)
    words = expert.describe(ITEMS)
    if isinstance(decision, ClassDecision):
        assert decision.log_probs.dtype == torch.float32
        assert torch.allclose(decision.log_probs.exp().sum(-1), torch.ones(len(ITEMS)), atol=1e-5)
        if getattr(expert, "tap", "") == "output":
            both = torch.cat([decision.log_probs, decision.log_probs.exp()], dim=-1)
            assert torch.allclose(features.values[:, 0], both, atol=1e-6)
        best = decision.log_probs.argmax(-1).tolist()
        assert words == [decision.classes[index] for index in best]
    else:
        assert decision.value.shape == (len(ITEMS),)
        assert [float(word) for word in words] == pytest.approx(decision.value.tolist(), rel=0.01)


def check_roundtrip(expert: Expert, folder: Path, given: Any) -> None:
    config = save_expert(expert, folder)
    again = load_expert(folder, config, given=given)
    assert type(again) is type(expert)
    assert again.inputs == expert.inputs
    assert again.feature_shape == expert.feature_shape
    assert torch.equal(again.encode(ITEMS).values, expert.encode(ITEMS).values)
    assert again.describe(ITEMS) == expert.describe(ITEMS)


@each
def test_contract(name: str) -> None:
    check_contract(CASES[name].build(), CASES[name].shape)


@each
def test_roundtrip(name: str, tmp_path: Path) -> None:
    check_roundtrip(CASES[name].build(), tmp_path, CASES[name].given())


@each
def test_tampered_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config = save_expert(CASES[name].build(), tmp_path)
    for file in config["sha256"]:
        path = tmp_path / file
        original = path.read_bytes()
        path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=file):
            load_expert(tmp_path, config, given=CASES[name].given())
        path.unlink()
        with pytest.raises(IntegrityError, match="missing"):
            load_expert(tmp_path, config, given=CASES[name].given())


@each
def test_bad_inputs_name_their_row(name: str) -> None:
    expert = CASES[name].build()
    with pytest.raises(InputError, match="row 1: total"):
        expert.encode([ITEMS[0], (99, 1, False)])
    with pytest.raises(InputError, match="at least one"):
        expert.encode([])


@each
def test_nan_features_name_row_and_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expert = CASES[name].build()
    tapped = expert._tapped  # type: ignore[attr-defined]

    def broken(prepared: Any) -> torch.Tensor:
        values = tapped(prepared).clone()
        values[2] = float("nan")
        return values

    monkeypatch.setattr(expert, "_tapped", broken)
    with pytest.raises(InputError, match=f"row 2: the {expert.kind} expert"):
        expert.encode(ITEMS)


def test_contract_goes_red_when_encoding_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    expert = CASES["torch"].build()
    monkeypatch.setattr(expert, "_tapped", lambda prepared: torch.randn(len(prepared), 2))
    with pytest.raises(AssertionError):
        check_contract(expert, (1, 4))


def test_contract_goes_red_without_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScoredExpert, "_log_probs", lambda self, scores, form: scores)
    with pytest.raises(AssertionError):
        check_contract(CASES["torch"].build(), (1, 4))


def test_roundtrip_goes_red_when_weights_are_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_fusion.fuse.experts.torch_module._fill", lambda module, state, where: None)
    with pytest.raises(AssertionError):
        check_roundtrip(CASES["torch"].build(), tmp_path, network(seed=9))


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


def test_without_the_hash_a_changed_weight_would_go_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_fusion.fuse.experts.registry.file_sha256", lambda path: "same")
    expert = CASES["torch"].build()
    config = save_expert(expert, tmp_path)
    path = tmp_path / "weights.safetensors"
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    again = load_expert(tmp_path, config, given=network(seed=9))
    assert not torch.equal(again.encode(ITEMS).values, expert.encode(ITEMS).values)
