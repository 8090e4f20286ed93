"""The cases of the formula tests: every method and every paper variant, its reference, and inputs to compare on.

Inputs are multiples of 1/16 and weights of 1/8: differences and weighted sums are exact in float32, so that
reference and method see the same ties and elect the same signs, and ties are many.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model_fusion.merge.methods import Key, build, get

from . import reference, reference_subspace
from .reference import Array, Values

DENSITIES = (0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0)


@dataclass(frozen=True)
class Case:
    """One method with fixed parameters.

    each: what models are given: weight, density, gamma, mask, scale, strength. models: how many are possible.
    base: "yes", "no" or "maybe".
    """

    method: str
    want: reference.Reference
    params: Values = field(default_factory=dict)
    each: tuple[str, ...] = ()
    models: tuple[int, ...] = (1, 2, 3)
    base: str = "yes"

    @property
    def name(self) -> str:
        return "-".join([self.method, *(f"{k}={v}" for k, v in self.params.items()), f"base {self.base}"])


TRIMMED = ("weight", "density")
RANDOM = ("weight", "density", "mask")
ARCS = (2, 3)

CASES = [
    Case("linear", reference.linear, {}, ("weight",), base="no"),
    Case("linear", reference.linear, {"normalize": False}, ("weight",), base="no"),
    Case("passthrough", reference.passthrough, {}, ("scale",), (1,), "no"),
    Case("task_arithmetic", reference.task_arithmetic, {"lambda_": 0.5}, ("weight",)),
    Case("task_arithmetic", reference.task_arithmetic, {"normalize": True}, ("weight",)),
    Case("slerp", reference.slerp, {"t": 0.3}, (), (1,)),
    Case("slerp", reference.slerp, {"t": 1.0}, (), (1,)),
    Case("nuslerp", reference.nuslerp, {}, ("weight",), (2,)),
    Case("nuslerp", reference.nuslerp, {}, ("weight",), (2,), "no"),
    Case("nuslerp", reference.nuslerp, {"nuslerp_flatten": False}, ("weight",), (2,), "no"),
    Case("nuslerp", reference.nuslerp, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, ("weight",), (2,)),
    Case("multislerp", reference.multislerp, {}, ("weight",), ARCS),
    Case("multislerp", reference.multislerp, {"normalize_weights": False}, ("weight",), ARCS, "no"),
    Case("multislerp", reference.multislerp, {"log_map": True}, ("weight",), ARCS, "no"),
    Case("karcher", reference.karcher, {}, (), ARCS, "no"),
    Case("ties", reference.ties, {}, TRIMMED),
    Case("ties", reference.ties, {"normalize": False, "lambda_": 0.75}, TRIMMED),
    Case("ties", reference.ties, {"sign_before_weight": True}, TRIMMED),
    Case("breadcrumbs", reference.breadcrumbs, {}, (*TRIMMED, "gamma")),
    Case("breadcrumbs_ties", reference.breadcrumbs_ties, {"lambda_": 0.5}, (*TRIMMED, "gamma")),
    Case("dare_linear", reference.dare_linear, {}, RANDOM),
    Case("dare_linear", reference.dare_linear, {"rescale": "1/d"}, RANDOM),
    Case("dare_ties", reference.dare_ties, {}, RANDOM),
    Case("dare_ties", reference.dare_ties, {"rescale": False, "normalize": True}, RANDOM),
    Case("dare_ties", reference.dare_ties, {"rescale": "1/d", "sign_before_weight": True}, RANDOM),
    Case("della", reference.della, {}, RANDOM),
    Case("della_linear", reference.dare_linear, {}, RANDOM),
    Case("model_stock", reference.model_stock, {}, (), ARCS),
    Case("model_stock", reference.model_stock, {"filter_wise": True}, (), ARCS),
    Case("sce", reference.sce, {}, (), (1, 2, 4)),
    Case("sce", reference.sce, {"select_topk": 0.3}, (), (2, 4)),
    Case("sce", reference.sce, {"select_topk": 0.0}, (), (2,)),
    Case("arcee_fusion", reference.arcee_fusion, {}, (), (1,)),
    Case("nearswap", reference.nearswap, {"t": 0.2}, (), (1,)),
    Case("ram", reference.ram, {}, ()),
    Case("safemerge", reference.safemerge, {}, (), (2, 3, 4)),
    Case("safemerge", reference.safemerge, {"threshold": 0.92, "safe_weight": 0.75}, (), (2, 3, 4)),
    Case("safemerge", reference.safemerge, {"threshold": 0.92, "safe_weight": 1.5, "add": True}, (), (2, 3, 4)),
    Case("ramplus_tl", reference.ramplus_tl, {}, (), (2, 3)),
    Case("fisher", reference.fisher, {}, ("weight", "fisher"), base="no"),
    Case("fisher", reference.fisher, {"floor": 0.0}, ("weight", "fisher"), base="no"),
    Case("fisher", reference.fisher, {"floor": 0.25}, ("fisher",), base="no"),
    Case("regmean", reference.regmean, {}, ("weight", "gram"), base="no"),
    Case("regmean", reference.regmean, {"alpha": 0.0}, ("gram",), base="no"),
    Case("regmean", reference.regmean, {"alpha": 1.0, "ridge": 0.01}, ("weight", "gram"), base="no"),
    Case("tsv_m", reference_subspace.tsv_m, {}, ("weight",)),
    Case("tsv_m", reference_subspace.tsv_m, {"rank_fraction": 0.75, "rest": "sum"}, ("weight",)),
    Case("iso_c", reference_subspace.iso_c, {"lambda_": 1.25, "force": True}, ("weight",)),
    Case("iso_cts", reference_subspace.iso_cts, {"force": True}, ("weight",)),
    Case("iso_cts", reference_subspace.iso_cts, {"force": True, "common_space_fraction": 0.4}, ("weight",)),
    Case("wudi", reference_subspace.wudi, {"lambda_": 0.75}, ("weight",)),
    Case("wudi", reference_subspace.wudi, {"time": 3.0, "rank_fraction": 0.5}, ("weight",)),
    Case("consensus", reference.consensus, {}, ("strength",), (2, 3, 4)),
    Case("consensus", reference.consensus, {"at_least": 3, "lambda_": 0.75}, ("strength",), (3, 4)),
    Case("lines", reference.lines, {}, ("weight",)),
    Case("lines", reference.lines, {"alpha": 0.25, "beta": 0.5}, ("weight",)),
]


def draw(case: Case, shape: tuple[int, ...], seed: int) -> tuple[list[Array], Array | None, list[Values], list[Any]]:
    """Models, base, each model's parameters, and masks."""
    rng = np.random.default_rng(seed)
    base = rng.integers(-32, 33, shape) / 16
    count = int(rng.choice(case.models))
    models = [base + rng.integers(-16, 17, shape) * (rng.random(shape) < 0.8) / 16 for _ in range(count)]
    each: list[Values] = [{} for _ in models]
    for values in each:
        if "weight" in case.each:
            values["weight"] = int(rng.integers(1, 9)) / 8
        if "scale" in case.each:
            values["scale"] = int(rng.integers(-8, 9)) / 8
        if "strength" in case.each:
            values["strength"] = int(rng.integers(1, 13)) / 8
        if "density" in case.each:
            values["density"] = float(rng.choice(DENSITIES))
            if case.method.startswith("della"):
                values["epsilon"] = 0.0  # the masks are given, and it must fit every density
        if "gamma" in case.each:
            values["gamma"] = float(rng.choice([0.0, 0.01, 0.2, 1.0]))
    masks: list[Any] = [rng.random(shape) < 0.5 for _ in models]
    if "fisher" in case.each or "gram" in case.each:
        masks = statistics(rng, "gram" if "gram" in case.each else "fisher", len(models), shape)
    return models, None if case.base == "no" else base, each, masks


