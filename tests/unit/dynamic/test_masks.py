"""EMR and TALL against their formulas written once more, element by element in float64."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_fusion.dynamic import masks as module
from model_fusion.dynamic.mask_file import load_masks, save_masks
from model_fusion.dynamic.masks import Masks, emr, tall
from model_fusion.errors import InputError, IntegrityError

State = dict[str, Tensor]
SHAPES = {"weight": (5, 7), "bias": (5,), "kernel": (3, 2, 2), "scale": ()}
STRENGTHS = [0.3, 0.8, 1.5]


def models(dtype: torch.dtype = torch.float32) -> tuple[State, dict[str, State]]:
    """A base and three experts; task "c" changes nothing but the weight, and one tensor is of integers."""
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}
    experts = {
        task: {name: (t.float() + torch.randn(t.shape, generator=draw) * 0.1).to(dtype) for name, t in base.items()}
        for task in "abc"
    }
    experts["c"] |= {name: base[name].clone() for name in SHAPES if name != "weight"}
    count = {"count": torch.tensor([3])}
    return base | count, {task: state | count for task, state in experts.items()}


def flat(base: State, experts: dict[str, State]) -> tuple[np.ndarray, np.ndarray]:
    """θ0 [n] and τ [T, n] in float64, all float tensors in order."""

    def joined(state: State) -> np.ndarray:
        return np.concatenate([state[name].double().reshape(-1).numpy() for name in SHAPES])

    start = joined(base)
    return start, np.stack([joined(state) - start for state in experts.values()])


def naive_emr(base: State, experts: dict[str, State], task: int) -> np.ndarray:
    start, tau = flat(base, experts)
    unified = np.zeros_like(start)
    for i in range(len(start)):
        sign = np.sign(sum(t[i] for t in tau))
        unified[i] = sign * max([abs(t[i]) for t in tau if np.sign(t[i]) == sign], default=0.0)
    kept = [u if u * t > 0 else 0.0 for u, t in zip(unified, tau[task], strict=True)]
    return start + np.array(kept) * sum(abs(tau[task])) / sum(abs(k) for k in kept)


def naive_tall(base: State, experts: dict[str, State], task: int) -> np.ndarray:
    start, tau = flat(base, experts)
    kept = [sum(t) if abs(t[task]) > STRENGTHS[task] * abs(sum(t) - t[task]) else 0.0 for t in tau.T]
    return start + np.array(kept)


def off(base: State, experts: dict[str, State]) -> float:
    """The largest difference between all of ours and the formulas."""
    masks = {"emr": emr(base, experts), "tall": tall(base, experts, STRENGTHS)}
    pairs = [
        (made.reconstruct(base, task), naive(base, experts, i))
        for (made, naive) in ((masks["emr"], naive_emr), (masks["tall"], naive_tall))
        for i, task in enumerate(experts)
    ]
    return max(float(abs(flat(state, {"x": state})[0] - wanted).max()) for state, wanted in pairs)


def test_equal_to_the_formulas() -> None:
    assert off(*models()) < 1e-5


def relevant_with_the_wrong_rest(tau: Sequence[Tensor], total: Tensor, strengths: Sequence[float]) -> list[Tensor]:
    return [own.abs() > s * total.abs() for own, s in zip(tau, strengths, strict=True)]


MUTATIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "TALL compares with the sum, not the rest": ("relevant", relevant_with_the_wrong_rest),
    "bits in the other order": (
        "packed",
        lambda m: torch.from_numpy(np.packbits(m.reshape(len(m), -1).numpy(), 1, "little")),
    ),
    "rescaler from squares": ("_total", lambda t: t.square().reshape(len(t), -1).sum(1, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, *MUTATIONS[name])
    assert off(*models()) > 1e-3


def test_one_expert_comes_back_exactly_and_bits_take_an_eighth_of_a_byte() -> None:
    base, experts = models()
    for made in (emr(base, {"a": experts["a"]}), tall(base, {"a": experts["a"]})):
        back = made.reconstruct(base, "a")
        for name in SHAPES:
            torch.testing.assert_close(back[name], experts["a"][name], atol=1e-6, rtol=0)
    size = emr(base, experts).nbytes
    elements = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    assert size["masks"] == sum(3 * -(-n // 8) for n in elements.values())
    assert size["unified"] == 4 * sum(elements.values())


def test_an_expert_that_equals_the_base_comes_back_as_the_base() -> None:
    base, experts = models()
    made = emr(base, {**experts, "same": base})
    for name, value in made.reconstruct(base, "same").items():
        assert torch.equal(value, base[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    base, experts = models(dtype)
    made = emr(base, experts)
    size = save_masks(made, base, tmp_path / "new" / "masks.safetensors")
    assert size == (tmp_path / "new" / "masks.safetensors").stat().st_size >= sum(made.nbytes.values())
    loaded = load_masks(tmp_path / "new" / "masks.safetensors", base)
    for task in experts:
        before, after = made.reconstruct(base, task), loaded.reconstruct(base, task)
        assert before.keys() == after.keys() == base.keys()
        assert all(torch.equal(before[name], after[name]) and before[name].dtype == base[name].dtype for name in base)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["masks.safetensors"]


def test_tied_tensors_are_kept_once() -> None:
    base, experts = models()
    tied = [{**state, "head": state["weight"]} for state in (base, *experts.values())]
    made = emr(tied[0], dict(zip(experts, tied[1:], strict=True)))
    assert made.nbytes == emr(base, experts).nbytes
    back = made.reconstruct(tied[0], "b")
    assert back["head"] is back["weight"]
    assert torch.equal(made.rescale, emr(base, experts).rescale)


def test_a_changed_file_or_base_is_refused(tmp_path: Path) -> None:
    base, experts = models()
    file = tmp_path / "masks.safetensors"
    save_masks(tall(base, experts), base, file)
    with pytest.raises(IntegrityError, match="another base"):
        load_masks(file, {**base, "bias": base["bias"] + 1})
    tensors = load_file(file)
    tensors["rescale"] += 1
    with safe_open(file, framework="pt") as opened:
        note = opened.metadata()
    save_file(tensors, file, metadata=note)
    with pytest.raises(IntegrityError, match="was changed"):
        load_masks(file)
    file.write_bytes(b"no")
    with pytest.raises(IntegrityError, match="damaged"):
        load_masks(file)
    with pytest.raises(InputError, match="no such file"):
        load_masks(tmp_path / "none")


def wrong_shape(state: State) -> State:
    return {**state, "bias": torch.zeros(4)}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda b, e: emr(b, {}), "no expert"),
        (lambda b, e: tall(b, e, [0.1, 0.2]), "one for each of the 3"),
        (lambda b, e: tall(b, e, 0.0), "above 0"),
        (lambda b, e: emr(b, {"x": {}}), "differ in 5 tensors"),
        (lambda b, e: emr(b, {"x": wrong_shape(e["a"])}), "'bias' is not the base's"),
        (lambda b, e: emr(b, {"x": {**e["a"], "bias": torch.full((5,), torch.nan)}}), "NaN"),
        (lambda b, e: emr(b, e).reconstruct(b, "z"), "no task 'z'"),
        (lambda b, e: emr(b, e).reconstruct(wrong_shape(b), "a"), r"the base has \[4\]"),
        (lambda b, e: emr(b, e).reconstruct({}, "a"), "no tensor 'bias'"),
    ],
)
def test_what_does_not_fit_is_said(run: Callable[[State, dict[str, State]], Masks], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(*models())
