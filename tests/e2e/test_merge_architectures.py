"""Merges of many families: every tensor accounted for under its own name, and the output loads as it should."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from architecture_fixtures import MODELS, save
from model_fusion.errors import InputError
from model_fusion.merge import engine, execute
from model_fusion.merge.inspect import inspect
from model_fusion.recipe.merge import parse

VLMS = {"llava": "llama", "qwen2_vl": "qwen2", "gemma3_vl": "gemma3"}
PREFIX = {"llava": "language_model.", "qwen2_vl": "", "gemma3_vl": "language_model."}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("models")
    for kind in MODELS:
        for seed, name in enumerate("ab"):
            save(kind, room / f"{kind}-{name}", seed)
    return room


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def run(models: Path, out: Path, recipe: dict[str, Any], **flags: Any) -> Path:
    """Merge; a model named `x` is the folder `models/x`."""
    text = json.dumps(recipe)
    for kind in MODELS:
        for name in "ab":
            text = text.replace(f'"{kind}-{name}"', f'"{models}/{kind}-{name}"')
    return engine.merge(parse(json.loads(text)), out, **flags)


def mean(*names: str, **more: Any) -> dict[str, Any]:
    entries = [{"model": name, "parameters": {"weight": 1}} for name in names]
    return {"merge_method": "linear", "models": entries, **more}


def load(folder: Path) -> Any:
    """The model as stock transformers reads it: no tensor missing, none left over."""
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_is_merged_under_its_own_name(models: Path, tmp_path: Path, kind: str) -> None:
    out = run(models, tmp_path / "out", mean(f"{kind}-a", f"{kind}-b"))
    a, b, got = weights(models / f"{kind}-a"), weights(models / f"{kind}-b"), weights(out)
    assert got.keys() == a.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, ((a[name].float() + b[name].float()) / 2).bfloat16()), name
    load(out)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gemma3", "mixtral", "qwen2_moe", "deepseek_v3", *VLMS])
def test_stacked_layers_load_and_run(models: Path, tmp_path: Path, kind: str) -> None:
    slices = [
        {"sources": [{"model": f"{kind}-a", "layer_range": [0, 2]}]},
        {"sources": [{"model": f"{kind}-b", "layer_range": [1, 2]}]},
    ]
    model = load(run(models, tmp_path / "out", {"merge_method": "passthrough", "slices": slices}))
    assert model.config.get_text_config().num_hidden_layers == 3
    logits = model(torch.arange(10, 16)[None]).logits
    assert logits.isfinite().all()


def text_name(kind: str, name: str) -> str:
    return name.removeprefix(PREFIX[kind])


def is_tower(name: str) -> bool:
    return any(word in name for word in ("vision", "visual", "projector"))


@pytest.mark.parametrize("kind", VLMS)
@pytest.mark.parametrize("base", [None, "vlm", "text"])
def test_backbone_is_merged_with_a_text_model_and_the_tower_kept(
    models: Path, tmp_path: Path, kind: str, base: str | None
) -> None:
    vlm, text = f"{kind}-a", f"{VLMS[kind]}-b"
    recipe = mean(vlm, text)
    if base is not None:
        first, second = (vlm, text) if base == "vlm" else (text, vlm)
        models_ = [{"model": second, "parameters": {"weight": 0.5}}]
        recipe = {"merge_method": "task_arithmetic", "base_model": first, "models": models_}
    out = run(models, tmp_path / "out", recipe)
    a, b, got = weights(models / vlm), weights(models / text), weights(out)
    assert got.keys() == a.keys()
    merged = 0
    for name, tensor in got.items():
        if is_tower(name):
            assert torch.equal(tensor.view(torch.uint8), a[name].view(torch.uint8)), name
        else:
            exact = (a[name].double() + b[text_name(kind, name)].double()) / 2
            assert torch.allclose(tensor.double(), exact, rtol=2**-7, atol=1e-6), name
            merged += 1
    assert merged == len(b)
    load(out)


NEW_NAMES = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."))


def as_newer(name: str) -> str:
    """A Llava tensor's name in files written under transformers 4.52 and after."""
    for old, new in NEW_NAMES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return f"model.{name}"


@pytest.mark.parametrize("kind", VLMS)
@pytest.mark.parametrize("text_is_base", [False, True])
def test_a_backbone_is_inspected_beside_a_text_model(models: Path, kind: str, text_is_base: bool) -> None:
    """Tensor by tensor, whatever the prefix; what only the tower has is listed."""
    pair = [str(models / f"{kind}-a"), str(models / f"{VLMS[kind]}-b")]
    one, base = pair if text_is_base else pair[::-1]
    found = inspect([one], base, with_spectra=False)
    assert len(found.tensors) >= len([n for n in weights(Path(pair[1])) if "layers" in n])
    assert not any("architectures" in text for text in found.problems)
    assert any("not in" in text for text in found.problems)


