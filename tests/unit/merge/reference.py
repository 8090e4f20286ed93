"""Naive float64 references, written from the formulas alone."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def keep_largest(delta: Array, k: int) -> Array:
    order = np.argsort(-np.abs(delta).ravel(), kind="stable")[:k]
    out = np.zeros(delta.size)
    out[order] = delta.ravel()[order]
    return out.reshape(delta.shape)


def elect(deltas: list[Array], weights: list[float], normalize: bool, before: bool = False) -> Array:
    weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
    sign = np.where(sum(deltas if before else weighted) >= 0, 1.0, -1.0)
    agree = [np.sign(d if before else x) == sign for d, x in zip(deltas, weighted, strict=True)]
    top = sum(x * m for x, m in zip(weighted, agree, strict=True))
    bottom = sum(w * m for w, m in zip(weights, agree, strict=True))
    return top / np.where(bottom == 0, 1.0, bottom) if normalize else top


def ties(models: list[Array], base: Array, weights: list[float], density: float, before: bool) -> Array:
    k = max(1, int(density * base.size))
    trimmed = [keep_largest((m - base).astype(np.float32).astype(np.float64), k) for m in models]
    return base + elect(trimmed, weights, True, before)
