"""Naive float64 references of the methods that look at singular vectors; see `reference`."""

from __future__ import annotations

import numpy as np

from .reference import Array, column


def triples(matrix: Array, count: int, size: float) -> tuple[Array, Array, Array]:
    """The first singular triples; those of (relative) singular value 0 have no direction and are left out."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    count = min(count, int((s > 1e-6 * size).sum()))
    return u[:, :count], s[:count], vh[:count]


def wh(matrix: Array) -> Array:
    """U Vᵀ of the SVD, without the directions that are not there."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    there = s > 1e-5 * s.max(initial=0.0)
    return u[:, there] @ vh[there]


def subspace(models, base, each, params, merge):
    """Matrices by `merge`, which takes their task vectors; what is no matrix by its mean."""
    tasks = [w * (m - base) for w, m in zip(column(each, "weight", 1.0), models, strict=True)]
    if base.ndim == 2:
        merged = merge(tasks)
    else:
        merged = sum(tasks) / (len(tasks) if params.get("rest", "mean") == "mean" else 1)
    return base + params.get("lambda_", 1.0) * merged


def largest(matrix: Array) -> float:
    return float(np.linalg.norm(matrix, 2))


def tsv_m(models, base, each, params, masks):
    def merge(tasks):
        count = max(1, int(min(base.shape) * params.get("rank_fraction", 1 / len(tasks))))
        parts = [triples(task, count, largest(task)) for task in tasks]
        u, s, vh = (np.concatenate([p[i] for p in parts], axis=axis) for i, axis in ((0, 1), (1, 0), (2, 0)))
        return wh(u) @ np.diag(s) @ wh(vh)

    return subspace(models, base, each, params, merge)


def iso_c(models, base, each, params, masks):
    def merge(tasks):
        u, s, vh = triples(sum(tasks), min(base.shape), largest(sum(tasks)))
        return s.sum() / min(base.shape) * u @ vh

    return subspace(models, base, each, params, merge)


def iso_cts_split(tasks: list[Array], fraction: float) -> tuple[int, int]:
    """Directions taken from the sum, and from each task."""
    rank = min(tasks[0].shape)
    each = round((rank - int(rank * fraction)) / len(tasks))
    each = min(each, rank // len(tasks))
    return rank - each * len(tasks), each


def iso_cts(models, base, each, params, masks):
    def merge(tasks):
        common, own = iso_cts_split(tasks, params.get("common_space_fraction", 0.8))
        total = sum(tasks)
        first = triples(total, common, largest(total))
        outside = np.eye(base.shape[0]) - first[0] @ first[0].T
        parts = [first, *(triples(outside @ task, own, np.linalg.norm(task)) for task in tasks)]
        u, s, vh = (np.concatenate([p[i] for p in parts], axis=axis) for i, axis in ((0, 1), (1, 0), (2, 0)))
        return s.sum() / min(base.shape) * wh(u) @ wh(vh)

    return subspace(models, base, each, params, merge)


def wudi(models, base, each, params, masks):
    def merge(tasks):
        norms = [np.linalg.norm(task) ** 2 for task in tasks]
        c = sum(t.T @ t / n for t, n in zip(tasks, norms, strict=True) if n)
        d = sum(t @ t.T @ t / n for t, n in zip(tasks, norms, strict=True) if n)
        total = sum(tasks)
        if not np.any(total) and not np.any(c):
            return total
        energy, v = np.linalg.eigh(c)
        order = np.argsort(-energy)[: int(params.get("rank_fraction", 1.0) * base.shape[1])]
        order = order[energy[order] > 1e-12 * energy.max()]
        energy, v = energy[order], v[:, order]
        h = 1 - np.exp(-energy * params.get("time", 10.0))
        return total - total @ v @ np.diag(h) @ v.T + d @ v @ np.diag(h / energy) @ v.T

    return subspace(models, base, each, params, merge)
