"""A fitted scikit-learn estimator or Pipeline as an expert, tapped at its output or inside its final step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_fusion.errors import InputError, IntegrityError, MissingDependencyError
from model_fusion.fuse.experts.base import ClassDecision, Decision, ValueDecision
from model_fusion.fuse.experts.reading import checked_items, frame_columns, is_frame, stack
from model_fusion.fuse.experts.schema import InputSchema
from model_fusion.fuse.experts.scored import Preprocess, ScoredExpert, Words, as_given, tensor
from model_fusion.fuse.experts.skops_file import read_estimator, write_skops

try:
    from sklearn.base import is_classifier
    from sklearn.ensemble import BaggingRegressor, VotingRegressor
    from sklearn.ensemble._forest import ForestClassifier, ForestRegressor
    from sklearn.pipeline import Pipeline
except ImportError:
    raise MissingDependencyError(
        "scikit-learn experts need scikit-learn: pip install 'model-fusion[sklearn]'"
    ) from None

Tap = Literal["output", "decision_function", "leaves", "neighbours"]
SaveAs = Literal["skops", "joblib"]
LEAF_BUCKETS = 64
"""Width of hashed leaves: boosting has thousands of (tree, leaf) pairs, a bridge wants few numbers."""


class SklearnExpert(ScoredExpert):
    """`estimator` is fitted, or the path of a .skops file (or of a pickle, with `allow_pickle=True`).

    Taps, with features [B, T, D]:
    - "output": log-probabilities [B, 1, C] (clipped at 1e-6; a classifier without `predict_proba` is
      read through the softmax of its decision function, which is uncalibrated), or the value [B, 1, 1];
    - "decision_function": [B, 1, D];
    - "leaves": each tree's vote [B, 1, trees · C] (a regression forest: [B, 1, trees]); for boosting and
      single trees the leaves reached, one-hot, hashed with signs into [B, 1, 64];
    - "neighbours": [B, k, 1 + C] (a regressor: [B, k, 2]): each neighbour's distance, then its label. An
      input that the estimator was fitted on finds itself at distance 0, with its own label: train bridges on
      others.

    `columns` names the columns of the DataFrame the estimator was fitted on (default: the names it
    remembers). DataFrames may be handed in as batches: their columns are taken by name, without the schema's
    check.
    """

    kind: ClassVar[str] = "sklearn"

    def __init__(
        self,
        estimator: Any,
        inputs: InputSchema,
        *,
        tap: Tap = "output",
        classes: Sequence[str] | None = None,
        preprocess: Preprocess | None = None,
        columns: Sequence[str] | None = None,
        words: Words | None = None,
        trusted: Sequence[str] = (),
        allow_pickle: bool = False,
        save_as: SaveAs = "skops",
        feature_shape: tuple[int, int] | None = None,
    ) -> None:
        if isinstance(estimator, str | Path):
            estimator = read_estimator(Path(estimator), allow_pickle=allow_pickle, trusted=trusted)
        if not hasattr(estimator, "predict"):
            raise InputError(f"sklearn expert: a {type(estimator).__name__} has no predict(); give a fitted estimator")
        if tap not in get_args(Tap):
            raise InputError(f"sklearn expert: tap is one of {', '.join(get_args(Tap))}, got {tap!r}")
        if is_classifier(estimator):
            learnt = _classes_of(estimator)
            if classes is not None and len(classes) != len(learnt):
                raise InputError(f"sklearn expert: {len(classes)} classes are named, the estimator knows {learnt}")
            classes = learnt if classes is None else classes
        elif classes is not None:
            raise InputError(f"sklearn expert: a {type(estimator).__name__} is a regressor and has no classes")
        super().__init__(inputs, tap=tap, classes=classes, preprocess=preprocess, words=words)
        self.estimator = estimator
        remembered = getattr(estimator, "feature_names_in_", None)
        names = columns if columns is not None else remembered
        self.columns = None if names is None else tuple(str(name) for name in names)
        self.trusted = tuple(trusted)
        self.save_as: SaveAs = save_as
        self._learn_shape(feature_shape)

    def _prepare(self, inputs: Sequence[Any]) -> Any:
        """A 2-D array float64 [B, n], a DataFrame where columns have names, or the texts of one text
        field."""
        if is_frame(inputs):
            if len(inputs) == 0:
                raise InputError("expected at least one input, got none")
            if self.preprocess is not None:
                return self.preprocess(inputs)
            names = self.columns or [field.name for field in self.inputs.fields]
            frame = frame_columns(inputs, names)
            return frame if self.columns else frame.to_numpy()
        items = checked_items(inputs, self.inputs)
        if self.preprocess is not None:
            return self.preprocess(items)
        if self.columns is not None:
            return self._frame(items, self.columns)
        if len(self.inputs.fields) == 1 and self.inputs.fields[0].type == "text":
            return items
        # float64, as the estimator was probably fitted: boosting's thresholds are finer than float32.
        return stack(items, self.inputs, np.float64).reshape(len(items), -1)

    def _frame(self, items: list[Any], columns: tuple[str, ...]) -> Any:
        import pandas as pd

        fields = self.inputs.fields
        rows = stack(items, self.inputs, np.float64) if fields[0].type == "array" else items
        names = [field.name for field in fields]
        if len(fields) == 1 and fields[0].type != "array":
            rows = [(item,) for item in items]
        if set(columns) <= set(names):
            return pd.DataFrame(rows, columns=names)[list(columns)]
        if len(rows[0]) != len(columns):
            raise InputError(f"sklearn expert: the estimator has {len(columns)} columns, the schema {len(rows[0])}")
        return pd.DataFrame(rows, columns=list(columns))

    def _tapped(self, prepared: Any) -> Tensor:
        with _plain_errors():
            if self.tap == "decision_function":
                return tensor(_method(self.estimator, "decision_function")(prepared))
            if self.tap == "output":
                decision = self._decided(prepared, spread=False)
                return decision.log_probs if isinstance(decision, ClassDecision) else decision.value
            final, reached = self._final(prepared)
            return tensor(_leaves(final, reached) if self.tap == "leaves" else self._neighbours(final, reached))

    def _decided(self, prepared: Any, spread: bool = True) -> Decision:
        with _plain_errors():
            if self.classes is None:
                value = self._decision_from(tensor(self.estimator.predict(prepared)), "logits")
                assert isinstance(value, ValueDecision)
                return ValueDecision(value.value, self._spread(prepared) if spread else None)
            if hasattr(self.estimator, "predict_proba"):
                return self._decision_from(tensor(self.estimator.predict_proba(prepared)), "probabilities")
            return self._decision_from(tensor(_method(self.estimator, "decision_function")(prepared)), "logits")

    def _final(self, prepared: Any) -> tuple[Any, Any]:
        """A Pipeline's last step and what reaches it; any other estimator and the input itself."""
        if not isinstance(self.estimator, Pipeline):
            return self.estimator, prepared
        if len(self.estimator.steps) == 1:
            return self.estimator[-1], prepared
        return self.estimator[-1], self.estimator[:-1].transform(prepared)

    def _spread(self, prepared: Any) -> Tensor | None:
        """One standard deviation across the members of an averaging ensemble, [B]; None for any other
        regressor."""
        final, reached = self._final(prepared)
        if isinstance(final, VotingRegressor):
            votes = np.asarray(final.transform(reached))
        elif isinstance(final, ForestRegressor):
            votes = _votes(final, reached).reshape(-1, len(final.estimators_))
        elif isinstance(final, BaggingRegressor):
            array = np.asarray(reached)
            members = zip(final.estimators_, final.estimators_features_, strict=True)
            votes = np.stack([member.predict(array[:, used]) for member, used in members], axis=1)
        else:
            return None
        return torch.from_numpy(votes.std(axis=1)).float()

    def _neighbours(self, final: Any, reached: Any) -> NDArray[np.float32]:
        distances, rows = _method(final, "kneighbors")(reached)
        labels = np.asarray(final._y)[rows]
        if self.classes is not None:
            labels = np.eye(len(self.classes))[labels]
        columns = labels.reshape(*distances.shape, -1)
        return np.concatenate([distances[..., None], columns], axis=-1).astype(np.float32)

    def save(self, folder: Path) -> dict[str, Any]:
        """One skops file (or joblib, with `save_as="joblib"`, which then loads only with
        `allow_pickle=True`)."""
        name = f"estimator.{self.save_as}"
        if self.save_as == "skops":
            write_skops(self.estimator, Path(folder) / name, self.trusted)
        else:
            import joblib

            joblib.dump(self.estimator, Path(folder) / name)
        columns = None if self.columns is None else list(self.columns)
        return self._config([name], columns=columns, save_as=self.save_as)

    @classmethod
    def load(
        cls, folder: Path, config: dict[str, Any], *, given: Any = None, allow_pickle: bool = False
    ) -> SklearnExpert:
        """`given` is a `Given` where a preprocess or words function was used, or types must be trusted."""
        parts = as_given(given, "preprocess")
        options = cls._options(config, parts)
        save_as: SaveAs = "joblib" if config["save_as"] == "joblib" else "skops"
        if config["files"] != [f"estimator.{save_as}"]:
            raise IntegrityError(f"the saved config of this sklearn expert is damaged: files {config.get('files')}")
        return cls(
            Path(folder) / f"estimator.{save_as}",
            columns=config["columns"],
            save_as=save_as,
            trusted=parts.trusted,
            allow_pickle=allow_pickle,
            **options,
        )


