"""The safetensors format: dtype names, header parsing and header writing. Reads and writes no tensor."""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model_fusion.errors import InputError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor on disk: bytes [begin, end) of `file`; of a pickle, the `tensor` itself."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    tensor: torch.Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} appears twice")
        result[key] = value
    return result


def read_header(file: Path) -> list[Entry]:
    """Entries of a safetensors file, every offset checked against the file's size.

    Raises `InputError` naming the file (and the tensor) for anything malformed.
    """
    header, start, size = _header(file)
    entries = [_entry(file, start, name, info) for name, info in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = start
    for entry in entries:
        if entry.begin < position:
            raise InputError(f"{file}: tensor {entry.name!r} overlaps the one before it")
        if entry.end > size:
            raise InputError(f"{file}: tensor {entry.name!r} ends at byte {entry.end}, the file at {size}: truncated")
        position = entry.end
    return entries


def read_metadata(file: Path) -> dict[str, Any]:
    """The free texts in a safetensors file's header. Raises `InputError` where the header is malformed."""
    found = _header(file)[0].get("__metadata__")
    return found if isinstance(found, dict) else {}


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, the byte where the tensors start, and the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            prefix = handle.read(8)
            if len(prefix) < 8:
                raise InputError(f"{file}: {size} bytes is too short for a safetensors file")
            length = struct.unpack("<Q", prefix)[0]
            if length > min(_MAX_HEADER, size - 8):
                raise InputError(f"{file}: header claims {length} bytes, the file has {size}; download it again")
            header = json.loads(handle.read(length).decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: corrupt safetensors header ({error})") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    if not isinstance(header, dict):
        raise InputError(f"{file}: corrupt safetensors header (not a table of tensors)")
    return header, 8 + length, size


def _entry(file: Path, start: int, name: str, info: object) -> Entry:
    where = f"{file}: tensor {name!r}"
    if not isinstance(info, dict):
        raise InputError(f"{where}: corrupt header entry")
    dtype: Any = info.get("dtype")
    shape: Any = info.get("shape")
    offsets: Any = info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where}: unknown dtype {dtype!r}")
    for label, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise InputError(f"{where}: bad {label} {numbers!r}")
    if len(offsets) != 2:
        raise InputError(f"{where}: bad data_offsets {offsets!r}")
    spec = TensorSpec(name, DTYPES[dtype], tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise InputError(f"{where}: {shape} of {dtype} needs {spec.nbytes} bytes, has {offsets[1] - offsets[0]}")
    return Entry(name, spec.dtype, spec.shape, file, start + offsets[0], start + offsets[1])


def build_header(
    specs: Sequence[TensorSpec], room: int = 0, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[int]]:
    """Header bytes (padded to 8, or to `room` bytes) and each tensor's offset in the file, in the order given."""
    table: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position, relative = 0, []
    for spec in specs:
        relative.append(position)
        end = position + spec.nbytes
        table[spec.name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * max(-len(text) % 8, room - 8 - len(text))
    return struct.pack("<Q", len(text)) + text, [8 + len(text) + offset for offset in relative]
