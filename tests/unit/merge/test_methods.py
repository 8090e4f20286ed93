"""Methods equal their formulas, and neither chunking nor threads change a bit."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_fusion.errors import InputError
from model_fusion.merge.methods import Key, all_methods, get, merge_state_dicts, selection
from model_fusion.merge.methods.selection import Cut, cuts
from model_fusion.merge.methods.ties import TiesParams, Trimmed

from . import reference


def tensors(n, rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    # coarse values: many equal magnitudes
    return [(torch.randn(rows, columns, generator=g) * 8).round() / 8 for _ in range(n)]


def arguments(method):
    values = {"density": 0.5} if hasattr(method.model_params(), "density") else {}
    params = method.params(**({"t": 0.1} if method.name == "nearswap" else {}))
    return values, params


@pytest.mark.parametrize("method", all_methods(), ids=lambda m: m.name)
def test_chunks_and_threads_change_no_bit(method):
    base, *models = tensors(1 + min(method.max_models or 3, 3), 37, 53, 1)
    if method.name == "slerp":
        models = models[:1]
    base = None if method.needs_base == "forbidden" else base
    values, params = arguments(method)
    each = [method.model_params(**values)] * len(models)
    whole = method.run(models, base, each, params, Key(3, "w"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(whole, method.run(models, base, each, params, Key(3, "w"), chunk_size=101))
    finally:
        torch.set_num_threads(before)


def exact_k(k, n, seed):
    values = tensors(1, 1, n, seed)[0].view(-1)
    half = n // 2
    blocks = [values[:half], values[half:]]
    cut = cuts(lambda i, step: blocks[i][::step].clone(), [half, n - half], [k])[0]
    want = reference.keep_largest(values.double().numpy(), k)
    return np.array_equal(cut.drop_small_(values.clone(), 0).double().numpy(), want)


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(2, 300), st.integers(0, 99))
def test_selection_equals_a_stable_sort(data, n, seed):
    assert exact_k(data.draw(st.integers(0, n)), n, seed)


def test_selection_check_goes_red_when_ties_are_kept(monkeypatch):
    real = selection._settle
    monkeypatch.setattr(selection, "_settle", lambda *a: Cut(real(*a).threshold, 1 << 62))
    assert not all(exact_k(k, 200, 0) for k in range(20, 100))


def ties_close(density, before, seed):
    base, *models = tensors(3, 5, 11, seed)
    got = get("ties").run(
        models, base, [Trimmed(0.7, density), Trimmed(0.4, density)], TiesParams(sign_before_weight=before)
    )
    want = reference.ties([m.double().numpy() for m in models], base.double().numpy(), [0.7, 0.4], density, before)
    # where the weighted signs cancel, rounding decides the election
    return np.isclose(got.double().numpy(), want, rtol=0, atol=3e-6 * np.abs(want).max()).mean() > 0.95


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.booleans(), st.integers(0, 999))
def test_ties_equals_its_formula(density, before, seed):
    assert ties_close(density, before, seed)


def test_ties_check_goes_red_when_a_weight_is_dropped(monkeypatch):
    run = type(get("ties")).run
    monkeypatch.setattr(
        type(get("ties")),
        "run",
        lambda self, m, b, p, q: run(self, m, b, [dataclasses.replace(x, weight=1.0) for x in p], q),
    )
    assert not ties_close(0.5, False, 0)


def test_bad_input_is_refused():
    a = torch.ones(3)
    with pytest.raises(InputError, match="sum to 0"):
        merge_state_dicts("linear", [{"w": a}, {"w": a}], model_params=[{"weight": 0.5}, {"weight": -0.5}])
    with pytest.raises(InputError, match=r"density must lie in \[0, 1\]"):
        Trimmed(density=50)
    with pytest.raises(InputError, match="did you mean 'density'"):
        merge_state_dicts("ties", [{"w": a}], {"w": a}, model_params=[{"densty": 0.5}])
    with pytest.raises(InputError, match="did you mean 'ties'"):
        get("tie")


def test_global_trim_keeps_a_share_of_the_model():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    model = {"a": torch.tensor([4.0, 3, 2, 1]), "b": torch.full((4,), 0.5)}
    out = merge_state_dicts("ties", [model], base, [{"density": 0.5}], trim="global")
    assert torch.equal(out["a"], model["a"])
    assert not out["b"].any()