def _classes_of(estimator: Any) -> list[str]:
    try:
        return [str(name) for name in estimator.classes_]
    except AttributeError:
        raise InputError(f"sklearn expert: fit the {type(estimator).__name__} before it is fused") from None


def _method(estimator: Any, name: str) -> Any:
    if not hasattr(estimator, name):
        raise InputError(f"sklearn expert: a {type(estimator).__name__} has no {name}(); choose another tap")
    return getattr(estimator, name)


def _votes(forest: Any, reached: Any) -> NDArray[np.float32]:
    """Each tree's answer, [B, trees · C] or [B, trees]. The trees were fitted without column names."""
    array = reached if hasattr(reached, "tocsr") else np.asarray(reached, dtype=np.float32)
    ask = "predict_proba" if isinstance(forest, ForestClassifier) else "predict"
    votes = np.stack([getattr(tree, ask)(array) for tree in forest.estimators_], axis=1)
    return votes.reshape(len(votes), -1).astype(np.float32)


def _leaves(final: Any, reached: Any) -> NDArray[np.float32]:
    if isinstance(final, ForestClassifier | ForestRegressor):
        return _votes(final, reached)
    leaves = np.asarray(_method(final, "apply")(reached))
    return hashed_leaves(leaves.reshape(len(leaves), -1).astype(np.uint64))


def hashed_leaves(leaves: NDArray[np.uint64], width: int = LEAF_BUCKETS) -> NDArray[np.float32]:
    """Leaf numbers [B, trees] as signed counts [B, width]: the hashing trick (Weinberger et al. 2009, eq. 2),
    with Knuth's multiplicative hash of (tree, leaf), so that it is the same on every machine."""
    trees = np.arange(leaves.shape[1], dtype=np.uint64)
    mixed = ((leaves + trees * np.uint64(1_000_003)) * np.uint64(2_654_435_761)) & np.uint64(0xFFFFFFFF)
    buckets = ((mixed >> np.uint64(8)) % np.uint64(width)).astype(np.int64)
    signs = np.where(mixed >> np.uint64(31), 1.0, -1.0).astype(np.float32)
    counts = np.zeros((len(leaves), width), dtype=np.float32)
    np.add.at(counts, (np.arange(len(leaves))[:, None], buckets), signs)
    return counts


@contextmanager
def _plain_errors() -> Iterator[None]:
    """scikit-learn's ValueError (wrong width, NaN, not fitted) as one line."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"sklearn expert: {str(error).splitlines()[0]}") from error
