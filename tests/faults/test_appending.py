"""The appending writer: a full disk, a second writer, an error inside, a kill leave nothing that looks finished."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model_fusion.checkpoint.appending import AppendingWriter
from model_fusion.checkpoint.formats import TensorSpec, read_header
from model_fusion.errors import InputError

LARGEST = [TensorSpec(name, torch.float32, (1000, 1000)) for name in "ab"]


def test_sizes_are_known_afterwards(tmp_path: Path) -> None:
    with AppendingWriter(tmp_path / "out", "w.safetensors", LARGEST) as writer:
        writer.append("b", torch.arange(6.0).view(2, 3))
        writer.append("a", torch.ones(4, dtype=torch.bfloat16), {"x": "hash"})
        assert not (tmp_path / "out").exists()
        writer.finish({"last.json": b"{}"}, last="last.json")
    assert writer.inputs_of["a"] == {"x": "hash"}
    found = load_file(tmp_path / "out/w.safetensors")
    assert torch.equal(found["b"], torch.arange(6.0).view(2, 3))
    assert torch.equal(found["a"], torch.ones(4, dtype=torch.bfloat16))
    assert [entry.name for entry in read_header(tmp_path / "out/w.safetensors")] == ["b", "a"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["last.json", "w.safetensors"]


def test_only_what_was_planned_and_once(tmp_path: Path) -> None:
    with AppendingWriter(tmp_path / "out", "w.safetensors", LARGEST) as writer:
        writer.append("a", torch.ones(1))
        for name in ("a", "c"):
            with pytest.raises(InputError, match="not planned, or is written twice"):
                writer.append(name, torch.ones(1))
        writer.finish({}, last="")


def raising(folder: Path) -> None:
    with AppendingWriter(folder / "out", "w.safetensors", LARGEST) as writer:
        writer.append("a", torch.ones(1))
        raise InputError("inside")


def nothing(folder: Path) -> None:
    with AppendingWriter(folder / "out", "w.safetensors", LARGEST) as writer:
        writer.finish({}, last="")


def full(folder: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
        with AppendingWriter(folder / "out", "w.safetensors", LARGEST) as writer:
            writer.append("a", torch.ones(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("fault", "message"), [(raising, "inside"), (nothing, "nothing to write"), (full, "disk full")]
)
def test_an_error_leaves_nothing(tmp_path: Path, fault: object, message: str) -> None:
    assert callable(fault)
    with pytest.raises(InputError, match=message):
        fault(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    with AppendingWriter(tmp_path / "out", "w.safetensors", LARGEST) as writer:
        with pytest.raises(InputError, match="another process is writing"):
            AppendingWriter(tmp_path / "out", "w.safetensors", LARGEST)
        writer.append("a", torch.ones(1))
        writer.finish({}, last="")
    assert (tmp_path / "out/w.safetensors").is_file()


def test_what_a_killed_run_left_is_no_part_of_the_next(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        writer = AppendingWriter(tmp_path / "out", "w.safetensors", LARGEST)
        writer.append("a", torch.ones(500))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    with AppendingWriter(tmp_path / "out", "w.safetensors", LARGEST) as writer:
        writer.append("b", torch.zeros(2))
        writer.finish({}, last="")
    assert set(load_file(tmp_path / "out/w.safetensors")) == {"b"}
    assert (tmp_path / "out/w.safetensors").stat().st_size < 400
