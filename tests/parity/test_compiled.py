"""The compiled loops write the bytes that numpy and torch write; sce's selection and energies are exact on both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from model_fusion.merge.methods import Key, della, get, random_masks, sce, selection
from model_fusion.merge.methods.blocks import BLOCK, sizes
from model_fusion.merge.methods.compiled import kernel
from model_fusion.merge.methods.selection import cut_and_energy, cuts

from .test_selection import KINDS, LARGE, believe_the_sample, values_of


def runs(method: str, shape: tuple[int, ...], count: int, dtype: torch.dtype, params: dict[str, Any]) -> torch.Tensor:
    """A merge of heavily tied models, as int32 patterns."""
    g = torch.Generator().manual_seed(0)
    base = (torch.randn(shape, generator=g) * 0.02).to(dtype)
    models = [(base + torch.randn(shape, generator=g) * 5e-4).to(dtype) for _ in range(count)]
    chosen = get(method)
    each = [della.Ranked(density=0.5)] * count if method == "della" else None
    return chosen.run(models, base, each, chosen.params(**params), Key(2, "w")).view(torch.int32)


def same_bytes(method: str, *case: Any) -> bool:
    """Whether a merge is the same with the kernels and without them."""
    compiled = runs(method, *case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"model_fusion.merge.methods.{method}.kernel", lambda name: None)
        return torch.equal(compiled, runs(method, *case))


BF16, WIDE = torch.bfloat16, torch.float32
CASES: list[tuple[Any, ...]] = [("della", (90, columns), 2, BF16, {}) for columns in (2, 333, 1536)]
CASES += [
    ("sce", shape, count, dtype, {"select_topk": share})
    for shape in ((1,), (200, 1536), (BLOCK + 1,))
    for count, dtype in ((2, BF16), (3, BF16), (2, WIDE))
    for share in (0.0, 0.1, 0.5, 1.0)
]


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_path_writes_the_same_bytes(case: tuple[Any, ...]) -> None:
    assert kernel("counts") is not None
    assert same_bytes(*case)


def bent(name: str, bend: Callable[..., Any]) -> Callable[[str], Any]:
    """`kernel` with one function bent."""
    return lambda wanted: bend(kernel(wanted)) if wanted == name else kernel(wanted)


def more(argument: int, by: Any) -> Callable[[Any], Any]:
    """Adds to one argument of a kernel."""
    return lambda real: lambda *a: real(*a[:argument], a[argument] + by, *a[argument + 1 :])


@pytest.mark.parametrize(
    ("method", "name", "bend"),
    [
        ("della", "above_rank", more(1, np.float32(0.5))),
        ("della", "mixed", more(1, np.uint32(1))),
        ("sce", "difference", lambda real: lambda model, base, out: real(base, model, out)),
        ("sce", "variance", lambda real: lambda tasks, out: real(tasks[:1].repeat(2, 0), out)),
        ("sce", "counts", lambda real: lambda *a: np.add(real(*a), (1, 0, 0))),
        ("sce", "energy_of", lambda real: lambda *a: real(*a) + 1),
        ("sce", "keep_selected", more(2, np.float32(1e-7))),
        ("sce", "add_agreeing", lambda real: lambda tasks, w, base, out: real(np.abs(tasks), w, base, out)),
    ],
)
def test_the_same_bytes_check_goes_red(method: str, name: str, bend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c[0] == method and c[1][-1] == 1536 and c[4].get("select_topk", 0.5) == 0.5)
    assert same_bytes(*case)
    monkeypatch.setattr(f"model_fusion.merge.methods.{method}.kernel", bent(name, bend))
    assert wrong(case)


def wrong(case: tuple[Any, ...]) -> bool:
    """Whether the check fails, or a kernel's wrong counts are found out earlier."""
    try:
        return not same_bytes(*case)
    except (AssertionError, ValueError, IndexError):
        return True


def energies_right(kind: str, share: float, compiled: bool) -> bool:
    """Whether one pass finds the cut that `cuts` finds, and the energies of what that cut keeps."""
    values = values_of(kind, LARGE, 5).abs()
    rows = torch.stack([values_of("continuous", LARGE, seed) for seed in (1, 2, 3)])

    def look(i: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = slice(i * BLOCK, (i + 1) * BLOCK, step)
        return values[part].clone(), rows[:, part].contiguous()

    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(sce, "kernel", lambda name: None)
        cut, energy = cut_and_energy(look, sizes(LARGE), share, sce._tally)
    kept = cut.drop_small_(values.clone(), 0) > 0
    want = (rows.double().square() * kept).sum(1).numpy()
    same = cut == cuts(lambda i, step: look(i, step)[0], sizes(LARGE), [share])[0]
    return same and bool(np.allclose(energy, want, rtol=1e-6, atol=0))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_finds_cut_and_energies(kind: str, share: float, compiled: bool) -> None:
    assert energies_right(kind, share, compiled)


def forget_the_bracket(patch: pytest.MonkeyPatch) -> None:
    """What lies inside the bracket adds no energy."""
    patch.setattr(selection, "halved", lambda rows: [0.0] * len(rows))


@pytest.mark.parametrize(("mutate", "kind"), [(forget_the_bracket, "tied"), (believe_the_sample, "misleading")])
def test_the_energy_check_goes_red(mutate: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert energies_right(kind, 0.3, True)
    mutate(monkeypatch)
    try:
        right = energies_right(kind, 0.3, True)
    except (ValueError, IndexError):
        right = False
    assert not right


def test_random_bits_are_the_same_compiled() -> None:
    plain, fast = (random_masks.uniform_bits(1, "w", 0, 70_000, 90_000, fill=f) for f in (None, kernel("mixed")))
    assert np.array_equal(plain, fast)
