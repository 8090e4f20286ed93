"""A merge from recipe to folder, on tiny checkpoints, against arithmetic written out here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_fixtures import LAYERS, PlainLinear, tensors, write
from model_fusion.checkpoint.verify import verify
from model_fusion.errors import InputError, IntegrityError
from model_fusion.merge import engine
from model_fusion.recipe.merge import parse

SLICES = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "A", "layer_range": [0, 3]}]},
        {"sources": [{"model": "B", "layer_range": [1, 4]}]},
    ],
}


def run(folder: Path, recipe: dict[str, Any], name: str = "out", **options: Any) -> Path:
    text = json.dumps(recipe).replace('"A"', '"a"').replace('"B"', '"b"').replace('"C"', '"c"')
    (folder / "recipe.yml").write_text(text)
    return engine.merge(folder / "recipe.yml", folder / name, **options)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        write(tmp_path / name, seed)
    return tmp_path


def linear(weights: tuple[float, float]) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in zip("AB", weights, strict=True)],
    }


def expect_mean(out: Path, weights: tuple[float, float]) -> None:
    a, b = tensors(0), tensors(1)
    got = load_file(out / "model.safetensors")
    assert set(got) == set(a)
    for name, tensor in got.items():
        exact = (weights[0] * a[name].double() + weights[1] * b[name].double()) / sum(weights)
        assert torch.allclose(tensor.double(), exact, rtol=2**-8, atol=1e-6), name


def test_linear_is_the_weighted_mean_of_every_tensor(room: Path) -> None:
    expect_mean(run(room, linear((0.25, 0.5))), (0.25, 0.5))


def test_a_dropped_weight_turns_the_mean_test_red(room: Path) -> None:
    def wrong(models: list[Tensor], *_: object) -> Tensor:
        return (models[0].float() + models[1].float()) / 2

    out = run(room, linear((0.25, 0.5)), method=PlainLinear(run=wrong))
    with pytest.raises(AssertionError):
        expect_mean(out, (0.25, 0.5))


def test_task_arithmetic_keeps_the_base_apart_though_it_is_listed(room: Path) -> None:
    models = [{"model": m, "parameters": {"weight": 0.5}} for m in "ABC"]
    recipe = {"merge_method": "task_arithmetic", "base_model": "C", "models": models, "dtype": "float32"}
    got = load_file(run(room, recipe | {"parameters": {"lambda": 0.5}}) / "model.safetensors")
    a, b, c = (tensors(seed) for seed in range(3))
    for name, tensor in got.items():
        base = c[name].double()
        exact = base + 0.25 * (a[name].double() - base) + 0.25 * (b[name].double() - base)
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor.double(), exact, rtol=1e-5, atol=1e-6), name


def test_a_base_that_is_not_listed_is_a_model_where_the_method_has_no_base(room: Path) -> None:
    """As mergekit does for linear and karcher; it needs a weight then."""
    recipe = {"merge_method": "linear", "base_model": "C", "models": [{"model": m} for m in "AB"], "dtype": "float32"}
    out = run(room, recipe | {"parameters": {"weight": 0.5}})
    a, b, c = (tensors(seed)["lm_head.weight"].double() for seed in range(3))
    assert torch.allclose(load_file(out / "model.safetensors")["lm_head.weight"].double(), (a + b + c) / 3, atol=1e-6)
    with pytest.raises(InputError, match="merges base_model c too, which has no weight"):
        run(room, recipe, "other")


def test_a_slice_may_have_a_base_of_its_own(room: Path) -> None:
    def part(base: str, low: int, high: int) -> dict[str, Any]:
        return {"base_model": base, "sources": [{"model": "A", "layer_range": [low, high]}]}

    recipe = {"merge_method": "task_arithmetic", "slices": [part("B", 0, 2), part("C", 2, 4)], "dtype": "float32"}
    got = load_file(run(room, recipe | {"parameters": {"weight": 0.5}}) / "model.safetensors")
    a, b, c = (tensors(seed) for seed in range(3))
    for name, tensor in got.items():
        early = "embed" in name or ".0." in name or ".1." in name
        exact = (a[name].double() + (b if early else c)[name].double()) / 2
        assert torch.allclose(tensor.double(), exact, atol=1e-6), name


def test_slerp_starts_at_the_base(room: Path) -> None:
    recipe = {"merge_method": "slerp", "base_model": "B", "models": [{"model": "A"}, {"model": "B"}]}
    for t, expected in ((0.0, tensors(1)), (1.0, tensors(0))):
        out = run(room, recipe | {"parameters": {"t": t}}, f"out{t}")
        assert all(torch.equal(v, expected[k]) for k, v in load_file(out / "model.safetensors").items())


def test_layers_are_stacked_and_the_config_follows(room: Path) -> None:
    out = run(room, SLICES)
    a, b, got = tensors(0), tensors(1), load_file(out / "model.safetensors")
    for new, (source, old) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        name = "self_attn.q_proj.weight"
        assert torch.equal(got[f"model.layers.{new}.{name}"], source[f"model.layers.{old}.{name}"])
    assert torch.equal(got["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(got["lm_head.weight"], b["lm_head.weight"])
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == [f"kind{i}" for i in (0, 1, 2, 1, 2, 3)]
    assert config["torch_dtype"] == "bfloat16"


def test_gradient_runs_over_layers_and_ends_at_the_head(room: Path) -> None:
    recipe = linear((1.0, 1.0))
    recipe["models"][0]["parameters"]["weight"] = [0, 3]
    recipe["models"][1]["parameters"]["weight"] = [3, 0]
    got = load_file(run(room, recipe) / "model.safetensors")
    a, b = tensors(0), tensors(1)
    assert torch.equal(got["model.embed_tokens.weight"], b["model.embed_tokens.weight"])
    assert torch.equal(got["model.layers.0.mlp.up_proj.weight"], b["model.layers.0.mlp.up_proj.weight"])
    last = f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"
    assert torch.equal(got[last], a[last])
    assert torch.equal(got["model.norm.weight"], a["model.norm.weight"])
    assert torch.equal(got["lm_head.weight"], a["lm_head.weight"])


def test_filters_and_precedence(room: Path) -> None:
    recipe = linear((1.0, 1.0))
    recipe["models"][0]["parameters"]["weight"] = [{"filter": "mlp", "value": 0}]
    recipe["parameters"] = {"weight": 1.0}
    got = load_file(run(room, recipe) / "model.safetensors")
    a, b = tensors(0), tensors(1)
    for name, tensor in got.items():
        exact = b[name] if "mlp" in name else ((a[name].float() + b[name].float()) / 2).bfloat16()
        assert torch.equal(tensor, exact), name


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_threads_do_not_change_a_byte(room: Path) -> None:
    models = [{"model": m, "parameters": {"weight": 0.5, "density": 0.4}} for m in "AB"]
    recipe = {"merge_method": "dare_ties", "base_model": "C", "models": models, "seed": 7}
    one, two = run(room, recipe, "one", threads=1), run(room, recipe, "two", threads=2)
    assert bytes_of(one) == bytes_of(two)
    assert bytes_of(one) != bytes_of(run(room, recipe | {"seed": 8}, "three"))


def test_shards_and_single_file_hold_the_same(room: Path) -> None:
    single = load_file(run(room, SLICES) / "model.safetensors")
    sharded = run(room, SLICES, "shards", shard_size=600)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(single)
    assert len(set(index.values())) > 3
    for name, file in index.items():
        assert torch.equal(load_file(sharded / file)[name], single[name])
    again = run(room, {"merge_method": "passthrough", "models": [{"model": "shards"}]}, "again")
    assert load_file(again / "model.safetensors").keys() == single.keys()


def test_lora_is_applied_on_the_fly(room: Path) -> None:
    adapter, name = room / "adapter", "model.layers.1.self_attn.q_proj"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    low, high = torch.randn(2, 8), torch.randn(8, 2)
    prefix = f"base_model.model.{name}"
    save_file(
        {f"{prefix}.lora_A.weight": low, f"{prefix}.lora_B.weight": high},
        adapter / "adapter_model.safetensors",
    )
    recipe = {"merge_method": "passthrough", "dtype": "float32", "models": [{"model": "a+adapter"}]}
    got = load_file(run(room, recipe) / "model.safetensors")
    exact = tensors(0)[f"{name}.weight"].float() + 4 * high @ low
    assert torch.allclose(got[f"{name}.weight"], exact, atol=1e-5)
    assert torch.equal(got["lm_head.weight"], tensors(0)["lm_head.weight"].float())


def test_bin_checkpoints_are_read(room: Path) -> None:
    (room / "b" / "model.safetensors").unlink()
    torch.save(tensors(1), room / "b" / "pytorch_model.bin")
    expect_mean(run(room, linear((1.0, 3.0))), (1.0, 3.0))


def test_a_tied_head_is_not_written(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        state = tensors(seed)
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        write(tmp_path / name, seed, state=state, tie_word_embeddings=True)
    got = load_file(run(tmp_path, linear((1.0, 1.0))) / "model.safetensors")
    assert "lm_head.weight" not in got
    assert "model.embed_tokens.weight" in got


def test_a_tied_model_s_head_is_its_embedding_beside_an_untied_one(room: Path) -> None:
    state = tensors(1)
    del state["lm_head.weight"]
    write(room / "b", 1, state=state, tie_word_embeddings=True)
    got = load_file(run(room, linear((1.0, 1.0))) / "model.safetensors")
    exact = (tensors(0)["lm_head.weight"].float() + state["model.embed_tokens.weight"].float()) / 2
    assert torch.equal(got["lm_head.weight"], exact.bfloat16())
    assert verify(room / "out").inputs == ["a", "b"]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_an_untied_head_unties_the_output(room: Path, method: str) -> None:
    """mergekit's answer where the first model, or the base, ties and another does not."""
    state = tensors(0)
    embedding = state["model.embed_tokens.weight"]
    del state["lm_head.weight"]
    write(room / "a", 0, state=state, tie_word_embeddings=True)
    recipe = linear((1.0, 1.0)) | {"merge_method": method}
    if method == "task_arithmetic":
        recipe |= {"base_model": "a", "models": [{"model": "b", "parameters": {"weight": 0.5}}]}
    out = run(room, recipe)
    got = load_file(out / "model.safetensors")
    exact = (embedding.float() + tensors(1)["lm_head.weight"].float()) / 2
    assert torch.equal(got["lm_head.weight"], exact.bfloat16())
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    state = tensors(1) | {"lm_head.weight": tensors(1)["model.embed_tokens.weight"].clone()}
    write(room / "b", 1, state=state)  # untied in name, equal in numbers: tied it stays
    out = run(room, recipe, "still")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("counts", [(1, 2), (2, 1)])
