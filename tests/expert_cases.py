"""An expert of every kind with the same schema, and what each must keep: shared by the tests of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from model_fusion.fuse.experts import (
    ClassDecision,
    Expert,
    Field,
    InputSchema,
    load_expert,
    save_expert,
)

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
