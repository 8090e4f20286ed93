"""What all experts share: checked inputs, finite features of one shape, decisions, words, the config."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from model_fusion.errors import InputError, IntegrityError
from model_fusion.fuse.experts.base import ClassDecision, Decision, Expert, Features, Given, ValueDecision
from model_fusion.fuse.experts.reading import checked_items, probe_item, stack
from model_fusion.fuse.experts.schema import InputSchema

LEAST_PROBABILITY = 1e-6
"""Probabilities are clipped here before the logarithm: a forest's 0 votes must not become minus infinity."""

Scores = Literal["logits", "probabilities"]
Preprocess = Callable[[Sequence[Any]], Any]
Words = Callable[[Any], str] | Mapping[str, str]


class ScoredExpert(Expert):
    """An expert whose kind only says how a batch becomes tapped values and a decision.

    **Arguments**: `tap` names what `encode` reads; `classes` are a classifier's names in column order (None:
    a regressor); `preprocess` maps the list of B checked items to the model's input (default:
    `reading.stack`); `words` maps the decided class name (or value) to the text of `describe`;
    `feature_shape` (T, D) is learnt by encoding one made-up item unless given.
    """

    tap: str
    classes: tuple[str, ...] | None

    def __init__(
        self,
        inputs: InputSchema,
        *,
        tap: str,
        classes: Sequence[str] | None,
        preprocess: Preprocess | None,
        words: Words | None,
    ) -> None:
        self.inputs = inputs
        self.tap = tap
        self.classes = None if classes is None else tuple(str(name) for name in classes)
        self.preprocess = preprocess
        self.words = words
        if isinstance(words, Mapping) and self.classes is not None:
            missing = [name for name in self.classes if name not in words]
            if missing:
                raise InputError(f"words: no text for the classes {', '.join(missing)}")
        if isinstance(words, Mapping) and self.classes is None:
            raise InputError("words: a table of texts needs classes; give a regressor a function of its value")

    @abstractmethod
    def _tapped(self, prepared: Any) -> Tensor:
        """Values at the tap (of a classifier: log-probabilities), [B], [B, D], [B, T, D] or more dimensions, of what
        `_prepare` returned."""

    @abstractmethod
    def _decided(self, prepared: Any) -> Decision:
        """The decision on what `_prepare` returned."""

    def _prepare(self, inputs: Sequence[Any]) -> Any:
        items = checked_items(inputs, self.inputs)
        return stack(items, self.inputs) if self.preprocess is None else self.preprocess(items)

    def _learn_shape(self, feature_shape: tuple[int, int] | None) -> None:
        if feature_shape is None:
            values = self._features(self._prepare([probe_item(self.inputs)]))
            feature_shape = (values.shape[1], values.shape[2])
        self.feature_shape = (int(feature_shape[0]), int(feature_shape[1]))

    def _features(self, prepared: Any) -> Tensor:
        """Values at the tap, [B, T, D]. A classifier's output is its log-probabilities, whose tails tell how sure
        it is, and beside them the probabilities, without which two nearly equal classes are hard to tell apart."""
        values = three_dimensional(self._tapped(prepared))
        if self.classes is not None and self.tap == "output":
            values = torch.cat([values, values.exp()], dim=-1)
        return values

    def encode(self, inputs: Sequence[Any]) -> Features:
        """Features float32 [B, T, D] on the CPU; all of them present. Raises InputError on NaN or
        infinity."""
        values = self._features(self._prepare(inputs))
        self._require_finite(values)
        if len(values) != len(inputs) or tuple(values.shape[1:]) != self.feature_shape:
            expected = [len(inputs), *self.feature_shape]
            raise InputError(
                f"{self.kind} expert: expected features of shape {expected} at tap {self.tap!r}, "
                f"got {list(values.shape)}"
            )
        return Features(values, torch.ones(values.shape[:2], dtype=torch.bool))

    def decide(self, inputs: Sequence[Any]) -> Decision:
        """Log-probabilities over `classes`, or a value. Raises InputError on NaN or infinity."""
        decision = self._decided(self._prepare(inputs))
        values = decision.log_probs if isinstance(decision, ClassDecision) else decision.value
        self._require_finite(values)
        if len(values) != len(inputs):
            raise InputError(f"{self.kind} expert: {len(inputs)} inputs gave {len(values)} decisions")
        return decision

    def describe(self, inputs: Sequence[Any]) -> list[str]:
        """The likeliest class's name, or the value to three digits, or what `words` makes of either."""
        decision = self.decide(inputs)
        if isinstance(decision, ClassDecision):
            names = [decision.classes[index] for index in decision.log_probs.argmax(-1).tolist()]
            if isinstance(self.words, Mapping):
                return [self.words[name] for name in names]
            return names if self.words is None else [self.words(name) for name in names]
        say = self.words if callable(self.words) else rounded
        return [say(value) for value in decision.value.tolist()]

    def _require_finite(self, values: Tensor) -> None:
        finite = torch.isfinite(values).reshape(len(values), -1).all(-1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise InputError(f"row {row}: the {self.kind} expert's features (tap {self.tap!r}) contain NaN or infinity")

    def _decision_from(self, scores: Tensor, form: Scores) -> Decision:
        """The decision that model output [B, C] (or [B], [B, 1] for a value or a two-class score) stands
        for."""
        if self.classes is not None:
            return ClassDecision(self.classes, self._log_probs(scores, form))
        if scores.numel() != len(scores):
            raise InputError(
                f"{self.kind} expert: a value has one number a row, "
                f"the output has shape {list(scores.shape)}; "
                "give classes for a classifier"
            )
        return ValueDecision(scores.reshape(-1).float())

    def _log_probs(self, scores: Tensor, form: Scores) -> Tensor:
        assert self.classes is not None
        return log_probabilities(scores, len(self.classes), form, f"{self.kind} expert")

    def _config(self, files: Sequence[str], **own: Any) -> dict[str, Any]:
        """The JSON that `load` reads: everything but code, which `needs` lists by its name in `Given`."""
        needs = [name for name in ("preprocess", "words") if callable(getattr(self, name))]
        return {
            "kind": self.kind,
            "saved": True,
            "inputs": self.inputs.to_json(),
            "classes": None if self.classes is None else list(self.classes),
            "tap": self.tap,
            "feature_shape": list(self.feature_shape),
            "words": dict(self.words) if isinstance(self.words, Mapping) else None,
            "needs": needs,
            "files": list(files),
            **own,
        }

    @classmethod
    def _options(cls, config: Mapping[str, Any], given: Given) -> dict[str, Any]:
        """Constructor options from `_config`'s JSON. Raises InputError where `given` lacks what was used."""
        try:
            for name in config["needs"]:
                if getattr(given, name, None) is None:
                    raise InputError(
                        f"this {cls.kind} expert was saved with its own {name} function, "
                        "which no file holds: "
                        f"load it with given=Given({name}=...)"
                    )
            shape = config["feature_shape"]
            return {
                "inputs": InputSchema.from_json(config["inputs"]),
                "tap": config["tap"],
                "classes": config["classes"],
                "words": config["words"] if config["words"] is not None else given.words,
                "preprocess": given.preprocess if "preprocess" in config["needs"] else None,
                "feature_shape": (int(shape[0]), int(shape[1])),
            }
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise IntegrityError(f"the saved config of this {cls.kind} expert is damaged: {error!r}") from None


def three_dimensional(values: Tensor) -> Tensor:
    """[B], [B, D] and [B, C, H, W, …] as [B, 1, D]; [B, T, D] stays. float32 on the CPU."""
    values = values.detach().to("cpu", torch.float32)
    return values if values.ndim == 3 else values.reshape(len(values), 1, -1)


def log_probabilities(scores: Tensor, classes: int, form: Scores, where: str) -> Tensor:
    """Log-probabilities float32 [B, classes] of logits (log-softmax) or probabilities (clipped
    and renormalised).

    One column for two classes is the second class's logit or probability. Log-probabilities are valid logits.
    """
    scores = scores.float()
    scores = scores.reshape(len(scores), -1)
    if scores.shape[1] == 1 and classes == 2:
        other = 1.0 - scores if form == "probabilities" else torch.zeros_like(scores)
        scores = torch.cat([other, scores], dim=1)
    if scores.shape[1] != classes:
        raise InputError(f"{where}: {classes} classes are named, but the output has {scores.shape[1]} columns")
    if form == "logits":
        return torch.log_softmax(scores, dim=-1)
    sums = scores.sum(-1)
    # NaN passes here on purpose: the caller's finiteness check names its row.
    if bool((scores < -1e-4).any()) or bool(((sums - 1).abs() > 1e-2).any()):
        raise InputError(f"{where}: the output is not probabilities (they must be at least 0 and sum to 1)")
    clipped = scores.clamp(LEAST_PROBABILITY, 1.0)
    return torch.log(clipped / clipped.sum(-1, keepdim=True))


def as_given(given: Any, field: str) -> Given:
    """`given` as a `Given`; a bare live object is its `field`."""
    if isinstance(given, Given):
        return given
    return Given() if given is None or not field else Given(**{field: given})


def tensor(values: Any) -> Tensor:
    """A torch tensor of an array-like, without sharing read-only memory."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


def rounded(value: float) -> str:
    """Three significant digits, and never an exponent for large numbers: 0.123, 12.3, 1234."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