@pytest.mark.parametrize("other", ["llava-b", "llama-b"])
@pytest.mark.parametrize("newer_first", [True, False])
def test_files_of_different_ages_are_one_architecture(
    models: Path, tmp_path: Path, other: str, newer_first: bool
) -> None:
    shutil.copytree(models / "llava-a", tmp_path / "new")
    a, b = weights(models / "llava-a"), weights(models / other)
    save_file({as_newer(name): tensor for name, tensor in a.items()}, tmp_path / "new" / "model.safetensors")
    pair = (str(tmp_path / "new"), other)
    out = run(models, tmp_path / "out", mean(*(pair if newer_first else pair[::-1])))
    got = weights(out)
    old_names = other == "llava-b" and not newer_first
    assert got.keys() == {name if old_names else as_newer(name) for name in a}
    for name, tensor in a.items():
        second = b.get(name if other == "llava-b" else text_name("llava", name), tensor)
        exact = ((tensor.float() + second.float()) / 2).bfloat16()
        assert torch.equal(got[name if old_names else as_newer(name)], exact), name
    load(out)


def test_a_tower_touched_by_the_merge_turns_the_vlm_test_red(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation: a merge that also halves what only one model has."""
    real = execute.Run._one

    def touched(self: Any, item: Any) -> None:
        real(self, item)
        if item.copied and "tower" in item.spec.name:
            self._writer.write(item.spec.name, torch.zeros(item.spec.shape, dtype=item.spec.dtype))

    monkeypatch.setattr(execute.Run, "_one", touched)
    with pytest.raises(AssertionError):
        test_backbone_is_merged_with_a_text_model_and_the_tower_kept(models, tmp_path, "llava", None)


def test_modules_merge_their_part_and_copy_the_rest(models: Path, tmp_path: Path) -> None:
    parts = {
        "text_decoder": {"models": mean("llava-a", "llama-b")["models"]},
        "vision_tower": {"models": mean("llava-a", "llava-b")["models"]},
    }
    recipe = {"merge_method": "linear", "base_model": "llava-a", "modules": parts}
    out = run(models, tmp_path / "out", recipe)
    a, other, text, got = (weights(p) for p in (models / "llava-a", models / "llava-b", models / "llama-b", out))

    def partner(name: str) -> Tensor:
        if "projector" in name:
            return a[name]
        return other[name] if "vision" in name else text[text_name("llava", name)]

    for name, tensor in got.items():
        assert torch.equal(tensor, ((a[name].float() + partner(name).float()) / 2).bfloat16()), name
    load(out)


def test_a_module_may_be_sliced(models: Path, tmp_path: Path) -> None:
    slices = [
        {"sources": [{"model": "llava-a", "layer_range": [0, 2]}]},
        {"sources": [{"model": "llama-b", "layer_range": [0, 1]}]},
    ]
    recipe = {"merge_method": "passthrough", "base_model": "llava-a", "modules": {"text_decoder": {"slices": slices}}}
    out = run(models, tmp_path / "out", recipe)
    a, b, got = weights(models / "llava-a"), weights(models / "llama-b"), weights(out)
    assert load(out).config.text_config.num_hidden_layers == 3
    for name, tensor in got.items():
        head = "lm_head" in name or ".norm." in name  # the last slice gives what comes after the layers
        source = text_name("llava", name.replace(".layers.2.", ".layers.0."))
        assert torch.equal(tensor, b[source] if head or ".layers.2." in name else a[name]), name


def test_encoder_and_decoder_are_modules(models: Path, tmp_path: Path) -> None:
    parts = {"encoder": {"models": mean("t5-a", "t5-b")["models"]}}
    out = run(models, tmp_path / "out", {"merge_method": "linear", "base_model": "t5-a", "modules": parts})
    a, b, got = weights(models / "t5-a"), weights(models / "t5-b"), weights(out)
    for name, tensor in got.items():
        expected = (a[name].float() + b[name].float()) / 2 if name.startswith("encoder.") else a[name]
        assert torch.equal(tensor, expected.bfloat16()), name


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (mean("llava-a", "qwen2-b"), "different architectures: llama, qwen2"),
        (mean("llama-a", "qwen2-b"), "different architectures"),
        (
            {"merge_method": "linear", "base_model": "t5-a", "modules": {"encodr": {"models": [{"model": "t5-a"}]}}},
            "module 'encodr'.*did you mean 'encoder'",
        ),
        (
            {
                "merge_method": "linear",
                "base_model": "t5-a",
                "modules": {k: {"models": [{"model": "t5-a"}]} for k in ("encoder", "default")},
            },
            "'encoder' and 'default' share tensors",
        ),
        (
            {
                "merge_method": "passthrough",
                "slices": [{"sources": [{"model": "deepseek_v3-a", "layer_range": [i, i + 1]}]} for i in (1, 0)],
            },
            "first_k_dense_replace",
        ),
    ],
)
def test_what_does_not_fit_is_refused(models: Path, tmp_path: Path, recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run(models, tmp_path / "out", recipe)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
