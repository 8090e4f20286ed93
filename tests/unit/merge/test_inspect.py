"""The measures of `inspect` against naive float64 references, and each of these against a wrong implementation."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from merge_fixtures import tensors, write
from model_fusion.cli.main import main
from model_fusion.errors import InputError
from model_fusion.merge import inspect as module
from model_fusion.merge import measures
from model_fusion.merge.inspect import inspect
from model_fusion.merge.measures import Sums, empty, overlap_of, spectra, sums
from model_fusion.merge.spectrum import angle_error, leading, overlap, rounding_edge, whole


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(models: list[Tensor], base: Tensor | None) -> dict[str, Any]:
    arrays = [m.double().numpy().ravel() for m in models]
    own = np.zeros_like(arrays[0]) if base is None else base.double().numpy().ravel()
    deltas = [a - own for a in arrays]
    pairs = [(i, j) for i in range(len(models)) for j in range(i + 1, len(models))]
    both = [(deltas[i] != 0) & (deltas[j] != 0) for i, j in pairs]
    return {
        "numel": own.size,
        "base": (own**2).sum(),
        "weight": [(a**2).sum() for a in arrays],
        "square": [(d**2).sum() for d in deltas],
        "onto_base": [(a * own).sum() for a in arrays],
        "peak": [np.abs(a).max() for a in arrays],
        "dot": [(deltas[i] * deltas[j]).sum() for i, j in pairs],
        "both": [int(b.sum()) for b in both],
        "conflict": [
            int((b & (np.sign(deltas[i]) != np.sign(deltas[j]))).sum()) for b, (i, j) in zip(both, pairs, strict=True)
        ],
    }


def agree(found: Sums, expected: dict[str, Any]) -> bool:
    return all(np.allclose(getattr(found, key), value, rtol=1e-10, atol=1e-10) for key, value in expected.items())


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    shape=st.sampled_from([(1,), (7, 5), (300, 400), (70_000,)]),
    count=st.integers(1, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    based=st.booleans(),
)
def test_sums_equal_the_naive_reference(
    seed: int, shape: tuple[int, ...], count: int, dtype: torch.dtype, based: bool
) -> None:
    base = random(seed, *shape, dtype=dtype)
    # half of the elements unchanged, as bf16 fine-tunes have them
    changed = [random(seed + i + 1, *shape, dtype=dtype) for i in range(count)]
    models = [torch.where(random(seed + 9 + i, *shape) > 0, base, new) for i, new in enumerate(changed)]
    assert agree(sums(models, base if based else None), naive(models, base if based else None))


WRONG: dict[str, Callable[[Sums], None]] = {
    "a norm": lambda s: s.square.__setitem__(1, s.square[1] * 1.0001),
    "a cosine": lambda s: s.dot.__setitem__(0, -s.dot[0]),
    "one conflict": lambda s: s.conflict.__setitem__(0, s.conflict[0] + 1),
    "zeros counted": lambda s: s.both.__setitem__(0, s.numel),
    "the peak": lambda s: s.peak.__setitem__(0, s.peak[0] * 0.999),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_sum_turns_the_reference_test_red(case: str) -> None:
    base = random(0, 40, 50)
    models = [torch.where(random(9, 40, 50) > 0, base, random(1, 40, 50)), random(2, 40, 50)]
    found = sums(models, base)
    assert agree(found, naive(models, base))
    WRONG[case](found)
    assert not agree(found, naive(models, base))


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    base, models = random(0, 60, 50), [random(i, 60, 50) for i in (1, 2, 3)]
    total = empty(3)
    for part in (slice(0, 20), slice(20, 60)):
        total.add(sums([m[part] for m in models], base[part]))
    assert agree(total, naive(models, base))


def test_nan_and_inf_are_counted_and_spoil_no_sum() -> None:
    base, model = random(0, 8, 8), random(1, 8, 8)
    model[0, 0], base[1, 1], base[2, 2] = float("nan"), float("inf"), float("nan")
    found = sums([model, random(2, 8, 8)], base)
    assert found.bad == [1, 0, 2]
    assert found.square == [0.0, 0.0]


def low_rank(seed: int, shape: tuple[int, int], rank: int) -> Tensor:
    return random(seed, shape[0], rank) @ random(seed + 50, rank, shape[1])


def decaying(seed: int, shape: tuple[int, int]) -> Tensor:
    u, _, vh = torch.linalg.svd(random(seed, *shape), full_matrices=False)
    return u * (0.7 ** torch.arange(u.shape[1])) @ vh


@pytest.mark.parametrize("shape", [(200, 90), (90, 200), (64, 64), (600, 400)])
def test_leading_values_are_the_true_ones_from_below(shape: tuple[int, int]) -> None:
    matrix = decaying(1, shape)
    true = torch.linalg.svdvals(matrix.double())[:8]
    found = leading(whole(matrix), 8)
    assert torch.allclose(found.s.double(), true, rtol=1e-3)
    assert bool((found.s.double() <= true * (1 + 1e-5)).all())
    rebuilt = found.u * found.s @ found.vh
    best = float((matrix.double().square().sum() - true.square().sum()).sqrt())
    assert float((matrix - rebuilt).norm()) <= 1.01 * best
    # without power iterations the projection is worse: the tolerance above is a real one
    poor = leading(whole(random(3, *shape)), 8, power=0)
    assert not torch.allclose(poor.s.double(), torch.linalg.svdvals(random(3, *shape).double())[:8], rtol=1e-3)


@pytest.mark.parametrize("make", [decaying, random, lambda seed, shape: low_rank(seed, shape, 5)])
def test_the_bound_on_angles_holds(make: Any) -> None:
    shape = (120, 80)
    for seed in range(5):
        matrix = make(seed, shape) if make is not random else random(seed, *shape)
        found = leading(whole(matrix), 20, seed, power=1)
        true = torch.linalg.svd(matrix.double(), full_matrices=False)[0][:, :4]
        cosines = torch.linalg.svdvals(found.u[:, :4].double().T @ true)
        sine = float((1 - cosines.min().clamp(max=1) ** 2).sqrt())
        assert sine <= angle_error(whole(matrix), found, 4) + 1e-3


def test_overlap_is_the_mean_squared_cosine_of_principal_angles() -> None:
    one, two = (torch.linalg.qr(random(seed, 50, 6))[0] for seed in (1, 2))
    projectors = [np.asarray(basis.double() @ basis.double().T) for basis in (one, two)]
    assert overlap(one, two) == pytest.approx(np.trace(projectors[0] @ projectors[1]) / 6, rel=1e-6)
    turned = one @ torch.linalg.qr(random(3, 6, 6))[0]
    assert overlap(one, turned) == pytest.approx(1.0, abs=1e-5)
    assert overlap(one, two) < 0.5


def look_at(base: Tensor, *deltas: Tensor) -> list[Any]:
    models = [(base.float() + delta).to(base.dtype) for delta in deltas]
    totals = sums(models, base)
    return spectra(models, base, [(w, totals.base, s) for w, s in zip(totals.weight, totals.square, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_rank_of_a_merged_lora_is_seen_through_the_rounding(dtype: torch.dtype, rank: int) -> None:
    base = random(0, 300, 200, dtype=dtype)
    delta = low_rank(1, (300, 200), rank) * 0.02
    found = look_at(base, delta)[0]
    assert found is not None
    assert found[0].rank == rank
    assert found[0].share == pytest.approx(1.0, abs=0.1)


def test_a_full_rank_delta_is_called_full() -> None:
    found = look_at(random(0, 300, 200), random(1, 300, 200) * 0.02)[0]
    assert found is not None
    assert found[0].rank is None
    small = look_at(random(0, 30, 20), random(1, 30, 20) * 0.02)[0]
    assert small is not None
    assert small[0].rank is None
    assert look_at(random(0, 30, 20), torch.zeros(30, 20)) == [None]


def test_noise_of_rounding_alone_has_no_rank() -> None:
    base = random(0, 400, 300).bfloat16()
    rounded = (base.float() * (1 + 1e-3 * random(1, 400, 300))).bfloat16().float() - base.float()
    values = torch.linalg.svdvals(random(2, 400, 300).bfloat16().float() - random(2, 400, 300))
    edge = rounding_edge((400, 300), [(1.0, torch.bfloat16)])
    assert float(values[0]) == pytest.approx(edge, rel=0.1)  # the formula is the noise's true edge
    assert float(torch.linalg.svdvals(rounded)[0]) < 3 * edge


def test_overlap_of_shared_and_of_random_directions() -> None:
    base, shared = random(0, 300, 200), low_rank(1, (300, 200), 8) * 0.02
    same = look_at(base, shared, shared * 2)
    apart = look_at(base, shared, low_rank(7, (300, 200), 8) * 0.02)
    one, two = overlap_of(*same), overlap_of(*apart)
    assert one.outputs == pytest.approx(1.0, abs=1e-3)
    assert one.inputs == pytest.approx(1.0, abs=1e-3)
    assert two.outputs < 3 * two.chance[0]
    assert one.error < 1e-2
    assert two.chance == (8 / 300, 8 / 200)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base; a and b near it; far is another model; same equals the base."""
    base = tensors(0)
    write(tmp_path / "base", 0)
    for seed, name in ((1, "a"), (2, "b")):
        noise = tensors(seed)
        state = {k: (v.float() + 0.1 * noise[k].float()).bfloat16() for k, v in base.items()}
        write(tmp_path / name, 0, state=state)
    write(tmp_path / "far", 7)
    write(tmp_path / "same", 0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expect_groups(found: module.Inspection) -> None:
    base, a, b = (state(name) for name in ("base", "a", "b"))
    layers = [name for name in base if ".layers.2." in name]
    for names, row in ((list(base), found.groups["total"]["all"]), (layers, found.groups["by layer"]["2"])):
        own = np.concatenate([base[n].ravel() for n in names])
        one, two = (np.concatenate([m[n].ravel() for n in names]) - own for m in (a, b))
        assert row["models"]["a"]["delta to base"] == pytest.approx(np.linalg.norm(one) / np.linalg.norm(own))
        cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
        assert row["pairs"][0]["cosine"] == pytest.approx(cosine)
        both = (one != 0) & (two != 0)
        assert row["pairs"][0]["sign conflict"] == pytest.approx(((one * two < 0) & both).sum() / both.sum())


def state(name: str) -> dict[str, Any]:
    checkpoint = module.open_model(module.resolve(name))
    return {tensor: checkpoint.read(tensor).double().numpy() for tensor in checkpoint.names}


def test_groups_are_sums_over_their_tensors(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = inspect(["a", "b"], "base")
    expect_groups(found)
    assert set(found.groups["by role"]) == {"attention", "mlp", "norm", "embedding", "head"}
    assert found.problems == []
    json.dumps(found.as_dict(), allow_nan=False)
    real = measures.sums

    def dropped(models: list[Tensor], base: Tensor | None) -> Sums:
        made = real(models, base)
        return made if models[0].ndim == 2 else empty(len(models))

    monkeypatch.setattr(module, "sums", dropped)
    with pytest.raises(AssertionError):
        expect_groups(inspect(["a", "b"], "base"))


def test_threads_change_no_number(room: Path) -> None:
    assert inspect(["a", "b"], "base", threads=1) == inspect(["a", "b"], "base", threads=3)


def warned(found: module.Inspection, text: str) -> bool:
    return any(text in warning for warning in found.warnings)


def test_a_wrong_base_is_told(room: Path) -> None:
    assert warned(inspect(["a", "far"], "base"), "far is 1.3")
    assert not warned(inspect(["a", "b"], "base"), "is that its base")
    assert warned(inspect(["a", "same"], "base"), "same equals the base")


def test_unequal_task_vectors_are_told(room: Path) -> None:
    change = {k: (v.float() * 1.005).float() for k, v in tensors(0).items()}
    write(room / "slight", 0, state=change)
    found = inspect(["a", "slight"], "base")
    assert warned(found, "a's task vector is 20 × as long as slight's")
    assert warned(found, "dtypes differ")


def test_nan_and_outliers_name_file_and_tensor(room: Path) -> None:
    broken = tensors(1)
    broken["model.norm.weight"][3] = float("nan")
    broken["lm_head.weight"][0, 0] = 1e4
    write(room / "broken", 1, state=broken)
    found = inspect(["a", "broken"], "base")
    assert warned(found, f"NaN or Inf in {room / 'broken' / 'model.safetensors'}: model.norm.weight")
    assert found.groups["total"]["all"]["not finite"] == 1
    head = torch.full((400, 300), 1e-3)
    head[0, 0] = 5.0
    peak = {**tensors(1), "lm_head.weight": head}
    write(room / "p", 1, state=peak)
    write(room / "q", 1, state={**peak, "lm_head.weight": torch.ones(400, 300)})
    assert warned(inspect(["p", "q"]), "p: lm_head.weight has an element of")


def test_one_tensor_that_changed_most_is_told(room: Path) -> None:
    odd = {k: v.clone() for k, v in state_of(room / "a").items()}
    odd["model.layers.1.self_attn.q_proj.weight"] *= 30
    write(room / "odd", 0, state=odd)
    assert warned(inspect(["odd"], "base"), "odd: model.layers.1.self_attn.q_proj.weight changed")


def state_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_licences_and_vocabularies_are_compared(room: Path) -> None:
    for name, licence in (("a", "mit"), ("b", "apache-2.0"), ("base", "mit")):
        (room / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    vocabulary = {f"t{i}": 15 - i for i in range(16)}
    (room / "b" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    found = inspect(["a", "b"], "base")
    assert warned(found, "licences differ: apache-2.0, mit")
    assert warned(found, "b's vocabulary is not the others' (permuted)")


def test_what_does_not_fit_is_listed_and_the_rest_measured(room: Path) -> None:
    other = {k: v for k, v in tensors(3).items() if "layers.3" not in k}
    other["lm_head.weight"] = other["lm_head.weight"][:12].clone()
    write(room / "c", 3, state={**other, "odd": torch.ones(2)}, model_type="mistral")
    found = inspect(["a", "c"], "base")
    text = "; ".join(found.problems)
    for word in ("c is mistral", "not in c: model.layers.3", "not in base: odd", "shapes differ: lm_head.weight"):
        assert word in text
    assert "3" not in found.groups["by layer"]


def test_without_a_base_weights_are_compared(room: Path) -> None:
    found = inspect(["a", "b"])
    a, b = (np.concatenate([v.ravel() for v in state(n).values()]) for n in "ab")
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert found.groups["total"]["all"]["pairs"][0]["cosine"] == pytest.approx(cosine)
    assert found.groups["total"]["all"]["models"]["a"]["delta to base"] is None


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["model-fusion", "inspect", *words])
    main()


def test_the_command_prints_tables_and_writes_json(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "a", "b", "far", "same", "--base", "base", "--json", "found.json")
    said = capsys.readouterr().out
    assert "far is 1.3" in " ".join(said.split())
    assert "cos mean of pairs" in said
    assert set(json.loads(Path("found.json").read_text())["tensors"]) == set(tensors(0))
    call(monkeypatch, "a", "b")
    assert "of the weights themselves" in capsys.readouterr().out


FAULTS: dict[str, tuple[list[str], str]] = {
    "no such model": (["a", "./nope", "--base", "base"], "no such folder"),
    "one alone": (["a"], "nothing to be compared with"),
    "twice": (["a", "a"], "named twice"),
    "its own base": (["a", "b", "--base", "a"], "named twice"),
    "JSON nowhere": (["a", "b", "--json", "x/y.json"], "no such folder; name a file"),
    "JSON is a folder": (["a", "b", "--json", "a"], "is a folder"),
    "nothing common": (["a", "alien"], "no tensor is common to all"),
    "truncated": (["a", "cut"], "truncated"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_line(
    case: str, room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = FAULTS[case]
    write(room / "alien", 1, state={"x": torch.ones(3)})
    write(room / "cut", 1)
    (room / "cut/model.safetensors").write_bytes((room / "cut/model.safetensors").read_bytes()[:-8])
    before = sorted(room.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, *words)
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(room.rglob("*")) == before


def test_no_models_named() -> None:
    with pytest.raises(InputError, match="nothing to be compared"):
        inspect([])
