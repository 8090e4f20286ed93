"""What a merge method is: a pure function of float32 tensors, its parameters, and how much it must see.

Nothing here knows a file, a layer's name or a recipe. A tensor's name serves one thing: as part of the
key of the random masks, so that a result does not depend on the order in which tensors are merged.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import torch
from torch import Tensor

from model_fusion.architecture.roles import Rows
from model_fusion.errors import InputError
from model_fusion.merge.methods.selection import Cut
from model_fusion.recipe.parameters import fitted

CHUNK = 1 << 17
"""Elements per chunk: a few float32 buffers of it fit in a core's second-level cache."""
SPAN = 1 << 20
"""Elements that `stream` hands over at once: enough to write, few enough to stay in the third-level cache."""


class Sees(StrEnum):
    """How much of the inputs a method must see before it can write one output element."""

    ELEMENTWISE = "elementwise"
    ROW = "row"
    TWO_PASS = "two-pass"
    WHOLE_TENSOR = "whole-tensor"
    MODEL_WIDE = "model-wide"


@dataclass(frozen=True)
class Key:
    """What a result may depend on besides its tensors.

    **Arguments**
    seed, name: key of the random masks, together with the model's index.
    masks: one bool tensor a model that replaces its random mask (parity tests hand the same to two programs).
    cuts: one trimming cut a model, computed over all tensors (`trim="global"`).
    depth: where the tensor's layer lies, 0 first (and before the layers), 1 last (and after them); None: unknown.
    rows: what a matrix's rows stand for: outputs (torch's Linear), inputs (GPT-2's Conv1D), or tokens.
    data: one statistic a model, of the kind that the method needs; None where this tensor has none.
    """

    seed: int = 0
    name: str = ""
    masks: Sequence[Tensor] | None = None
    cuts: Sequence[Cut] | None = None
    depth: float | None = None
    rows: Rows = "outputs"
    data: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class NoParams:
    """A method, or its models, without parameters."""


def check_unit(name: str, value: float) -> None:
    """Raises InputError where `value` is not a share."""
    if not 0.0 <= value <= 1.0:
        raise InputError(f"{name} must lie in [0, 1], got {value:g}")


Statistics = Callable[[Sequence[Tensor], Tensor | None, Sequence[Any], Any, Key], Any]
Chunk = Callable[[Sequence[Tensor], Tensor | None, Sequence[Any], Any, Key, Any, int], Tensor]
Whole = Callable[[Sequence[Tensor], Tensor | None, Sequence[Any], Any, Key], Tensor]


