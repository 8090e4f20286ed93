"""A fusion as a scikit-learn estimator: an expert learns from X and y, an LLM learns to read it, and answers.

`FusedClassifier().fit(X, y).predict(X)` works in pipelines, cross-validation and grid searches.
"""

from __future__ import annotations

import warnings
from abc import ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_fusion.errors import InputError, MissingDependencyError
from model_fusion.fuse.experts import ClassDecision, Expert, Field, InputSchema, ValueDecision
from model_fusion.fuse.experts.reading import is_frame
from model_fusion.fuse.experts.scored import rounded
from model_fusion.fuse.fit import Example
from model_fusion.fuse.likelihood import answer_log_likelihood
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.number import number

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone, is_classifier, is_regressor
    from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier
    from sklearn.model_selection import train_test_split
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted
except ImportError:
    raise MissingDependencyError("FusedClassifier needs scikit-learn: pip install 'model-fusion[sklearn]'") from None

NAME = "expert"


class _Fused(BaseEstimator, metaclass=ABCMeta):
    """What classifier and regressor share.

    expert: an unfitted scikit-learn estimator or Pipeline (None: a forest or boosting), cloned and fitted in `fit`
    on all rows but `bridge_share` of them, from which the bridge learns. prompt: the question, with the
    placeholder <|expert|>. extra_rows: made-up rows that the expert labels for the bridge (columns of real rows
    mixed): a regressor's bridge needs about a thousand. training: fields of `TrainSettings`. `fused_` is the model.
    """

    _question: str

    def __init__(
        self,
        expert: Any = None,
        *,
        base: Any = "smollm2",
        bridge: Any = "gated",
        prompt: str | None = None,
        bridge_share: float = 0.3,
        extra_rows: int = 0,
        training: Mapping[str, Any] | None = None,
        dtype: Any = "auto",
        random_state: int = 0,
    ) -> None:
        self.expert = expert
        self.base = base
        self.bridge = bridge
        self.prompt = prompt
        self.bridge_share = bridge_share
        self.extra_rows = extra_rows
        self.training = training
        self.dtype = dtype
        self.random_state = random_state

    def _fit(self, X: Any, y: Any, names: list[str] | None, estimator: Any) -> Any:
        table = _table(X)
        if len(table) != len(y):
            raise InputError(f"X has {len(table)} rows, y has {len(y)}")
        if not 0 < self.bridge_share < 1:
            raise InputError(f"bridge_share must be between 0 and 1, got {self.bridge_share}")
        prompt = self._question if self.prompt is None else self.prompt
        if prompt.count(f"<|{NAME}|>") != 1:
            raise InputError(f"prompt: write the placeholder <|{NAME}|> once in it, got {prompt!r}")
        try:
            taught, shown = train_test_split(
                np.arange(len(y)),
                test_size=self.bridge_share,
                random_state=self.random_state,
                stratify=None if names is None else y,
            )
        except ValueError as error:  # a class too rare for expert and bridge both to see it
            raise InputError(f"the rows cannot be shared between expert and bridge: {error}") from None
        fitted = clone(estimator).fit(_taken(X, taught), np.asarray(y)[taught])
        self.schema_ = _schema(X, table)
        self.expert_ = Expert.from_sklearn(fitted, self.schema_, classes=names)
        items = _items([table[i] for i in shown])
        items += _items(_mixed([table[i] for i in taught], self.extra_rows, self.random_state))
        examples = [Example(prompt, {NAME: i}, a) for i, a in zip(items, self._say(items), strict=True)]
        self.fused_ = FusedModel.build(
            self.base, experts={NAME: self.expert_}, bridge=self.bridge, dtype=self.dtype, seed=self.random_state
        )
        self.prompt_ = prompt
        self.n_features_in_ = len(table[0])
        if is_frame(X):
            self.feature_names_in_ = np.asarray(list(X.columns), dtype=object)
        self.history_ = None
        if self.fused_.bridge.trainable:
            settings = {"seed": self.random_state, "progress": False, **(self.training or {})}
            self.history_ = self.fused_.fit(examples, **settings)
        return self

    @abstractmethod
    def _say(self, items: list[Any]) -> list[str]:
        """What the expert decides of each item, as the LLM shall say it."""

    def _asked(self, X: Any) -> tuple[list[str], list[dict[str, Any]]]:
        check_is_fitted(self, "fused_")
        table = _table(_ordered(X, getattr(self, "feature_names_in_", None)))
        if len(table[0]) != self.n_features_in_:
            raise InputError(f"X has {len(table[0])} features, but {self.n_features_in_} were fitted")
        return [self.prompt_] * len(table), [{NAME: item} for item in _items(table)]

    def answers(self, X: Any) -> list[str]:
        """The LLM's answers in words, greedy, one for each row."""
        check_is_fitted(self, "fused_")
        return self.fused_.answer(*self._asked(X))


