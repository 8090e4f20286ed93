"""A checkpoint as a state dict, for what works on state dicts; and the hashes of all that was read through it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from model_fusion.architecture.roles import tied
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.checkpoint.writer import as_bytes


class State(Mapping[str, Tensor]):
    """Maps each tensor when it is asked for. A head that only repeats the embedding it is tied to is left out: some
    files store it, others do not. `hashes`: tensor → {label on disk → SHA-256}, of what was read so far."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        repeated = {
            head
            for embedding, *heads in tied(checkpoint.config, checkpoint.names)
            for head in heads
            if checkpoint.same(embedding, head)
        }
        self._names = [name for name in checkpoint.names if name not in repeated]
        self.hashes: dict[str, dict[str, str]] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.hashes:
            parts = self.checkpoint.stored(name)
            self.hashes[name] = {label: hashlib.sha256(as_bytes(part)).hexdigest() for label, part in parts.items()}
        return self.checkpoint.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def inputs_of(name: str, states: Sequence[State]) -> dict[str, str]:
    """`PARENT:label` → SHA-256 of what a tensor of all these states was made from, as lineage has it."""
    return {
        f"{state.checkpoint.source.spec}:{label}": digest
        for state in states
        for label, digest in state.hashes.get(name, {}).items()
    }
