"""Subspace methods: what counts as a matrix, LoRA-rank and unequal task vectors, depth, degenerate inputs."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import model_fusion as mf
from merge_fixtures import LAYERS, tensors, write
from model_fusion.checkpoint.reader import open_checkpoint
from model_fusion.checkpoint.sources import resolve
from model_fusion.cli.main import main
from model_fusion.errors import InputError
from model_fusion.merge import engine, plan
from model_fusion.merge.layout import Layout
from model_fusion.merge.methods import Key, build, get
from model_fusion.merge.methods.subspace import rank
from model_fusion.merge.methods.subspace.matrices import svd

MATRIX = ("tsv_m", "iso_c", "iso_cts", "wudi")
Patch = pytest.MonkeyPatch


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def merged(method: str, models: list[Tensor], base: Tensor, key: Key | None = None, **params: Any) -> Tensor:
    own = get(method)
    return own.run(models, base, None, build(own.params, params, method), key)


def mean(models: list[Tensor], base: Tensor) -> Tensor:
    return base + sum(m - base for m in models) / len(models)


# --- matrices and what is none ---


@pytest.mark.parametrize("method", MATRIX)
def test_vectors_and_token_tables_take_the_mean(method: str) -> None:
    tables = [noise(30, 12, seed=i) for i in range(3)]
    as_tokens = merged(method, tables[1:], tables[0], Key(rows="tokens"))
    assert torch.allclose(as_tokens, mean(tables[1:], tables[0]), atol=1e-6)
    as_matrix = merged(method, tables[1:], tables[0], Key(rows="tokens"), embeddings=True)
    assert torch.equal(as_matrix, merged(method, tables[1:], tables[0]))
    assert not torch.allclose(as_matrix, as_tokens, atol=1e-2)
    vectors = [t.reshape(-1) for t in tables]
    assert torch.allclose(merged(method, vectors[1:], vectors[0]), mean(vectors[1:], vectors[0]), atol=1e-6)
    summed = merged(method, vectors[1:], vectors[0], rest="sum", lambda_=0.5)
    assert torch.allclose(summed, mean(vectors[1:], vectors[0]), atol=1e-5)


@pytest.mark.parametrize("method", MATRIX)
def test_a_transposed_matrix_is_merged_as_its_transpose(method: str) -> None:
    weights = [noise(20, 14, seed=i) for i in range(3)]
    plain = merged(method, weights[1:], weights[0])
    turned = merged(method, [w.T.contiguous() for w in weights[1:]], weights[0].T.contiguous(), Key(rows="inputs"))
    assert torch.allclose(turned.T, plain, atol=1e-5)
    if method in ("iso_cts", "wudi"):  # they treat outputs and inputs differently
        wrong = merged(method, [w.T.contiguous() for w in weights[1:]], weights[0].T.contiguous())
        assert not torch.allclose(wrong.T, plain, atol=1e-2)


@pytest.mark.parametrize("method", MATRIX)
def test_nothing_learnt_and_learnt_twice(method: str) -> None:
    base, model = noise(24, 16, seed=0), noise(24, 16, seed=1)
    assert torch.equal(merged(method, [base, base], base), base)
    once = merged(method, [model, base], base)
    assert bool(torch.isfinite(once).all())
    twice = merged(method, [model, model], base)
    assert bool(torch.isfinite(twice).all())
    assert torch.equal(twice, merged(method, [model, model], base))


def test_opposite_task_vectors_leave_the_base() -> None:
    base, task = noise(24, 16, seed=0), noise(24, 16, seed=1)
    models = [(base.double() + task).float(), (base.double() - task).float()]
    got = merged("iso_c", models, base)
    assert float((got - base).abs().max()) < 1e-5


@pytest.mark.parametrize("method", MATRIX)
def test_nan_is_told(method: str) -> None:
    base = noise(24, 16, seed=0)
    broken = base + 1
    broken[3, 4] = float("nan")
    with pytest.raises(InputError, match="'w' holds NaN or Inf"):
        merged(method, [broken, base], base, Key(name="w"), **({"force": True} if "iso" in method else {}))


def decaying(rows: int, columns: int) -> Tensor:
    return noise(rows, columns, seed=5).double() * torch.arange(1, columns + 1).double().pow(-1.5)


def test_the_svd_is_the_svd() -> None:
    matrix = decaying(60, 90)
    for one in (matrix, matrix.T):
        u, s, vh = torch.linalg.svd(one, full_matrices=False)
        found = svd(one, 20)
        assert torch.allclose(found.s, s[:20], rtol=1e-10)
        assert torch.allclose((found.u * found.s) @ found.vh, (u[:, :20] * s[:20]) @ vh[:20], atol=1e-10)
        near = svd(one, 20, "randomized")
        assert torch.allclose((near.u * near.s) @ near.vh, (u[:, :20] * s[:20]) @ vh[:20], atol=1e-2)
        assert not torch.equal(near.s, found.s)


def test_directions_of_size_zero_are_left_out() -> None:
    matrix = noise(30, 4, seed=1).double() @ noise(4, 40, seed=2).double()
    assert svd(matrix).s.shape == (4,)


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("tsv_m", {"svd": "fast"}, "svd must be exact or randomized"),
        ("tsv_m", {"rank_fraction": 0.0}, "rank_fraction must lie in"),
        ("iso_c", {"rest": "median"}, "rest must be mean or sum"),
        ("iso_cts", {"common_space_fraction": 1.5}, "common_space_fraction must lie in"),
        ("wudi", {"time": -1.0}, "time must not be negative"),
    ],
)
def test_wrong_parameters_are_told(method: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(get(method).params, params, method)


# --- task vectors of a LoRA's rank ---


def with_lora(stored: torch.dtype, held: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Two LoRAs of rank 4 folded into one base, rounded to one dtype and held in another."""
    base = (0.02 * noise(96, 64, seed=0)).to(stored)
    models = [(base + 0.01 * noise(96, 4, seed=i) @ noise(4, 64, seed=i + 9)).to(stored).to(held) for i in range(1, 3)]
    return models, base.to(held)


DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def refusal(method: str, stored: torch.dtype, held: torch.dtype) -> str:
    models, base = with_lora(stored, held)
    try:
        merged(method, models, base, Key(name="layer"))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
@pytest.mark.parametrize(("stored", "held"), DTYPES)
def test_lora_rank_is_refused(method: str, stored: torch.dtype, held: torch.dtype) -> None:
    text = refusal(method, stored, held)
    assert "'layer' model 1 differs from the base by rank 4 of 64" in text
    assert "force: true" in text


def test_the_refusal_check_goes_red(monkeypatch: Patch) -> None:
    monkeypatch.setattr(rank, "_narrow", lambda tensor: tensor.float())  # rounding to bf16 looks like full rank
    assert refusal("iso_c", torch.bfloat16, torch.float32) == ""


def test_force_full_rank_and_other_methods_are_not_refused() -> None:
    models, base = with_lora(torch.bfloat16, torch.bfloat16)
    for method in ("tsv_m", "wudi"):
        assert bool(torch.isfinite(merged(method, models, base)).all())
    for method in ("iso_c", "iso_cts"):
        assert bool(torch.isfinite(merged(method, models, base, force=True)).all())
        merged(method, [base + 0.001 * noise(96, 64, seed=i) for i in (1, 2)], base)
        merged(method, models, base, Key(rows="tokens"))


# --- unequal lengths ---


def states(factor: float) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    base = {"a": noise(24, 16, seed=0), "b": noise(24, 16, seed=1)}
    models = [{n: t + s * noise(24, 16, seed=i + 9) for i, (n, t) in enumerate(base.items())} for s in (0.01, factor)]
    return models, base


def warned_of(method: str, factor: float, each: list[dict[str, float]] | None = None) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        mf.merge_state_dicts(method, *states(factor), each)
    return [str(one.message) for one in found]


def test_unequal_task_vectors_warn_once() -> None:
    for method in MATRIX:
        assert warned_of(method, 0.5) == [
            f"{method}: state dict 1's task vector is 50 × as long as state dict 0's: weigh them, or check the base"
        ]
    assert warned_of("tsv_m", 0.05) == []
    assert warned_of("tsv_m", 0.5, [{"weight": 50}, {"weight": 1}]) == []
    assert warned_of("task_arithmetic", 0.5) == []


def three(folder: Path, far: float) -> dict[str, Any]:
    base = tensors(0, torch.float32)
    write(folder / "base", 0, state=base)
    for number, (name, size) in enumerate((("near", 0.01), ("far", far))):
        made = {n: t + size * noise(*t.shape, seed=100 * number + i) for i, (n, t) in enumerate(base.items())}
        write(folder / name, 0, state=made)
    models = [{"model": str(folder / name)} for name in ("near", "far")]
    return {"base_model": str(folder / "base"), "models": models}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_merge_of_unequal_models_warns_once(tmp_path: Path, threads: int) -> None:
    text = three(tmp_path, 0.5) | {"merge_method": "tsv_m"}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(text))
    with pytest.warns(UserWarning, match=r"far's task vector is 49 × as long as .*near's") as found:
        engine.merge(tmp_path / "recipe.yml", tmp_path / "out", threads=threads)
    assert len(found) == 1


