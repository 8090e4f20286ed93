"""What can be said of several models' tensors beside their base's: sums over elements, and the deltas' spectra.

Pure functions of tensors, in blocks: neither a delta nor a float32 copy of a tensor is ever held whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from model_fusion.merge.spectrum import Leading, Matrix, angle_error, leading, overlap, rounding_edge

_BLOCK = 1 << 16
RANK_UP_TO = 64
"""Ranks are looked for up to here; what is higher counts as full."""
_ABOVE = 1.15  # a finite matrix's largest noise value scatters around the edge
ANGLES = 8
"""Dimension of the subspaces whose overlap is told."""


@dataclass
class Sums:
    """Sums over the elements of one tensor, or of several. δ = model − base; without a base, the model itself.

    weight, square: Σθ², Σδ² a model; base: Σb²; onto_base: Σθb; peak: max|θ|; bad: NaN and Inf a model (base last).
    dot: Σδδ' a pair; both: elements where both δ are not 0; conflict: of these, where their signs differ.
    """

    numel: int
    base: float
    weight: list[float]
    square: list[float]
    onto_base: list[float]
    peak: list[float]
    bad: list[int]
    dot: list[float]
    both: list[int]
    conflict: list[int]

    def add(self, other: "Sums") -> None:
        """Another tensor's sums into these."""
        self.numel += other.numel
        self.base += other.base
        for name in ("weight", "square", "onto_base", "bad", "dot", "both", "conflict"):
            mine = getattr(self, name)
            mine[:] = [a + b for a, b in zip(mine, getattr(other, name), strict=True)]
        self.peak = [max(a, b) for a, b in zip(self.peak, other.peak, strict=True)]


def empty(models: int) -> Sums:
    """The sums of nothing."""
    pairs = models * (models - 1) // 2
    floats, counts = [0.0] * models, [0] * pairs
    return Sums(
        0, 0.0, floats[:], floats[:], floats[:], floats[:], [0] * (models + 1), [0.0] * pairs, counts[:], counts[:]
    )


def sums(models: Sequence[Tensor], base: Tensor | None) -> Sums:
    """The sums of one tensor. Where it holds NaN or Inf only `bad` and `numel` are filled."""
    total = empty(len(models))
    stored = [*models, *([] if base is None else [base])]
    total.numel = models[0].numel()
    for i, tensor in enumerate(stored):
        place = i if i < len(models) else -1
        parts = torch.split(tensor.reshape(-1), _BLOCK)
        total.bad[place] = sum(part.numel() - int(torch.isfinite(part).sum()) for part in parts)
    if any(total.bad):
        return total
    pairs = list(combinations(range(len(models)), 2))
    for parts in zip(*(torch.split(tensor.reshape(-1), _BLOCK) for tensor in stored), strict=True):
        wide = [part.double() for part in parts]
        own = wide[-1] if base is not None else None
        if own is not None:
            total.base += float(own @ own)
        deltas = []
        for i, weight in enumerate(wide[: len(models)]):
            total.weight[i] += float(weight @ weight)
            total.peak[i] = max(total.peak[i], float(weight.abs().max()))
            delta = weight if own is None else weight - own
            total.square[i] += float(delta @ delta)
            if own is not None:
                total.onto_base[i] += float(weight @ own)
            deltas.append(delta)
        for i, (a, b) in enumerate(pairs):
            product = deltas[a] * deltas[b]
            total.dot[i] += float(product.sum())
            negative, positive = int((product < 0).sum()), int((product > 0).sum())
            total.both[i] += negative + positive
            total.conflict[i] += negative
    return total


@dataclass(frozen=True)
class Spectrum:
    """Of one model's delta. rank: singular values above what rounding makes (None: full, or more than RANK_UP_TO);
    share: energy in the first 16; error: bound on the sine of the largest angle of the leading subspaces."""

    rank: int | None
    share: float
    error: float


@dataclass(frozen=True)
class Overlap:
    """Of two deltas' leading subspaces, outputs and inputs apart; `error` bounds how far either can be off, `chance`
    is what random subspaces would have."""

    outputs: float
    inputs: float
    error: float
    chance: tuple[float, float]


def spectra(
    models: Sequence[Tensor], base: Tensor, totals: Sequence[tuple[float, float, float]], seed: int = 0
) -> list[tuple[Spectrum, Leading] | None]:
    """The spectra of 2-D deltas, and their leading subspaces. `totals`: Σθ², Σb², Σδ² of each model. None: δ is 0."""
    shape = (base.shape[0], base.shape[1])
    found: list[tuple[Matrix, Leading, int] | None] = []
    for model, (weight, own, square) in zip(models, totals, strict=True):
        if square == 0.0:
            found.append(None)
            continue
        matrix = Matrix(shape, partial(_delta_rows, model, base))
        top = leading(matrix, min(RANK_UP_TO + 1, *shape), seed)
        stored = _ABOVE * rounding_edge(
            shape, [(weight / model.numel(), model.dtype), (own / base.numel(), base.dtype)]
        )
        # and what float32 products blur, in proportion to the largest value
        floor = max(stored, float(top.s[0]) * torch.finfo(torch.float32).eps * max(shape) ** 0.5)
        found.append((matrix, top, int((top.s > floor).sum())))
    # one dimension for all models of a tensor, so that each pair compares what each error speaks of
    used = max(min([ANGLES, *shape, *(entry[2] for entry in found if entry)]), 1)
    result: list[tuple[Spectrum, Leading] | None] = []
    for entry, (_, _, square) in zip(found, totals, strict=True):
        if entry is None:
            result.append(None)
            continue
        matrix, top, count = entry
        kept = float(top.s[:16].double().square().sum()) / square
        rank = None if count > RANK_UP_TO or count >= min(shape) else count
        result.append((Spectrum(rank, min(kept, 1.0), angle_error(matrix, top, used)), top.cut(used)))
    return result


def _delta_rows(model: Tensor, base: Tensor, start: int, stop: int) -> Tensor:
    return model[start:stop].float() - base[start:stop].float()


def overlap_of(one: tuple[Spectrum, Leading], two: tuple[Spectrum, Leading]) -> Overlap:
    """|tr(P P')/k − tr(Q Q')/k| ≤ sin θ + sin θ', where Q is P's neighbour at an angle θ: the errors add up."""
    a, b = one[1], two[1]
    chance = (len(a.s) / a.u.shape[0], len(a.s) / a.vh.shape[1])
    return Overlap(overlap(a.u, b.u), overlap(a.vh.T, b.vh.T), min(one[0].error + two[0].error, 1.0), chance)
