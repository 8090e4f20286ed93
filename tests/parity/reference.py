"""Naive float64 references of every merge method, written from the formulas alone (papers, and what mergekit does).

All take `(models, base, each, params, masks)`: float64 arrays of one shape, one dict of parameters a model, the
method's own parameters, and one bool mask a model where the method is random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Values = dict[str, Any]
Reference = Callable[[list[Array], Array, list[Values], Values, Sequence[Any]], Array]


def column(each: list[Values], name: str, default: float) -> list[float]:
    return [values.get(name, default) for values in each]


def keep_largest(delta: Array, k: int) -> Array:
    """The k largest magnitudes; of equal ones, those at the lowest flat indices."""
    order = np.argsort(-np.abs(delta).ravel(), kind="stable")[:k]
    out = np.zeros(delta.size)
    out[order] = delta.ravel()[order]
    return out.reshape(delta.shape)


def weighted(deltas: list[Array], weights: list[float], params: Values, normalize: bool) -> Array:
    total = sum(w * d for w, d in zip(weights, deltas, strict=True))
    if params.get("normalize", normalize):
        total = total / sum(weights)
    return params.get("lambda_", 1.0) * total


def elected(deltas: list[Array], weights: list[float], params: Values, normalize: bool) -> Array:
    before = params.get("sign_before_weight", False)
    scaled = [w * d for w, d in zip(weights, deltas, strict=True)]
    votes = sum(deltas) if before else sum(scaled)
    sign = np.where(votes >= 0, 1.0, -1.0)
    agree = [np.sign(d if before else x) == sign for d, x in zip(deltas, scaled, strict=True)]
    top = sum(x * m for x, m in zip(scaled, agree, strict=True))
    if params.get("normalize", normalize):
        bottom = sum(w * m for w, m in zip(weights, agree, strict=True))
        top = top / np.where(bottom == 0, 1.0, bottom)
    return params.get("lambda_", 1.0) * top


def linear(models, base, each, params, masks):
    weights = column(each, "weight", 1.0)
    total = sum(w * m for w, m in zip(weights, models, strict=True))
    return total / sum(weights) if params.get("normalize", True) else total


def passthrough(models, base, each, params, masks):
    return each[0].get("scale", 1.0) * models[0]


def task_arithmetic(models, base, each, params, masks):
    return base + weighted([m - base for m in models], column(each, "weight", 1.0), params, False)


def fisher(models, base, each, params, masks):
    weights, floor = column(each, "weight", 1.0), params.get("floor", 1e-6)
    if masks[0] is None:
        return linear(models, base, each, {}, ())
    least = floor * np.mean(masks)
    shares = [w * np.maximum(f, least) for w, f in zip(weights, masks, strict=True)]
    top, bottom = sum(s * m for s, m in zip(shares, models, strict=True)), sum(shares)
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), linear(models, base, each, {}, ()))


def regmean(models, base, each, params, masks):
    """W (Σ wG + ridge) = Σ wWG + ridge · mean, where the ridge of an input is a share of its energy (1 without any)."""
    if masks[0] is None:
        return linear(models, base, each, {}, ())
    weights, alpha = column(each, "weight", 1.0), params.get("alpha", 0.9)
    grams = [w * (alpha * g + (1 - alpha) * np.diag(np.diag(g))) for w, g in zip(weights, masks, strict=True)]
    energy = np.diag(sum(grams))
    ridge = np.diag(np.where(energy > 0, params.get("ridge", 1e-6) * energy, 1.0))
    right = sum(m @ g for m, g in zip(models, grams, strict=True)) + linear(models, base, each, {}, ()) @ ridge
    return np.linalg.solve((sum(grams) + ridge).T, right.T).T


def cosine(a: Array, b: Array) -> float:
    return float(a.ravel() @ b.ravel() / (np.linalg.norm(a) * np.linalg.norm(b)))


def arc(a: Array, b: Array, t: float, straight: float) -> Array:
    if not a.any() or not b.any() or abs(cosine(a, b)) > straight:
        return (1 - t) * a + t * b
    theta = math.acos(cosine(a, b))
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


def slerp(models, base, each, params, masks):
    return arc(base, models[0], params.get("t", 0.5), 0.9995)


def nuslerp(models, base, each, params, masks):
    first, second = column(each, "weight", 1.0)
    t = second / (first + second)
    a, b = (m - (0 if base is None else base) for m in models)
    straight = 1 - 1e-12
    if params.get("nuslerp_flatten", True) or a.ndim < 2:
        out = arc(a, b, t, straight)
    elif params.get("nuslerp_row_wise", False):
        out = np.stack([arc(x, y, t, straight) for x, y in zip(a.T, b.T, strict=True)], axis=1)
    else:
        out = np.stack([arc(x, y, t, straight) for x, y in zip(a, b, strict=True)])
    return out if base is None else base + out


def multislerp(models, base, each, params, masks):
    deltas = [m - (0 if base is None else base) for m in models]
    weights = np.array(column(each, "weight", 1.0))
    if params.get("normalize_weights", True):
        weights = weights / weights.sum()
    norms = np.array([np.linalg.norm(d) for d in deltas])
    units = [d / n for d, n in zip(deltas, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    if params.get("log_map", False):
        tangent = sum(w * log_map(mean, u) for w, u in zip(weights, units, strict=True))
        mean = exp_map(mean, tangent)
    out = mean * float(weights @ norms)
    return out if base is None else base + out


def log_map(point: Array, unit: Array) -> Array:
    angle = math.acos(max(-1.0, min(1.0, float(point.ravel() @ unit.ravel()))))
    away = unit - math.cos(angle) * point
    size = np.linalg.norm(away)
    return angle * away / size if size > 1e-9 else np.zeros_like(point)


def exp_map(point: Array, tangent: Array) -> Array:
    size = float(np.linalg.norm(tangent))
    return point if size == 0 else math.cos(size) * point + math.sin(size) * tangent / size


def karcher(models, base, each, params, masks):
    norms = [float(np.linalg.norm(m)) for m in models]
    units = [m / n for m, n in zip(models, norms, strict=True)]
    mean = sum(units) / len(units)
    mean = mean / np.linalg.norm(mean)
    for _ in range(params.get("max_iter", 10)):
        tangent = sum(log_map(mean, u) for u in units) / len(units)
        if np.linalg.norm(tangent) < params.get("tol", 1e-5):
            break
        mean = exp_map(mean, tangent)
        mean = mean / np.linalg.norm(mean)
    return mean * sum(norms) / len(norms)


def kept(density: float, size: int) -> int:
    return max(1, int(density * size))


def ties(models, base, each, params, masks):
    ks = [kept(d, base.size) for d in column(each, "density", 1.0)]
    trimmed = [keep_largest(m - base, k) for m, k in zip(models, ks, strict=True)]
    return base + elected(trimmed, column(each, "weight", 1.0), params, True)


def crumbs(models, base, each):
    out = []
    for model, values in zip(models, each, strict=True):
        keep = int(values.get("density", 1.0) * base.size)
        drop = min(int(values.get("gamma", 0.01) * base.size), base.size - keep)
        out.append(keep_largest(model - base, drop + keep) - keep_largest(model - base, drop))
    return out


def breadcrumbs(models, base, each, params, masks):
    return base + weighted(crumbs(models, base, each), column(each, "weight", 1.0), params, False)


def breadcrumbs_ties(models, base, each, params, masks):
    return base + elected(crumbs(models, base, each), column(each, "weight", 1.0), params, False)


def dropped(models, base, each, params, masks):
    """Masked and rescaled task vectors: rescale by the L1 ratio (true), by 1/d, or not at all."""
    out = []
    rescale = params.get("rescale", True)
    for model, values, mask in zip(models, each, masks, strict=True):
        delta, density = model - base, values.get("density", 1.0)
        left = delta * mask
        if rescale in (True, "l1") and np.abs(left).sum() > 0:
            left = left * (np.abs(delta).sum() / np.abs(left).sum())
        if rescale == "1/d" and density > 0:
            left = left / density
        out.append(left)
    return out


def dare_linear(models, base, each, params, masks):
    return base + weighted(dropped(models, base, each, params, masks), column(each, "weight", 1.0), params, False)


def dare_ties(models, base, each, params, masks):
    return base + elected(dropped(models, base, each, params, masks), column(each, "weight", 1.0), params, False)


def della(models, base, each, params, masks):
    return base + elected(dropped(models, base, each, params, masks), column(each, "weight", 1.0), params, True)


def della_probabilities(delta: Array, density: float, epsilon: float) -> Array:
    """(d − ε) + 2ε·rank ÷ (columns − 1) along each row; equal magnitudes share their mean rank."""
    if density >= 1:
        return np.ones_like(delta)
    rows = np.abs(delta).reshape(-1, delta.shape[-1])
    if rows.shape[1] == 1:
        return np.full_like(delta, density)
    rank = np.array([[(row < x).sum() + ((row == x).sum() - 1) / 2 for x in row] for row in rows])
    return ((density - epsilon) + 2 * epsilon * rank / (rows.shape[1] - 1)).reshape(delta.shape)


def model_stock(models, base, each, params, masks):
    deltas = [m - base for m in models]
    if params.get("filter_wise", False) and base.ndim > 1:
        return np.stack([_stock(base[i], [d[i] for d in deltas]) for i in range(base.shape[0])])
    return _stock(base, deltas)


def _stock(base: Array, deltas: list[Array]) -> Array:
    n = len(deltas)
    pairs = list(combinations(deltas, 2))
    c = sum(cosine(a, b) if a.any() and b.any() else 0.0 for a, b in pairs) / len(pairs)
    t = np.divide(n * c, 1 + (n - 1) * c)
    return t * (base + sum(deltas) / n) + (1 - t) * base


def sce(models, base, each, params, masks):
    deltas = [m - base for m in models]
    variance = np.var(deltas, axis=0)
    if params.get("select_topk", 1.0) < 1:
        k = int(np.count_nonzero(variance) * params["select_topk"])
        chosen = keep_largest(variance, k) > 0
        deltas = [d * chosen for d in deltas]
    energy = np.array([np.mean(d**2) for d in deltas])
    weights = energy / energy.sum() if energy.sum() >= 1e-6 else np.full(len(deltas), 1 / len(deltas))
    sign = np.where(sum(deltas) >= 0, 1.0, -1.0)
    agree = [np.sign(d) == sign for d in deltas]
    top = sum(w * d * m for w, d, m in zip(weights, deltas, agree, strict=True))
    bottom = sum(w * m for w, m in zip(weights, agree, strict=True))
    return base + top / np.maximum(bottom, 1e-6)


def log_softmax(rows: Array) -> Array:
    shifted = rows - rows.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def arcee_importance(model: Array, base: Array) -> tuple[Array, float]:
    """|δ|·KL(softmax θ ‖ softmax base) of the row, and the threshold median + 1.5·IQR."""
    p, q = log_softmax(model), log_softmax(base)
    importance = np.abs(model - base) * (np.exp(p) * (p - q)).sum(axis=-1, keepdims=True)
    low, middle, high = np.quantile(importance, [0.25, 0.5, 0.75])
    return importance, float(middle + 1.5 * (high - low))


def arcee_fusion(models, base, each, params, masks):
    importance, threshold = arcee_importance(models[0], base)
    return base + (models[0] - base) * (importance >= threshold)


def nearswap(models, base, each, params, masks):
    delta = models[0] - base
    share = np.minimum(1.0, params["t"] / np.where(delta == 0, 1.0, np.abs(delta)))
    return base + delta * share


def safemerge(models, base, each, params, masks):
    child, safe = models[:2]
    aligned, unaligned = (*models[2:], safe, base)[:2] if len(models) != 3 else (models[2], base)
    change, vector = child - base, aligned - unaligned
    columns = vector.reshape(vector.shape[0], -1)
    size = np.sqrt((vector**2).sum())
    projection = columns @ columns.T / (size or 1.0)
    moved = projection @ change.reshape(columns.shape)
    both = np.sqrt((moved**2).sum() * (change**2).sum())
    cos = (moved.ravel() @ change.ravel()) / both if both else 0.0
    if cos >= params.get("threshold", 0.35):
        return child
    weight = params.get("safe_weight", 0.2)
    return child + weight * vector if params.get("add") else (1 - weight) * child + weight * safe


def ram(models, base, each, params, masks, stretch=None):
    deltas = [m - base for m in models]
    changed = [np.abs(d) > params.get("epsilon", 1e-5) for d in deltas]
    count = sum(c.astype(float) for c in changed)
    factors = [1.0] * len(models) if stretch is None else stretch(changed, count)
    parts = [
        np.where(c, d * np.where(count == 1, f, 1.0), 0.0) for c, d, f in zip(changed, deltas, factors, strict=True)
    ]
    return base + sum(parts) / np.maximum(count, 1)


def ramplus_tl(models, base, each, params, masks):
    def stretch(changed, count):
        out = []
        for mask in changed:
            unique, shared = (mask & (count == 1)).sum(), (mask & (count > 1)).sum()
            ratio = shared / unique if unique else 0.0
            out.append(1 + params.get("r", 0.1) * min(ratio, params.get("alpha", 0.2)))
        return out

    return ram(models, base, each, params, masks, stretch)


def lines(models, base, each, params, masks):
    alpha = params.get("alpha", 1 / len(models)) + params.get("beta", 0.5) * DEPTH
    return base + alpha * weighted([m - base for m in models], column(each, "weight", 1.0), {}, False)


def consensus(models, base, each, params, masks):
    tau = [m - base for m in models]
    total = sum(tau)
    strengths = column(each, "strength", 0.4)
    votes = sum((abs(t) > s * abs(total - t)).astype(int) for t, s in zip(tau, strengths, strict=True))
    return base + params.get("lambda_", 0.3) * np.where(votes >= params.get("at_least", 2), total, 0.0)


DEPTH = 0.75
"""Where the tensors of all cases lie."""