def test_embeddings_go_with_the_first_slice_and_heads_with_the_last(room: Path, counts: tuple[int, int]) -> None:
    """As in mergekit, which, however, drops a model of the last slice where the first has fewer."""

    def part(low: int, names: str) -> dict[str, Any]:
        parameters = {"weight": 1.0}
        return {"sources": [{"model": n, "layer_range": [low, low + 2], "parameters": parameters} for n in names]}

    first, last = "ABC"[: counts[0]], "ABC"[-counts[1] :]
    recipe = {"merge_method": "linear", "slices": [part(0, first), part(2, last)], "dtype": "float32"}
    got = load_file(run(room, recipe) / "model.safetensors")
    each = dict(zip("ABC", (tensors(seed) for seed in range(3)), strict=True))
    for name, names in (("model.embed_tokens.weight", first), ("model.norm.weight", last), ("lm_head.weight", last)):
        exact = sum(each[n][name].double() for n in names) / len(names)
        assert torch.allclose(got[name].double(), exact, atol=1e-6), name


@pytest.mark.parametrize("holder", "ab")
def test_buffers_that_loaders_compute_need_not_be_everywhere(room: Path, holder: str) -> None:
    """Files of 2023 hold rotary frequencies, those of today do not."""
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    frequencies = {name.format(i): torch.ones(4) for i in range(4)}
    seed = "ab".index(holder)
    write(room / holder, seed, state=tensors(seed) | frequencies)
    out = run(room, linear((0.25, 0.5)))
    expect_mean(out, (0.25, 0.5))
    assert f"{name.format(0)} and 3 more" in (out / "README.md").read_text()
    part = {"sources": [{"model": holder, "layer_range": [0, 2]}]}
    rest = {"sources": [{"model": "ab"[1 - seed], "layer_range": [2, 4]}]}
    out = run(room, {"merge_method": "passthrough", "slices": [part, rest]}, "stacked")
    assert set(load_file(out / "model.safetensors")) == set(tensors(0))
    write(room / "ab"[1 - seed], 1 - seed, state=tensors(1 - seed) | frequencies)
    assert frequencies.keys() < load_file(run(room, linear((0.25, 0.5)), "both") / "model.safetensors").keys()