def test_the_command_prints_the_warning(tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(three(tmp_path, 0.5) | {"merge_method": "iso_c"}))
    words = ["merge", str(tmp_path / "recipe.yml"), "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["model-fusion", *words])
    main()
    said = capsys.readouterr()
    assert said.err.startswith("warning: iso_c: ")
    assert said.err.count("warning") == 1
    assert said.out.startswith("wrote ")


# --- through a recipe ---


def written(folder: Path, method: str, **params: Any) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What a recipe makes, and the states of base, near and far."""
    text = three(folder, 0.02) | {"merge_method": method, "parameters": params}
    (folder / "recipe.yml").write_text(yaml.safe_dump(text))
    engine.merge(folder / "recipe.yml", folder / "out")
    opened = [open_checkpoint(resolve(str(folder / name))) for name in ("out", "base", "near", "far")]
    return {n: opened[0].read(n).clone() for n in opened[0].names}, [
        {n: c.read(n).clone() for n in c.names} for c in opened[1:]
    ]


@pytest.mark.parametrize("method", [*MATRIX, "lines"])
def test_a_recipe_does_what_state_dicts_do(method: str, tmp_path: Path) -> None:
    got, (base, *models) = written(tmp_path, method)
    want = mf.merge_state_dicts(method, models, base)
    assert all(torch.equal(got[name], want[name]) for name in want)
    table = "model.embed_tokens.weight"
    if method != "lines":
        assert torch.allclose(got[table], mean([m[table] for m in models], base[table]), atol=1e-6)


def test_lines_grows_with_depth(tmp_path: Path) -> None:
    got, (base, *models) = written(tmp_path, "lines", alpha=0.25, beta=0.5)
    places = {"model.embed_tokens.weight": 0.0, "model.norm.weight": 1.0, "lm_head.weight": 1.0}
    places |= {f"model.layers.{i}.mlp.up_proj.weight": i / (LAYERS - 1) for i in range(LAYERS)}
    for name, place in places.items():
        want = base[name] + (0.25 + 0.5 * place) * sum(m[name] - base[name] for m in models)
        assert torch.allclose(got[name], want, atol=1e-6)


def slices_equal_the_whole(tmp_path: Path) -> bool:
    """Whether `lines` on layers given as two slices is `lines` on the model."""
    text = three(tmp_path, 0.02) | {"merge_method": "lines"}
    (tmp_path / "whole.yml").write_text(yaml.safe_dump(text))
    models = text.pop("models")
    ranges = [[0, 1], [1, LAYERS]]
    text["slices"] = [{"sources": [entry | {"layer_range": part} for entry in models]} for part in ranges]
    (tmp_path / "slices.yml").write_text(yaml.safe_dump(text))
    made = [engine.merge(tmp_path / f"{name}.yml", tmp_path / name) for name in ("whole", "slices")]
    whole, slices = (open_checkpoint(resolve(str(folder))) for folder in made)
    return all(torch.equal(whole.read(name), slices.read(name)) for name in whole.names)


def test_depth_is_that_of_the_output(tmp_path: Path) -> None:
    assert slices_equal_the_whole(tmp_path)


def test_the_depth_check_goes_red(tmp_path: Path, monkeypatch: Patch) -> None:
    real = Layout._slice

    def without_depth(self: Layout, *given: Any) -> None:
        real(self, *given)
        monkeypatch.setattr(plan, "depth_of", lambda name, lengths: 0.0)

    monkeypatch.setattr(Layout, "_slice", without_depth)
    assert not slices_equal_the_whole(tmp_path)


def test_lines_needs_a_depth() -> None:
    models, base = states(0.01)
    with pytest.raises(InputError, match="lines needs to know how deep 'a' lies: give depth="):
        mf.merge_state_dicts("lines", models, base)
    got = mf.merge_state_dicts("lines", models, base, depth={"a": 0.0, "b": 1.0}, alpha=0.0, beta=1.0)
    assert torch.equal(got["a"], base["a"])
    assert not torch.equal(got["b"], base["b"])
