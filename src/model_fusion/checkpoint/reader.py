"""Lazy readers: a checkpoint's tensors as memory-mapped views, whatever its shards. Knows no method."""

import json
import mmap
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from model_fusion.checkpoint.formats import Entry, TensorSpec, read_header
from model_fusion.checkpoint.small_files import small_files
from model_fusion.checkpoint.sources import Source
from model_fusion.errors import InputError

# tensors that stand beside packed weights: GPTQ and AWQ, FP8, bitsandbytes, compressed-tensors
_PACKED = re.compile(r"\.(qweight|qzeros|weight_scale|weight_scale_inv|absmax|quant_map|SCB|weight_packed)$")
QUANTISED = ("quantization_config", "compression_config")
"""Keys of a config.json that describe quantised weights."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; `InputError` names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error})") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object")
    return value


place_of: MutableMapping[Tensor, Entry] = WeakIdKeyDictionary()
"""Where a tensor that `read` returned lies on disk, for as long as that very tensor is alive."""


class Checkpoint:
    """A folder's config and tensors. `specs` is known after opening; `read` maps one tensor.

    Tensors are views of private (copy-on-write) maps: treat them as read-only. Thread-safe.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.folder = source.folder
        config = self.folder / "config.json"
        self.config: dict[str, Any] = read_json(config) if config.is_file() and not source.file else {}
        self._entries: dict[str, Entry] = {}
        self._pickled: dict[str, tuple[Path, Tensor]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._open()
        self._refuse_quantised()

    def _refuse_quantised(self) -> None:
        said = next((key for key in QUANTISED if self.config.get(key)), None)
        if said is not None:
            config = self.folder / "config.json"
            raise InputError(f"{config}: quantised weights ({said}) cannot be merged; dequantise them first")
        packed = next((name for name in self.names if _PACKED.search(name)), None)
        if packed is not None:
            raise InputError(f"{self.file_of(packed)}: {packed!r} belongs to quantised weights; dequantise them first")

    def _open(self) -> None:
        if self.source.file is not None:
            if self.source.file.suffix == ".safetensors":
                self._add(read_header(self.source.file))
            else:
                self._load_pickle(self.source.file)
            return
        index, bin_index = (self.folder / f"{n}.index.json" for n in ("model.safetensors", "pytorch_model.bin"))
        single = self.folder / "model.safetensors"
        if index.is_file():
            self._open_index(index)
        elif single.is_file():
            self._add(read_header(single))
        elif bin_index.is_file():
            self._open_index(bin_index)
        elif (self.folder / "pytorch_model.bin").is_file():
            self._load_pickle(self.folder / "pytorch_model.bin")
        elif files := sorted(self.folder.glob("*.safetensors")):
            for file in files:
                self._add(read_header(file))
        elif (self.folder / "adapter_model.bin").is_file():
            self._load_pickle(self.folder / "adapter_model.bin")
        else:
            raise InputError(f"{self.folder}: no weights (no model.safetensors, index or pytorch_model.bin)")
        if not self._entries and not self._pickled:
            raise InputError(f"{self.folder}: the weight files hold no tensors")

    def _open_index(self, index: Path) -> None:
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise InputError(f"{index}: no weight_map")
        for name in sorted(set(table.values())):
            if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
                raise InputError(f"{index}: shard {name!r} leads outside the folder")
            file = self.folder / name
            if not file.is_file():
                raise InputError(f"{file}: shard named in {index.name} is missing")
            if name.endswith(".safetensors"):
                self._add(read_header(file))
            else:
                self._load_pickle(file)
        absent = sorted(set(table) - set(self.names))
        if absent:
            raise InputError(f"{index}: names tensor {absent[0]!r}, which {table[absent[0]]} does not hold")
        for name in sorted(set(self.names)):
            if name not in table:
                raise InputError(f"{index}: tensor {name!r} of {self.file_of(name).name} is not in the index")
            if table[name] != self.file_of(name).name:
                raise InputError(f"{index}: says {table[name]} holds {name!r}, {self.file_of(name).name} does")

    def _add(self, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.name in self._entries:
                other = self._entries[entry.name].file.name
                raise InputError(f"{entry.file}: tensor {entry.name!r} is also in {other}")
            self._entries[entry.name] = entry

    def _load_pickle(self, file: Path) -> None:
        self._pickled |= {name: (file, tensor) for name, tensor in load_pickle(file).items()}

    @property
    def names(self) -> list[str]:
        return [*self._entries, *self._pickled]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._pickled

    def __iter__(self) -> Iterator[TensorSpec]:
        return (self.spec(name) for name in self.names)

    def spec(self, name: str) -> TensorSpec:
        if name in self._entries:
            entry = self._entries[name]
            return TensorSpec(name, entry.dtype, entry.shape)
        tensor = self._pickled[name][1]
        return TensorSpec(name, tensor.dtype, tuple(tensor.shape))

    def file_of(self, name: str) -> Path:
        return self._entries[name].file if name in self._entries else self._pickled[name][0]

    @property
    def names_on_disk(self) -> list[str]:
        """What all its tensors are called on disk."""
        return self.names

    def own_name(self, name: str) -> str | None:
        """What a tensor is called on disk; None for one that is on no disk in this form."""
        return name

    def files(self) -> dict[str, bytes]:
        """The small files (tokenizer, chat template …) that belong in an output, by name."""
        if self.source.file is not None:
            return {}
        return {name: (self.folder / name).read_bytes() for name in small_files(self.folder)}

    def same(self, first: str, second: str) -> bool:
        """Whether two of its tensors hold the same numbers."""
        one, two = self.spec(first), self.spec(second)
        return one.shape == two.shape and torch.equal(self.read(first), self.read(second))

    def read(self, name: str) -> Tensor:
        """The tensor, in its stored dtype and shape, as a view of the file."""
        if name in self._pickled:
            return self._pickled[name][1].detach()
        entry = self._entries[name]
        with self._lock:
            if entry.file not in self._maps:
                self._maps[entry.file] = _map(entry.file)
        return map_tensor(entry, self._maps[entry.file])

    def stored(self, name: str) -> dict[str, Tensor]:
        """What `read` makes the tensor from, as it lies on disk: label → tensor. This is what lineage hashes."""
        return {name: self.read(name)}


def load_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, by an unpickler that makes nothing else. Raises `InputError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old pickle protocols
            # files of torch before 1.6 are no zip archives and cannot be mapped
            table = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        reason = "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else "damaged"
        raise InputError(f"{file}: refused ({reason}); save it as safetensors") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(table, dict) and isinstance(table.get(key), dict):
            table = table[key]
    if not isinstance(table, dict):
        raise InputError(f"{file}: not a state dict")
    return {str(name): tensor for name, tensor in table.items() if isinstance(tensor, Tensor)}


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as handle:
        # ACCESS_COPY: writable in torch's eyes (no warning), and never written through to the file
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)


def map_tensor(entry: Entry, mapped: mmap.mmap | None = None) -> Tensor:
    """One tensor as a view of its file."""
    if entry.tensor is not None:
        return entry.tensor
    count = (entry.end - entry.begin) // entry.dtype.itemsize
    if count == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    buffer = _map(entry.file) if mapped is None else mapped
    tensor = torch.frombuffer(buffer, dtype=entry.dtype, count=count, offset=entry.begin).view(entry.shape)
    place_of[tensor] = entry
    return tensor


def open_checkpoint(source: Source) -> Checkpoint:
    """The checkpoint of a source, its adapter applied on the fly where it has one, FP8 weights dequantised."""
    from model_fusion.checkpoint.fp8 import Fp8Checkpoint, is_fp8
    from model_fusion.checkpoint.lora import AdaptedCheckpoint

    if source.adapter is not None:
        return AdaptedCheckpoint(source)
    config = source.folder / "config.json"
    if source.file is None and config.is_file() and is_fp8(read_json(config)):
        return Fp8Checkpoint(source)
    return Checkpoint(source)


def open_model(source: Source) -> Checkpoint:
    """As `open_checkpoint`, for what must be a model: an adapter's folder by itself is refused."""
    settings = source.folder / "adapter_config.json"
    if source.file is None and settings.is_file() and not (source.folder / "config.json").is_file():
        base = read_json(settings).get("base_model_name_or_path") or "BASE"
        raise InputError(
            f"{source.spec} is a LoRA adapter, not a model: name it with its base, as {base}+{source.spec}"
        )
    return open_checkpoint(source)
