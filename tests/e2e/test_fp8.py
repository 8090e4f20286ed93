"""FP8 checkpoints are merged as what they stand for: stored value times scale, against a plain float64 loop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_fixtures import tensors, write
from model_fusion.checkpoint.fp8 import Fp8Checkpoint
from model_fusion.checkpoint.reader import open_checkpoint
from model_fusion.checkpoint.sources import resolve
from model_fusion.checkpoint.verify import verify
from model_fusion.errors import InputError, IntegrityError
from model_fusion.merge import engine

BLOCK = (3, 5)  # cuts neither [8, 8] nor [16, 8] evenly
LAYOUTS: dict[str, dict[str, Any]] = {
    "block": {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"},
    "row": {"quant_method": "fbgemm_fp8"},
    "tensor": {"quant_method": "compressed-tensors", "format": "float-quantized"},
}


def quantised(layout: str, seed: int) -> dict[str, Tensor]:
    """The layers' matrices in FP8, each with a scale and a scale of its inputs; all else as it was."""
    state: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors(seed).items():
        if tensor.dim() < 2 or "layers" not in name:
            state[name] = tensor
            continue
        rows, columns = tensor.shape
        blocks = (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
        shape = {"block": blocks, "row": (rows, 1), "tensor": (1,)}[layout]
        state[name] = tensor.to(torch.float8_e4m3fn)
        state[name + ("_scale_inv" if layout == "block" else "_scale")] = torch.rand(shape, generator=generator) + 0.5
        state[name.replace(".weight", ".input_scale")] = torch.ones(1)
    return state


def reference(state: dict[str, Tensor]) -> dict[str, list[list[float]]]:
    """Every FP8 matrix as float64 numbers, one at a time."""
    found = {}
    for name, tensor in state.items():
        if tensor.dtype != torch.float8_e4m3fn:
            continue
        scale = state.get(f"{name}_scale_inv", state.get(f"{name}_scale"))
        assert scale is not None
        number = tensor.double().tolist()
        for i, row in enumerate(number):
            for j in range(len(row)):
                if f"{name}_scale_inv" in state:
                    row[j] *= float(scale[i // BLOCK[0], j // BLOCK[1]])
                else:
                    row[j] *= float(scale[i, 0] if scale.numel() > 1 else scale[0])
        found[name] = number
    return found


@pytest.fixture(params=LAYOUTS)
def room(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    state = quantised(request.param, 0)
    write(tmp_path / "small", 0, state=state, quantization_config=LAYOUTS[request.param], torch_dtype="bfloat16")
    write(tmp_path / "plain", 1)
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("small", "plain")]
    (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "float32"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def right(room: Path) -> bool:
    exact = reference(load_file(room / "small/model.safetensors"))
    checkpoint = open_checkpoint(resolve("small"))
    want = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in exact.items()}
    return all(torch.allclose(checkpoint.read(name).double(), tensor, rtol=1e-6) for name, tensor in want.items())


def test_reading_equals_the_reference(room: Path) -> None:
    assert right(room)


def test_a_scale_left_out_turns_the_check_red(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Fp8Checkpoint.__mro__[1].read  # type: ignore[attr-defined]
    monkeypatch.setattr(Fp8Checkpoint, "read", lambda self, name: raw(self, name).float())
    assert not right(room)


def test_the_merge_is_an_ordinary_checkpoint(room: Path) -> None:
    out = engine.merge(room / "r.yml", room / "out")
    got, other = load_file(out / "model.safetensors"), tensors(1)
    assert got.keys() == other.keys()
    exact = reference(load_file(room / "small/model.safetensors"))
    for name, numbers in exact.items():
        want = (torch.tensor(numbers, dtype=torch.float64) + other[name].double()) / 2
        assert torch.allclose(got[name].double(), want, atol=1e-6), name
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float32"


def test_scales_are_in_the_lineage(room: Path) -> None:
    out = engine.merge(room / "r.yml", room / "out")
    assert verify(out).inputs == ["small", "plain"]
    state = load_file(room / "small/model.safetensors")
    name = next(name for name in state if "_scale" in name and "input" not in name)
    state[name] += 1
    save_file(state, room / "small/model.safetensors")
    with pytest.raises(IntegrityError, match="changed since it was read"):
        verify(out)


@pytest.mark.parametrize("fault", ["none", "shape", "nan"])
def test_what_does_not_fit_is_refused(room: Path, fault: str) -> None:
    state = load_file(room / "small/model.safetensors")
    name = next(name for name in state if name.endswith(("weight_scale", "weight_scale_inv")))
    if fault == "none":
        del state[name]
    else:
        state[name] = torch.ones(7, 3) if fault == "shape" else state[name] * float("nan")
    save_file(state, room / "small/model.safetensors")
    message = {"none": "is FP8 and has no scale", "shape": r"is \[7, 3\], which does not fit", "nan": "NaN or Inf"}
    with pytest.raises(InputError, match=message[fault]):
        engine.merge(room / "r.yml", room / "out")
    assert not (room / "out").exists()


@pytest.mark.parametrize(
    "said", [{"quant_method": "gptq"}, {"quant_method": "compressed-tensors", "format": "pack-quantized"}]
)
def test_other_quantisations_are_refused_as_ever(room: Path, said: dict[str, Any]) -> None:
    write(room / "small", 0, quantization_config=said)
    with pytest.raises(InputError, match="dequantise them first"):
        engine.merge(room / "r.yml", room / "out")
