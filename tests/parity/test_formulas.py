"""Every method equals the naive float64 reference of its formula, and each such check has been seen to fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_fusion.merge.methods import (
    all_methods,
    arcee_fusion,
    consensus,
    dare,
    data_based,
    merge_state_dicts,
    model_stock,
    safemerge,
    sce,
    selection,
    slerp,
    sphere,
    task_arithmetic,
    ties,
)
from model_fusion.merge.methods.base import Method
from model_fusion.merge.methods.subspace import iso, matrices, tsv

from . import reference
from .cases import CASES, Case, agrees, draw, has_angle, has_subspaces

SHAPES = st.one_of(
    st.tuples(st.integers(1, 60)),
    st.tuples(st.integers(1, 12), st.integers(1, 40)),
)


def test_every_method_has_a_case() -> None:
    assert {case.method for case in CASES} == {method.name for method in all_methods()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@settings(deadline=None, max_examples=30)
@given(shape=SHAPES, seed=st.integers(0, 10**6))
def test_method_equals_its_formula(case: Case, shape: tuple[int, ...], seed: int) -> None:
    assert agrees(case, shape, seed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_most_inputs_are_compared(case: Case) -> None:
    drawn = [draw(case, (6, 30), seed) for seed in range(20)]
    compared = [has_angle(case, m, base) & has_subspaces(case, m, base, each) for m, base, each, _ in drawn]
    assert np.mean(compared) > 0.5


# --- the same checks, red ---

Patch = pytest.MonkeyPatch


def change(module: Any, name: str, wrong: Callable[..., Any]) -> Callable[[Patch], None]:
    """A mutation that replaces `module.name` by `wrong(real, …)`."""

    def apply(patch: Patch) -> None:
        real = getattr(module, name)
        patch.setattr(module, name, lambda *a, **k: wrong(real, *a, **k))

    return apply


def drop_weight(patch: Patch) -> None:
    """The last model's weight counts as 1."""
    real = Method._prepared

    def wrong(self: Method, models: Any, base: Any, each: Any, *rest: Any) -> Any:
        return real(self, models, base, [*each[:-1], dataclasses.replace(each[-1], weight=1.0)], *rest)

    patch.setattr(Method, "_prepared", wrong)


def forget(name: str, value: Any) -> Callable[[Patch], None]:
    """A parameter of the method counts as `value`."""

    def apply(patch: Patch) -> None:
        real = Method._prepared

        def wrong(self: Method, models: Any, base: Any, each: Any, params: Any, *rest: Any) -> Any:
            return real(self, models, base, each, dataclasses.replace(params, **{name: value}), *rest)

        patch.setattr(Method, "_prepared", wrong)

    return apply


def plain_sce_with_one_sign(patch: Patch) -> None:
    patch.setattr(sce, "kernel", lambda name: None)
    change(sce, "elected_sign", lambda real, deltas: torch.zeros_like(real(deltas)))(patch)


def keep_a_tie(patch: Patch) -> None:
    real = selection._settle
    patch.setattr(selection, "_settle", lambda *a: selection.Cut(real(*a).threshold, 1 << 62))
    change(selection, "_keep_first", lambda real, *a: (dataclasses.replace(real(*a)[0], last=1 << 62), real(*a)[1]))(
        patch
    )