@dataclass(frozen=True)
class Method:
    """One merge method.

    **Arguments**
    params, model_params: dataclasses of the method's and of each model's parameters.
    needs_base: whether a base tensor is required, optional or forbidden.
    min_models, max_models: how many models besides the base (None: no limit).
    statistics: `(models, base, model_params, params, key) -> state`, from whole tensors of any float dtype
        (they are widened block by block).
    chunk: `(models, base, model_params, params, key, state, start) -> float32`, on flat slices that begin at
        flat element `start`; together the chunks equal the whole tensor bit for bit, wherever they are cut.
    whole: for methods that cannot be cut: `(models, base, model_params, params, key) -> float32`.
    needs_whole: for methods with both: `(base, params, key)`, whether this tensor goes through `whole`.
    equal_norms: whether task vectors of very unequal length spoil the result, so that a merge warns of them.
    needs_data: the kind of statistic that each model must bring, if any. It comes as `key.data`, None for a tensor that
        has none; such a tensor is the weighted mean.
    """

    name: str
    sees: Sees
    params: type
    model_params: type
    needs_base: Literal["required", "optional", "forbidden"]
    min_models: int = 1
    max_models: int | None = None
    statistics: Statistics | None = None
    chunk: Chunk | None = None
    whole: Whole | None = None
    needs_whole: Callable[[Tensor, Any, Key], bool] | None = None
    equal_norms: bool = False
    needs_data: Literal["gram", "fisher"] | None = None

    def check(self, models: Sequence[Tensor], base: Tensor | None, model_params: Sequence[Any]) -> None:
        """Raises InputError where the number of models, the base or the shapes do not fit."""
        n = len(models)
        if n < self.min_models or (self.max_models is not None and n > self.max_models):
            most = "any number" if self.max_models is None else self.max_models
            raise InputError(f"{self.name} takes {self.min_models} to {most} models besides the base, got {n}")
        if self.needs_base == "required" and base is None:
            raise InputError(f"{self.name} needs a base model: name one as base_model")
        if self.needs_base == "forbidden" and base is not None:
            raise InputError(f"{self.name} takes no base model: remove base_model")
        if len(model_params) != n:
            raise InputError(f"{self.name}: {n} models but parameters for {len(model_params)}")
        shapes = {tuple(t.shape) for t in (*models, *(() if base is None else (base,)))}
        if len(shapes) > 1:
            raise InputError(f"{self.name}: tensors of one name must have one shape, got {sorted(shapes)}")

    def run(
        self,
        models: Sequence[Tensor],
        base: Tensor | None = None,
        model_params: Sequence[Any] | None = None,
        params: Any = None,
        key: Key | None = None,
        chunk_size: int = CHUNK,
    ) -> Tensor:
        """The merged tensor, float32, of the inputs' shape. Inputs are not changed.

        **Raises** InputError where number, base, shapes or weights do not fit.
        """
        fill = self._prepared(models, base, model_params, params, key, chunk_size)
        out = torch.empty(models[0].shape, dtype=torch.float32, device=models[0].device)
        fill(out.view(-1), 0)
        return out

    def stream(
        self,
        models: Sequence[Tensor],
        base: Tensor | None = None,
        model_params: Sequence[Any] | None = None,
        params: Any = None,
        key: Key | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Tensor]:
        """As `run`, rounded to `dtype`, in flat parts of up to SPAN elements; each overwrites the one before."""
        fill = self._prepared(models, base, model_params, params, key, CHUNK)
        numel = models[0].numel()
        buffer = torch.empty(min(SPAN, numel), dtype=dtype, device=models[0].device)
        for start in range(0, numel, SPAN):
            part = buffer[: min(SPAN, numel - start)]
            fill(part, start)
            yield part

    def _prepared(
        self,
        models: Sequence[Tensor],
        base: Tensor | None,
        model_params: Sequence[Any] | None,
        params: Any,
        key: Key | None,
        chunk_size: int,
    ) -> Callable[[Tensor, int], None]:
        """After checks and statistics: a function that fills a flat slice of the result from its start."""
        params = self.params() if params is None else params
        each = [self.model_params() for _ in models] if model_params is None else model_params
        known = key or Key()
        self.check(models, base, each)
        if models[0].numel() == 0:
            return lambda out, first: None
        uncut = self.needs_whole is None or (base is not None and self.needs_whole(base, params, known))
        if self.whole is not None and uncut:
            wide = [m.float() for m in models]
            result = self.whole(wide, None if base is None else base.float(), each, params, known).reshape(-1)

            def copy(out: Tensor, first: int) -> None:
                out.copy_(result[first : first + out.numel()])

            return copy
        assert self.chunk is not None
        chunk = self.chunk
        state = None if self.statistics is None else self.statistics(models, base, each, params, known)
        flat = [m.reshape(-1) for m in models]
        flat_base = None if base is None else base.reshape(-1)

        def fill(out: Tensor, first: int) -> None:
            for start in range(0, out.numel(), chunk_size):
                into = out[start : start + chunk_size]
                part = slice(first + start, first + start + into.numel())
                chunk_base = None if flat_base is None else flat_base[part]
                into.copy_(chunk([m[part] for m in flat], chunk_base, each, params, known, state, part.start))

        return fill


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Adds a method; raises ValueError where the name is taken."""
    if method.name in _METHODS:
        raise ValueError(f"method {method.name} is registered twice")
    if (method.chunk is None) == (method.whole is None) and method.needs_whole is None:
        raise ValueError(f"method {method.name} needs either chunk or whole")
    _METHODS[method.name] = method
    return method


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word closest to a misspelt one."""
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.0)
    return close[0] if close else ""


def get(name: str) -> Method:
    """The method of that name; InputError names the nearest otherwise."""
    if name not in _METHODS:
        raise InputError(f"unknown merge method {name!r}; did you mean {nearest(name, list(_METHODS))!r}?")
    return _METHODS[name]


def all_methods() -> list[Method]:
    """Every registered method, by name."""
    return [_METHODS[name] for name in sorted(_METHODS)]


def build(kind: type, values: dict[str, Any], owner: str) -> Any:
    """A parameter dataclass from plain values (`lambda` means `lambda_`); unknown names are InputErrors."""
    names = [f.name for f in dataclasses.fields(kind)]
    renamed = {"lambda_" if k == "lambda" else k: v for k, v in values.items()}
    for name in renamed:
        if name not in names:
            hint = f"; did you mean {nearest(name, names)!r}?" if names else " (it takes none)"
            raise InputError(f"{owner} has no parameter {name!r}{hint}")
    return kind(**fitted(kind, renamed))