def statistics(rng: np.random.Generator, kind: str, count: int, shape: tuple[int, ...]) -> list[Any]:
    """One statistic a model: of 5 samples, some elements or inputs without any. A vector has no Gram matrix."""
    if kind == "fisher":
        return [rng.integers(0, 5, shape) ** 2 / 16 for _ in range(count)]
    if len(shape) != 2:
        return [None] * count
    shown = rng.random(shape[1]) < 0.9
    samples = [rng.integers(-4, 5, (5, shape[1])) / 4 * shown for _ in range(count)]
    return [x.T @ x / len(x) for x in samples]


def run(case: Case, models: list[Array], base: Array | None, each: list[Values], masks: list[Any]) -> Array:
    """The method's own answer, as float64."""
    method = get(case.method)
    given = [torch.from_numpy(m) for m in masks] if "mask" in case.each else None
    known = {"fisher", "gram"} & set(case.each) and masks[0] is not None
    data = [torch.from_numpy(m).float() for m in masks] if known else None
    key = Key(masks=given, depth=reference.DEPTH, data=data)
    got = method.run(
        [torch.from_numpy(m).float() for m in models],
        None if base is None else torch.from_numpy(base).float(),
        [build(method.model_params, values, case.method) for values in each],
        build(method.params, case.params, case.method),
        key,
    )
    return got.double().numpy()


