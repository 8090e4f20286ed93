"""A fusion as a scikit-learn estimator, and the likelihoods it is built on."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV

import model_fusion as mf
from model_fusion.errors import InputError
from model_fusion.fuse import likelihood
from model_fusion.fuse.likelihood import answer_log_likelihood

QUICK = {"steps": 40, "batch_size": 16, "target": (1.0, 0.05)}


def data(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(seed).uniform(-1, 1, (count, 3))
    return x, np.where(x[:, 0] + x[:, 1] > 0.4, "red", np.where(x[:, 0] + x[:, 1] < -0.4, "blue", "dark green"))


@pytest.fixture(scope="module")
def fitted() -> mf.FusedClassifier:
    model = mf.FusedClassifier(LogisticRegression(C=100, max_iter=1000), dtype="bfloat16", training=QUICK)
    return model.fit(*data(260, 0))


def test_the_llm_answers_with_the_experts_skill(fitted: mf.FusedClassifier) -> None:
    x, y = data(30, 1)
    assert fitted.score(x, y) >= 0.85
    assert set(fitted.answers(x)) <= {"red", "blue", "dark green"}
    assert list(fitted.classes_) == ["blue", "dark green", "red"]


def test_probabilities(fitted: mf.FusedClassifier) -> None:
    x, _ = data(30, 2)
    found = fitted.predict_proba(x)
    assert found.shape == (30, 3)
    assert np.allclose(found.sum(axis=1), 1)
    assert np.allclose(np.log(found), fitted.predict_log_proba(x))
    sure = found.max(axis=1) > 0.9
    assert sure.sum() >= 15
    assert (fitted.classes_[found.argmax(axis=1)] == fitted.predict(x))[sure].all()


def naive(model: mf.FusedClassifier, x: np.ndarray) -> np.ndarray:
    """The sum of log p over an answer's tokens: row by row, token by token, in float64."""
    fused, found = model.fused_, np.zeros((len(x), len(model.classes_)))
    for row, item in enumerate(x.tolist()):
        for column, name in enumerate(model.class_names_):
            tokens = fused.processor.answer_ids(str(name))
            for count, token in enumerate(tokens):
                (encoded,) = fused.processor.encode([model.prompt_], [{"expert": tuple(item)}])
                batch = fused.processor.collate([encoded])
                batch["input_ids"] = torch.tensor([[*encoded.ids, *tokens[:count]]])
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
                with torch.no_grad():
                    scores = fused(**batch, use_cache=False).logits[0, -1].double().numpy()
                top = scores.max()
                found[row, column] += scores[token] - top - math.log(np.exp(scores - top).sum())
    return found


def likelihoods(model: mf.FusedClassifier, x: np.ndarray, **options: Any) -> np.ndarray:
    rows = [tuple(row) for row in x.tolist()]
    found = answer_log_likelihood(
        model.fused_, [model.prompt_] * len(rows), [{"expert": r} for r in rows], model.class_names_, **options
    )
    return found.double().numpy()


@pytest.fixture
def exact(fitted: mf.FusedClassifier) -> Iterator[mf.FusedClassifier]:
    """The same model computing in float32."""
    fitted.fused_.base.float()
    yield fitted
    fitted.fused_.base.bfloat16()


def test_likelihood_equals_a_naive_one(exact: mf.FusedClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, (x, _) = exact, data(2, 3)
    expected = naive(fitted, x)
    assert np.abs(likelihoods(fitted, x) - expected).max() < 2e-3
    assert np.abs(likelihoods(fitted, x, batch_size=1) - expected).max() < 2e-3
    # Red when the answer's tokens are read one position off, or the end of turn is left out.
    right = likelihood.sequence_log_likelihood

    def shifted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return right(logits.roll(1, dims=1), labels)

    def endless(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        last = labels.clone()
        last[:, -1] = -100
        return right(logits, last)

    def mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return right(logits, labels) / (labels != -100).sum(dim=1)

    for wrong in (shifted, endless, mean):
        monkeypatch.setattr(likelihood, "sequence_log_likelihood", wrong)
        assert np.abs(likelihoods(fitted, x) - expected).max() > 2e-3, wrong.__name__


def test_parameters_and_clones(fitted: mf.FusedClassifier) -> None:
    copy = clone(fitted)
    assert copy.get_params() == {**fitted.get_params(), "expert": copy.expert, "training": copy.training}
    assert not hasattr(copy, "fused_")
    assert copy.set_params(bridge="prefix", expert__C=3.0).expert.C == 3.0
    assert GridSearchCV(copy, {"bridge": ["gated", "prefix"]}).estimator is copy
    assert clone(mf.FusedRegressor(decimals=2)).decimals == 2
    with pytest.raises(Exception, match="not fitted"):
        copy.predict([[0, 0, 0]])


def test_bad_data_is_told_in_one_line(fitted: mf.FusedClassifier) -> None:
    x, y = data(20, 4)
    for model, given, target, message in (
        (mf.FusedClassifier(), x, y[:5], "X has 20 rows, y has 5"),
        (mf.FusedClassifier(), x[:, 0], y, "expected a table"),
        (mf.FusedClassifier(), x, ["one"] * 20, "one class only"),
        (mf.FusedClassifier(), x, ["rare", *["one"] * 19], "cannot be shared between expert and bridge"),
        (mf.FusedClassifier(LinearRegression()), x, y, "is no classifier; use FusedRegressor"),
        (mf.FusedClassifier(prompt="Which?"), x, y, "write the placeholder"),
        (mf.FusedClassifier(bridge_share=1.0), x, y, "between 0 and 1"),
        (mf.FusedRegressor(RandomForestClassifier()), x, x[:, 0], "is no regressor; use FusedClassifier"),
        (mf.FusedRegressor(), x, [float("nan")] * 20, "y contains NaN"),
    ):
        with pytest.raises(InputError, match=message):
            model.fit(given, target)
    with pytest.raises(InputError, match="X has 2 features, but 3 were fitted"):
        fitted.predict(x[:, :2])
    with pytest.raises(InputError, match="finite number, got nan"):
        fitted.predict([[0.0, float("nan"), 0.0]])


def test_a_regressor_says_numbers_and_reads_a_frame_by_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"size": rng.uniform(0, 9, 120), "rooms": rng.integers(1, 5, 120)})
    price = (frame["size"] * 0.4 + frame["rooms"]).round()  # 1 to 8: one token each
    model = mf.FusedRegressor(
        LinearRegression(), decimals=0, extra_rows=60, dtype="bfloat16", training={**QUICK, "steps": 50}
    )
    model.fit(frame, price)
    test = frame.iloc[:16]
    own = model.expert_.decide(test).value.numpy()
    assert np.abs(model.predict(test) - own).mean() < 1.0
    assert model.score(test[["rooms", "size"]], price[:16]) > 0.5
    with pytest.raises(InputError, match="lacks the columns size"):
        model.predict(test[["rooms"]])
    monkeypatch.setattr(model, "answers", lambda X: ["3", "no idea", "1 or 2"])
    with pytest.warns(UserWarning, match="2 of 3 answers hold no number"):
        assert model.predict(test[:3]).tolist() == [3.0, model.mean_, model.mean_]
