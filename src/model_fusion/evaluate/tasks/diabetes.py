"""A continuous value: boosting predicts the progression of diabetes; the LLM says the number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from model_fusion.evaluate.tasks.base import Metric, Task
from model_fusion.fuse.experts import Expert, Field, InputSchema, ValueDecision
from model_fusion.fuse.fit import Example
from model_fusion.fuse.number import number

COLUMNS = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
SCHEMA = InputSchema(tuple(Field(name, "float") for name in COLUMNS))
PROMPT = "What disease progression does the model predict? <|patient|>"
PARAPHRASES = (
    "<|patient|> How far will the disease progress?",
    "Patient: <|patient|>. Predict the progression.",
    "Give the predicted progression for this patient: <|patient|>",
    "Which progression score is expected? <|patient|>",
    "Here is a patient, <|patient|>. What is the predicted score?",
    "Tell me the predicted number: <|patient|>",
    "Disease progression in one year? <|patient|>",
    "The patient's record: <|patient|> What does the model say?",
    "What number does the regressor give? <|patient|>",
    "Progression? <|patient|>",
)
SPLIT_SEED = 20261121


def predictions(expert: Expert, items: Sequence[Any]) -> np.ndarray[Any, Any]:
    """The regressor's values, float64 [B]."""
    decision = expert.decide(items)
    assert isinstance(decision, ValueDecision)
    return decision.value.double().numpy()


def diabetes_task(expert: Expert | None = None, *, seed: int = 0, labels: int = 1500) -> Task:
    """Boosting learns from 300 patients; the bridge from `labels` made-up patients (real training rows, each
    column mixed and jittered) with the regressor's own rounded prediction; the test is 142 unseen patients."""
    from sklearn.datasets import load_diabetes
    from sklearn.ensemble import GradientBoostingRegressor
    from sklearn.linear_model import Ridge
    from sklearn.neighbors import KNeighborsRegressor

    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(x))
    taught, test = order[:300], order[300:]
    if expert is None:
        model = GradientBoostingRegressor(n_estimators=60, max_depth=2, random_state=seed).fit(x[taught], y[taught])
        expert = Expert.from_sklearn(model, SCHEMA)
    chosen = expert

    def untrained(other_seed: int) -> Expert:
        """The same boosting fitted on targets that were shuffled: it learned nothing of the patients."""
        wrong = np.random.default_rng(other_seed).permutation(y[taught])
        model = GradientBoostingRegressor(n_estimators=60, max_depth=2, random_state=other_seed)
        return Expert.from_sklearn(model.fit(x[taught], wrong), SCHEMA)

    rng = np.random.default_rng(seed)
    rows = x[taught][rng.integers(0, len(taught), (labels, len(COLUMNS))), np.arange(len(COLUMNS))]
    invented = [tuple(float(v) for v in row) for row in rows + rng.normal(0, 0.01, rows.shape)]
    said = [f"{value:.0f}" for value in predictions(chosen, invented)]
    held = max(1, labels // 10)
    made = [Example(PROMPT, {"patient": item}, text) for item, text in zip(invented, said, strict=True)]
    patients = [tuple(float(v) for v in x[i]) for i in test]
    truth = {item: float(y[i]) for item, i in zip(patients, test, strict=True)}

    def score(items: Sequence[Any], texts: Sequence[str]) -> dict[str, float]:
        values = predictions(chosen, items)
        read = [number(text) for text in texts]
        mean = float(y[taught].mean())  # an answer without one number counts as the constant guess
        numbers = np.array([mean if value is None else value for value in read])
        right = np.array([truth[tuple(item)] for item in items])
        own, error = float(np.abs(values - right).mean()), float(np.abs(numbers - right).mean())
        return {
            "agreement": float(np.mean(np.abs(numbers - values) <= 0.05 * np.abs(values))),
            "parsed": sum(v is not None for v in read) / len(read),
            "error": error,
            "expert_error": own,
            "ratio": error / own,
        }

    return Task(
        name="diabetes",
        expert_name="patient",
        expert=chosen,
        prompt=PROMPT,
        paraphrases=PARAPHRASES,
        train=tuple(made[held:]),
        validation=tuple(made[:held]),
        test=tuple(
            Example(PROMPT, {"patient": p}, f"{v:.0f}")
            for p, v in zip(patients, predictions(chosen, patients), strict=True)
        ),
        all_inputs=tuple(patients),
        parse=number,
        score=score,
        in_words=lambda item: ", ".join(f"{name} {value:.3f}" for name, value in zip(COLUMNS, item, strict=True)),
        metric=Metric("error", "mean absolute error", higher_is_better=False, digits=2),
        retold=lambda other: diabetes_task(other, seed=seed, labels=labels),
        untrained=untrained,
        exchanged={
            "a linear regressor": lambda: Expert.from_sklearn(Ridge(alpha=0.1).fit(x[taught], y[taught]), SCHEMA),
            "ten nearest neighbours": lambda: Expert.from_sklearn(
                KNeighborsRegressor(10).fit(x[taught], y[taught]), SCHEMA
            ),
        },
        options={"seed": seed, "labels": labels},
    )
