"""Bytes in, bytes out: the reader against the safetensors library, the writer's promises one at a time."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_fusion.checkpoint.formats import TensorSpec
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.checkpoint.small_files import small_files
from model_fusion.checkpoint.sources import Source, resolve
from model_fusion.checkpoint.writer import CheckpointWriter
from model_fusion.errors import InputError

STATE = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor([1, 2, 3]),
    "d": torch.tensor([True, False, True]),
    "e": torch.zeros(0, 4, dtype=torch.float16),
    "f": torch.tensor(3.0),
}
SPECS = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in STATE.items()]


def same(folder: Path) -> bool:
    checkpoint = Checkpoint(Source("x", folder))
    reference = load_file(folder / "model.safetensors")
    return set(checkpoint.names) == set(reference) and all(
        torch.equal(checkpoint.read(name), tensor) and checkpoint.read(name).dtype == tensor.dtype
        for name, tensor in reference.items()
    )


def test_reader_agrees_with_the_library_on_every_dtype_and_empty_shape(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    assert same(tmp_path)


def test_a_reader_one_element_off_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    right = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: right(self, name).roll(1))
    assert not same(tmp_path)


def test_writing_into_a_read_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    Checkpoint(Source("x", tmp_path)).read("a").zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def interrupted(target: Path) -> None:
    with CheckpointWriter(target, SPECS, key="k") as writer:
        writer.write("a", STATE["a"])
        raise KeyboardInterrupt


def one_tensor_only(target: Path) -> None:
    with CheckpointWriter(target, SPECS, key="k") as writer:
        writer.write("a", STATE["a"])
        writer.finish({})


def written_with(target: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: object, finish: bool) -> None:
    """All tensors written; `os.name` replaced before the last write, or before `finish`."""
    with CheckpointWriter(target, SPECS, key="k") as writer:
        for tensor in STATE:
            if not finish:
                monkeypatch.setattr(os, name, call)
            writer.write(tensor, STATE[tensor])
        monkeypatch.setattr(os, name, call)
        writer.finish({})


def test_written_folder_is_read_by_the_library(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", SPECS, key="k") as writer:
        for name, tensor in reversed(STATE.items()):
            writer.write(name, tensor)
        writer.finish({"config.json": b"{}"})
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in STATE.items())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_ctrl_c_keeps_a_partial_folder_that_nothing_loads_and_resume_ends_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in (tmp_path / ".out.partial").iterdir()) == [
        "journal",
        "model.safetensors.partial",
    ]
    with CheckpointWriter(tmp_path / "out", SPECS, key="k", resume=True) as writer:
        assert set(writer.done) == {"a"}
        for name in set(STATE) - set(writer.done):
            writer.write(name, STATE[name])
        writer.finish({})
    assert same(tmp_path / "out")


def test_another_key_starts_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    with CheckpointWriter(tmp_path / "out", SPECS, key="other", resume=True) as writer:
        assert writer.done == {}


def test_two_writers_of_one_target_are_refused(tmp_path: Path) -> None:
    with (
        CheckpointWriter(tmp_path / "out", SPECS, key="k"),
        pytest.raises(InputError, match="another process"),
    ):
        CheckpointWriter(tmp_path / "out", SPECS, key="k")


def test_a_tensor_that_was_never_written_stops_the_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'b' was planned"):
        one_tensor_only(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_disk_full_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match="disk full"):
        written_with(tmp_path / "out", monkeypatch, "pwrite", full, finish=False)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("mine")
    real = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == ".out.partial":
            raise OSError(errno.EIO, "broken")
        real(source, target)

    with pytest.raises(InputError, match="broken"):
        written_with(tmp_path / "out", monkeypatch, "rename", fail, finish=True)
    assert (tmp_path / "out" / "keep").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_resolve_prefers_a_folder_whose_name_holds_a_plus(tmp_path: Path) -> None:
    for name in ("x", "y", "x+y"):
        (tmp_path / name).mkdir()
    assert resolve("x+y", tmp_path).adapter is None
    (tmp_path / "x+y").rmdir()
    assert resolve("x+y", tmp_path) == Source("x+y", tmp_path / "x", tmp_path / "y")


def test_small_files_that_a_loader_wants_are_taken(tmp_path: Path) -> None:
    wanted = {"video_preprocessor_config.json", "tekken.json", "qwen.tiktoken", "tokenizer.json", "chat_template.jinja"}
    for name in [
        *wanted,
        "training_args.bin",
        "optimizer.pt",
        "trainer_state.json",
        "notes.txt",
        "tokenizer_report.json",
    ]:
        (tmp_path / name).touch()
    assert set(small_files(tmp_path)) == wanted
