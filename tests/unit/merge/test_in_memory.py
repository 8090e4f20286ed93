"""A merge in memory holds what a merge on disk writes, named merges included, and opens each model once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merge_fixtures import write
from model_fusion.checkpoint import reader
from model_fusion.merge import engine, in_memory
from model_fusion.recipe.merge import parse

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "c",
    "models": [{"model": name, "parameters": {"density": 0.5, "weight": 0.75}} for name in "ab"],
}
NAMED = {
    "merge_method": "linear",
    "models": [{"model": "ties", "parameters": {"weight": 0.25}}, {"model": "b", "parameters": {"weight": 0.75}}],
    "merges": {"ties": TIES},
}


@pytest.fixture
def room(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        write(tmp_path / name, seed)
    return tmp_path


def check(room: Path, recipe: dict[str, Any]) -> None:
    engine.merge(parse(recipe), room / "out", relative_to=room, overwrite=True)
    held = engine.merge_in_memory(parse(recipe), room, {}, threads=2)
    wanted = load_file(room / "out/model.safetensors")
    assert set(held.names) == set(wanted) == set(held.tensors)
    for name, tensor in wanted.items():
        assert held.spec(name).dtype == tensor.dtype
        assert torch.equal(held.read(name), tensor), name


@pytest.mark.parametrize("recipe", [TIES, NAMED], ids=["one", "named"])
def test_memory_and_disk_hold_the_same_tensors(room: Path, recipe: dict[str, Any]) -> None:
    check(room, recipe)


def test_mutation_parts_written_without_their_place(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(self: Any, name: str, parts: Any, inputs: Any = None) -> str:
        flat = self.tensors[name].view(-1)
        flat[:] = torch.cat([part.clone() for part in parts]).roll(1)
        return ""

    monkeypatch.setattr(in_memory._Memory, "write_parts", shifted)
    with pytest.raises(AssertionError):
        check(room, TIES)


def test_models_are_opened_once_and_nothing_is_hashed(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count: list[str] = []
    start = reader.Checkpoint.__init__

    def counted(self: Any, source: Any) -> None:
        count.append(source.spec)
        start(self, source)

    monkeypatch.setattr(reader.Checkpoint, "__init__", counted)
    opened: dict[str, Any] = {}
    before = sorted(item.name for item in room.iterdir())
    for _ in range(3):
        engine.merge_in_memory(parse(TIES), room, opened)
    assert sorted(count) == ["a", "b", "c"]
    assert sorted(item.name for item in room.iterdir()) == before