def test_a_parameter_of_the_whole_merge_under_a_model_is_told(room: Path) -> None:
    recipe = linear((1.0, 1.0))
    recipe["models"][0]["parameters"]["normalize"] = False
    with pytest.warns(UserWarning, match="linear: normalize under a changes nothing"):
        run(room, recipe)


def test_verify_passes_and_then_sees_one_changed_byte(room: Path) -> None:
    out = run(room, linear((1.0, 1.0)))
    assert verify(out).tensors == len(tensors(0))
    record = json.loads((out / "model_fusion.json").read_text())
    assert record["recipe"]["merge_method"] == "linear"
    assert len(record["tensors"]["lm_head.weight"]["inputs"]) == 2
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match="changed since it was written"):
        verify(out)
    data[-1] ^= 1
    weights.write_bytes(data)
    (out / "config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        verify(out)


def test_overwrite_deletes_nothing_but_models(room: Path) -> None:
    (room / "thesis").mkdir()
    (room / "thesis/chapter.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other things than a model"):
        run(room, linear((1.0, 1.0)), "thesis", overwrite=True)
    assert (room / "thesis/chapter.tex").read_text() == "years of work"


def test_overwrite_replaces_the_whole_folder(room: Path) -> None:
    run(room, SLICES, shard_size=600)
    out = run(room, SLICES, overwrite=True)
    assert not list(out.glob("model-*"))
    assert [p.name for p in room.iterdir() if p.name.startswith(".")] == []


def test_merge_imports_no_model_code(room: Path) -> None:
    (room / "r.json").write_text(json.dumps(linear((1.0, 1.0))).replace('"A"', '"a"').replace('"B"', '"b"'))
    code = (
        "import sys; from pathlib import Path; from model_fusion.merge.engine import merge;"
        f"merge(Path({str(room / 'r.json')!r}), Path({str(room / 'out')!r}));"
        "print([m for m in sys.modules if m.split('.')[0] in ('transformers', 'peft')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_level_of_a_slice_is_read() -> None:
    source = {"model": "m", "layer_range": [0, 2], "parameters": {"scale": 2}}
    parsed = parse({"merge_method": "passthrough", "slices": [{"sources": [source], "parameters": {"scale": 3}}]})
    assert parsed.slices is not None
    assert parsed.slices[0].sources[0].parameters == {"scale": 2}
    assert parsed.slices[0].parameters == {"scale": 3}