class FusedClassifier(ClassifierMixin, _Fused):
    """The LLM names the class of a row. Parameters as in `_Fused`; `classes_` are the labels of `fit`."""

    _question = "Which class is it? <|expert|>"

    def fit(self, X: Any, y: Any) -> FusedClassifier:
        """Fit expert and bridge. X: [n, features], an array, a DataFrame or rows; y: labels, of any type."""
        estimator = RandomForestClassifier(random_state=self.random_state) if self.expert is None else self.expert
        if not is_classifier(estimator):
            raise InputError(f"expert: a {type(estimator).__name__} is no classifier; use FusedRegressor")
        check_classification_targets(y)
        self.classes_ = np.unique(np.asarray(y))
        if len(self.classes_) < 2:
            raise InputError(f"y has one class only ({self.classes_[0]!r}): at least two are needed")
        self.class_names_ = [str(label) for label in self.classes_]
        self._fit(X, y, self.class_names_, estimator)
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """The class that the LLM answers with, [n]; where its greedy words are no class's name, the one whose name
        it finds likeliest."""
        answers = self.answers(X)
        index = {name: number for number, name in enumerate(self.class_names_)}
        chosen = np.array([index.get(answer, -1) for answer in answers])
        if (unread := np.flatnonzero(chosen < 0)).size:
            chosen[unread] = self._log_likelihood(_taken(X, unread)).argmax(axis=1)
        return np.asarray(self.classes_[chosen])

    def predict_log_proba(self, X: Any) -> NDArray[np.float64]:
        """The logarithm of `predict_proba`."""
        scores = self._log_likelihood(X)
        return np.asarray(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """[n, classes]: the LLM's likelihood of each class's name as the whole answer, normalised over classes."""
        return np.asarray(np.exp(self.predict_log_proba(X)))

    def _log_likelihood(self, X: Any) -> NDArray[np.float64]:
        return answer_log_likelihood(self.fused_, *self._asked(X), self.class_names_).double().cpu().numpy()

    def _say(self, items: list[Any]) -> list[str]:
        # Not `describe`: the answer is the class's name whatever words the expert has for it.
        decision = self.expert_.decide(items)
        assert isinstance(decision, ClassDecision)
        return [self.class_names_[i] for i in decision.log_probs.argmax(dim=-1).tolist()]


class FusedRegressor(RegressorMixin, _Fused):
    """The LLM says a number. `decimals`: digits after the point (None: three significant digits)."""

    _question = "What number is it? <|expert|>"

    def __init__(
        self,
        expert: Any = None,
        *,
        base: Any = "smollm2",
        bridge: Any = "gated",
        prompt: str | None = None,
        bridge_share: float = 0.3,
        extra_rows: int = 1000,
        training: Mapping[str, Any] | None = None,
        dtype: Any = "auto",
        random_state: int = 0,
        decimals: int | None = None,
    ) -> None:
        super().__init__(
            expert,
            base=base,
            bridge=bridge,
            prompt=prompt,
            bridge_share=bridge_share,
            extra_rows=extra_rows,
            training=training,
            dtype=dtype,
            random_state=random_state,
        )
        self.decimals = decimals

    def fit(self, X: Any, y: Any) -> FusedRegressor:
        """Fit expert and bridge. X: [n, features]; y: numbers [n]."""
        estimator = GradientBoostingRegressor(random_state=self.random_state) if self.expert is None else self.expert
        if not is_regressor(estimator):
            raise InputError(f"expert: a {type(estimator).__name__} is no regressor; use FusedClassifier")
        values = np.asarray(y, dtype=np.float64)
        if not np.isfinite(values).all():
            raise InputError("y contains NaN or infinity")
        self.mean_ = float(values.mean())
        self._fit(X, values, None, estimator)
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """The number in the LLM's answer, [n]; with a warning the training mean, where it is not one number."""
        found = [number(answer) for answer in self.answers(X)]
        if unread := found.count(None):
            warnings.warn(
                f"{unread} of {len(found)} answers hold no number, or several: the mean of y stands for them; "
                "train longer, or with more extra_rows",
                UserWarning,
                stacklevel=2,
            )
        return np.array([self.mean_ if value is None else value for value in found])

    def _say(self, items: list[Any]) -> list[str]:
        decision = self.expert_.decide(items)
        assert isinstance(decision, ValueDecision)
        values = decision.value.tolist()
        return [rounded(v) if self.decimals is None else f"{v:.{self.decimals}f}" for v in values]


def _ordered(X: Any, names: Any) -> Any:
    """A DataFrame's columns in the order of `fit`."""
    if names is None or not is_frame(X):
        return X
    if missing := [name for name in names if name not in X.columns]:
        raise InputError(f"X lacks the columns {', '.join(map(str, missing))}")
    return X[list(names)]


def _table(X: Any) -> list[tuple[Any, ...]]:
    """X as rows of plain values. Raises InputError for what is not a table."""
    if is_frame(X):
        rows = [tuple(row) for row in X.itertuples(index=False, name=None)]
    else:
        array = np.asarray(X)
        if array.ndim != 2:
            raise InputError(f"X: expected a table of rows and columns, got shape {list(array.shape)}")
        rows = [tuple(row) for row in array.tolist()]
    if not rows or not rows[0]:
        raise InputError("X: expected at least one row and one column")
    return rows


def _items(table: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Rows as items of the schema: with one column, the value itself."""
    return [row[0] if len(row) == 1 else row for row in table]


def _schema(X: Any, table: Sequence[tuple[Any, ...]]) -> InputSchema:
    """One field a column: bool, a number, or text."""
    names = [str(name) for name in X.columns] if is_frame(X) else [f"x{i}" for i in range(len(table[0]))]
    fields = []
    for place, name in enumerate(names):
        column = [row[place] for row in table]
        if all(isinstance(v, bool | np.bool_) for v in column):
            fields.append(Field(name, "bool"))
        elif all(isinstance(v, int | float | np.number) for v in column):
            fields.append(Field(name, "float"))
        else:
            fields.append(Field(name, "text"))
    return InputSchema(tuple(fields))


def _taken(X: Any, rows: NDArray[Any]) -> Any:
    """The rows of X with these numbers."""
    return X.iloc[rows] if is_frame(X) else np.asarray(X)[rows]


def _mixed(table: Sequence[tuple[Any, ...]], count: int, seed: int) -> list[tuple[Any, ...]]:
    """`count` made-up rows: each value from a real row of its own, so that they spread over what X covers."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(table), (count, len(table[0])))
    return [tuple(table[i][column] for column, i in enumerate(row)) for row in picks]
