"""A weight file whose tensors' sizes are known only as they come: room for the header first, tensors appended.

The header is padded with spaces, which the format allows, so nothing moves when the true sizes are filled in.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from model_fusion.checkpoint.formats import TensorSpec, build_header
from model_fusion.checkpoint.output_folder import OutputFolder, explain, pwrite
from model_fusion.checkpoint.writer import as_bytes
from model_fusion.errors import InputError


class AppendingWriter(OutputFolder):
    """Writes `target`/`name`. `largest` are the specs at their largest possible shapes: their header is the room.

    `done` maps each tensor to its SHA-256, `specs` are those appended so far. One thread appends.
    """

    def __init__(self, target: Path, name: str, largest: Sequence[TensorSpec]) -> None:
        super().__init__(target)
        self._name = name
        self._allowed = {spec.name for spec in largest}
        self.specs: list[TensorSpec] = []
        self.done: dict[str, str] = {}
        self.inputs_of: dict[str, dict[str, str]] = {}
        self._room = self._end = len(build_header(largest)[0])
        try:
            self.open()
            self.empty()
            self._files = [os.open(self.partial / f"{name}.partial", os.O_RDWR | os.O_CREAT, 0o644)]
        except OSError as error:
            self.close()
            shutil.rmtree(self.partial, ignore_errors=True)
            raise explain(error, self.target) from error

    def append(self, name: str, tensor: Tensor, inputs: Mapping[str, str] | None = None) -> str:
        """Add one tensor at the end of the file; returns its SHA-256."""
        if name not in self._allowed or name in self.done:
            raise InputError(f"tensor {name!r} was not planned, or is written twice")
        spec, data = TensorSpec(name, tensor.dtype, tuple(tensor.shape)), as_bytes(tensor)
        try:
            pwrite(self._files[0], data, self._end)
        except OSError as error:
            raise explain(error, self.target) from error
        self._end += len(data)
        self.specs.append(spec)
        self.inputs_of[name] = dict(inputs or {})
        self.done[name] = hashlib.sha256(data).hexdigest()
        return self.done[name]

    def finish(self, files: Mapping[str, bytes], last: str) -> None:
        """Fill in the header, add the small files (`last` at the end), and put the folder at the target."""
        if not self.specs:
            raise InputError(f"{self.target}: nothing to write, not one tensor was made")
        try:
            header, _ = build_header(self.specs, self._room)
            pwrite(self._files[0], memoryview(header), 0)
            self.publish([self._name], files, last)
        except OSError as error:
            raise explain(error, self.target) from error
        self.close()