def agrees(case: Case, shape: tuple[int, ...], seed: int) -> bool:
    """Whether method and reference give the same to float32 accuracy.

    Where a formula divides by what may be as good as 0 (opposite directions have no arc and no mean), elements
    that close to it are not compared: none exist in real checkpoints.
    """
    models, base, each, masks = draw(case, shape, seed)
    compared = has_angle(case, models, base) & has_subspaces(case, models, base, each)
    if not compared.any():
        return True
    with np.errstate(divide="ignore", invalid="ignore"):
        want = case.want(models, base, each, case.params, masks)
    got = run(case, models, base, each, masks)
    if case.method == "arcee_fusion":
        importance, threshold = reference.arcee_importance(models[0], base)
        compared = np.abs(importance - threshold) > 1e-6 * threshold
    scale = 1.0 + np.abs(want[compared]).max(initial=0.0)
    return bool(np.all(np.abs(got[compared] - want[compared]) <= 5e-6 * scale))


def has_angle(case: Case, models: list[Array], base: Array | None) -> NDArray[np.bool_]:
    """Where the vectors that an angle is taken between are neither zero nor nearly parallel or opposite.

    All true for the methods that need no angle.
    """
    shape = models[0].shape
    if case.method not in ("slerp", "nuslerp", "multislerp", "karcher", "model_stock"):
        return np.ones(shape, dtype=bool)
    vectors = [base, *models] if case.method == "slerp" else [m - (0 if base is None else base) for m in models]
    by_row = case.params.get("filter_wise") or case.params.get("nuslerp_flatten") is False
    if len(shape) < 2 or not by_row:
        return np.full(shape, clear([v.ravel() for v in vectors]))
    if case.params.get("nuslerp_row_wise"):
        return np.broadcast_to([clear([v[:, j] for v in vectors]) for j in range(shape[1])], shape)
    return np.broadcast_to([[clear([v[i] for v in vectors])] for i in range(shape[0])], shape)


def has_subspaces(case: Case, models: list[Array], base: Array | None, each: list[Values]) -> NDArray[np.bool_]:
    """All true, or all false where a subspace is cut between singular values that are (nearly) equal, and so is not
    defined."""
    shape = models[0].shape
    if len(shape) != 2 or case.method not in ("tsv_m", "iso_cts", "wudi"):
        return np.ones(shape, dtype=bool)
    tasks = [values.get("weight", 1.0) * (m - base) for m, values in zip(models, each, strict=True)]
    cuts: list[tuple[Array, int]] = []
    if case.method == "tsv_m":
        count = max(1, int(min(shape) * case.params.get("rank_fraction", 1 / len(tasks))))
        cuts = [(task, count) for task in tasks]
    elif case.method == "wudi":
        units = [task / np.linalg.norm(task) for task in tasks if task.any()]
        if units:
            cuts = [(np.concatenate(units), int(shape[1] * case.params.get("rank_fraction", 1.0)))]
    else:
        common, own = reference_subspace.iso_cts_split(tasks, case.params.get("common_space_fraction", 0.8))
        u = reference_subspace.triples(sum(tasks), common, reference_subspace.largest(sum(tasks)))[0]
        cuts = [(sum(tasks), common), *((task - u @ u.T @ task, own) for task in tasks)]
    return np.full(shape, all(parted(matrix, count) for matrix, count in cuts))


def parted(matrix: Array, count: int) -> bool:
    """Whether singular value number `count` stands clear of the next; nothing is cut at either end."""
    s = np.linalg.svd(matrix, compute_uv=False)
    if not 0 < count < len(s) or s[0] < 1e-9 or s[count - 1] < 1e-9 * s[0]:
        return True
    return bool(s[count - 1] - s[count] > 1e-3 * s[0])


def clear(vectors: list[Array]) -> bool:
    if any(not v.any() for v in vectors):
        return False
    angles = [reference.cosine(a, b) for i, a in enumerate(vectors) for b in vectors[:i]]
    return min(angles) > -0.3 and max(angles) < 0.999