always_plus = change(task_arithmetic, "elected_sign", lambda real, deltas: torch.zeros_like(real(deltas)))
MUTATIONS: dict[str, list[Callable[[Patch], None]]] = {
    "linear": [drop_weight],
    "passthrough": [change(Method, "run", lambda real, *a: real(*a) * 1.001)],
    "task_arithmetic": [drop_weight, change(task_arithmetic, "_finish", lambda real, m, b, _: real(m, b, 0.9))],
    "slerp": [change(slerp, "arc_weights", lambda real, c, t, *a: real(c * 0.9, t, *a)), forget("t", 0.35)],
    "nuslerp": [drop_weight, change(Method, "run", lambda real, *a: real(*a) * 1.001)],
    "multislerp": [drop_weight, change(sphere, "_scaled", lambda real, p, n, size: real(p, n, size * 0.99))],
    "karcher": [change(sphere, "_scaled", lambda real, p, n, size: real(p, n, size * 0.99))],
    "ties": [keep_a_tie, drop_weight, always_plus, change(ties, "kept", lambda real, d, n: real(d, n) + 1)],
    "breadcrumbs": [keep_a_tie, drop_weight, change(ties, "crumb_counts", lambda real, d, g, n: (0, real(d, 0, n)[1]))],
    "breadcrumbs_ties": [keep_a_tie, drop_weight, always_plus],
    "dare_linear": [drop_weight, forget("rescale", "none")],
    "dare_ties": [drop_weight, always_plus, forget("rescale", "l1")],
    "della": [drop_weight, always_plus, change(dare, "l1_ratio", lambda real, b, a: 1.0)],
    "della_linear": [drop_weight, change(dare, "l1_ratio", lambda real, b, a: 1.0)],
    "model_stock": [change(model_stock, "_ratio", lambda real, c, n: real(c, n) * 0.99)],
    "sce": [
        change(sce, "_variance", lambda real, tasks: real(tasks[:1].expand(2, -1) * torch.tensor([[1.0], [0.0]]))),
        plain_sce_with_one_sign,
    ],
    "arcee_fusion": [change(arcee_fusion, "_quartile_threshold", lambda real, *a: 1.5 * real(*a))],
    "nearswap": [forget("t", 0.25)],
    "fisher": [drop_weight, forget("floor", 0.5), change(data_based, "total", lambda real, v: real(v) * 10)],
    "regmean": [
        drop_weight,
        forget("alpha", 0.5),
        forget("ridge", 0.1),
        change(data_based, "shrunk", lambda real, gram, alpha: gram.double()),
    ],
    "safemerge": [
        change(safemerge, "cosine", lambda real, *a: real(*a) + 0.1),
        forget("safe_weight", 0.25),
        forget("threshold", 0.9),
    ],
    "ram": [forget("epsilon", 0.1)],
    "tsv_m": [
        drop_weight,
        forget("rank_fraction", 1.0),
        change(tsv, "whiten", lambda real, u, s, vh: u @ s.diag() @ vh),
        change(matrices, "_inverse_root", lambda real, gram: real(gram) @ real(gram)),
    ],
    "iso_c": [drop_weight, change(iso, "svd", lambda real, *a: real(*a, count=1))],
    "iso_cts": [
        drop_weight,
        forget("common_space_fraction", 1.0),
        change(iso, "whiten", lambda real, u, s, vh: u @ s.diag() @ vh),
    ],
    "wudi": [drop_weight, forget("time", 9.0), forget("rank_fraction", 0.75)],
    "lines": [drop_weight, forget("beta", 0.25)],
    "consensus": [
        forget("at_least", 1),
        forget("lambda_", 0.5),
        change(consensus, "relevant", lambda real, own, total, s: real(own, total * 2, s)),
    ],
    "ramplus_tl": [forget("alpha", 0.0), forget("r", 0.2)],
}


def test_every_method_has_a_mutation() -> None:
    assert set(MUTATIONS) == {method.name for method in all_methods()}


@pytest.mark.parametrize(("method", "number"), [(m, i) for m, all_ in MUTATIONS.items() for i in range(len(all_))])
def test_the_formula_check_goes_red(method: str, number: int, monkeypatch: Patch) -> None:
    MUTATIONS[method][number](monkeypatch)
    checked = [agrees(case, (6, 30), seed) for case in CASES if case.method == method for seed in range(20)]
    assert not all(checked)


def test_sce_check_goes_red_when_a_tie_is_kept(monkeypatch: Patch) -> None:
    case = next(case for case in CASES if case.params == {"select_topk": 0.3})
    assert all(agrees(case, (6, 30), seed) for seed in range(20))
    keep_a_tie(monkeypatch)
    assert not all(agrees(case, (6, 30), seed) for seed in range(20))


# --- trimming over the whole model ---


def global_agrees(seed: int, density: float) -> bool:
    rng = np.random.default_rng(seed)
    shapes = {"a": (7, 9), "b": (30,), "c": (1,), "d": (4, 5)}
    base = {n: rng.integers(-8, 9, s) / 8 for n, s in shapes.items()}
    models = [{n: base[n] + rng.integers(-8, 9, s) / 8 for n, s in shapes.items()} for _ in range(2)]
    each = [{"weight": 0.5, "density": density}, {"weight": 0.25, "density": density}]
    flat = [np.concatenate([d[n].ravel() for n in shapes]) for d in (base, *models)]
    want = reference.ties(flat[1:], flat[0], each, {}, ())
    tensors = [{n: torch.from_numpy(a).float() for n, a in d.items()} for d in (base, *models)]
    got = merge_state_dicts("ties", tensors[1:], tensors[0], each, trim="global")
    return np.allclose(np.concatenate([got[n].double().numpy().ravel() for n in shapes]), want, rtol=0, atol=5e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 1 / 3, 0.9, 1.0]))
def test_global_trimming_equals_its_formula(seed: int, density: float) -> None:
    assert global_agrees(seed, density)


def test_global_trimming_check_goes_red_when_a_tie_is_kept(monkeypatch: Patch) -> None:
    keep_a_tie(monkeypatch)
    assert not all(global_agrees(seed, 1 / 3) for seed in range(20))
