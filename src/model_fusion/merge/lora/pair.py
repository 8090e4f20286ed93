"""A fine-tune beside its base, tensor by tensor: names and shapes checked, tied heads resolved. Knows no LoRA."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from model_fusion.architecture.roles import tied
from model_fusion.checkpoint.formats import TensorSpec
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.checkpoint.writer import as_bytes
from model_fusion.errors import InputError
from model_fusion.merge.lora.layout import is_causal, module_path

HEAD = "lm_head.weight"
_BLOCK = 1 << 22


class Pair:
    """`specs` are the base's tensors, and its head where it ties it; `excluded` are the names left out on request.

    Raises `InputError` listing every tensor that only one of them has, or whose shapes differ.
    """

    def __init__(self, tuned: Checkpoint, base: Checkpoint, exclude: Sequence[str] = ()) -> None:
        self.tuned, self.base = tuned, base
        kinds = [checkpoint.config.get("model_type") for checkpoint in (tuned, base)]
        if None not in kinds and kinds[0] != kinds[1]:
            raise InputError(f"models of different architectures: {tuned.source.spec} {kinds[0]}, the base {kinds[1]}")
        for text in exclude:
            if not any(text in name for name in base.names):
                raise InputError(f"--exclude {text!r} matches no tensor of {base.source.spec}")
        self.excluded = [name for name in base.names if any(text in name for text in exclude)]
        self.embedding = self._embedding(base)
        # then a changed head says no more than the changed embedding does
        self.ties_alike = self.embedding is not None and self._embedding(tuned) is not None
        names = [name for name in base.names if name not in self.excluded]
        if self.embedding and HEAD not in names and self.embedding in names:
            names.append(HEAD)
        problems = [f"{name!r} is not in {tuned.source.spec}" for name in names if self._place(tuned, name) is None]
        skipped = {*names, *self.excluded, HEAD}
        problems += [f"{name!r} is not in {base.source.spec}" for name in tuned.names if name not in skipped]
        for name in names:
            one, two = self._spec(tuned, name), self._spec(base, name)
            if one and two and one.shape != two.shape:
                shapes = f"{list(one.shape)} in {tuned.source.spec}, {list(two.shape)} in the base"
                problems.append(f"{name!r} is {shapes} (leave it out by --exclude)")
        if problems:
            more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise InputError(f"{tuned.source.spec} does not fit its base: {'; '.join(problems[:10])}{more}")
        self.specs = [spec for spec in (self._spec(base, name) for name in names) if spec]

    def _embedding(self, checkpoint: Checkpoint) -> str | None:
        """The embedding's name where a causal model's head is tied to it (and stored once or twice alike)."""
        group = tied(checkpoint.config, [*checkpoint.names, HEAD]) if is_causal(checkpoint.config) else []
        if not group or (HEAD in checkpoint and not same(checkpoint.read(HEAD), checkpoint.read(group[0][0]))):
            return None
        return group[0][0]

    def _place(self, checkpoint: Checkpoint, name: str) -> str | None:
        if name in checkpoint:
            return name
        return self._embedding(checkpoint) if name == HEAD else None

    def _spec(self, checkpoint: Checkpoint, name: str) -> TensorSpec | None:
        place = self._place(checkpoint, name)
        return None if place is None else TensorSpec(name, checkpoint.spec(place).dtype, checkpoint.spec(place).shape)

    def module(self, name: str) -> str:
        """The path of the module that owns a parameter, as the model class has it."""
        return self.path(name).rpartition(".")[0]

    def path(self, name: str) -> str:
        return module_path(name, self.base.config)

    def tuned_spec(self, name: str) -> TensorSpec:
        spec = self._spec(self.tuned, name)
        assert spec is not None  # checked at the start
        return spec

    def read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """One of the two models' tensor; a tied head is the embedding."""
        place = self._place(checkpoint, name)
        assert place is not None
        return checkpoint.read(place)

    def changed(self, name: str) -> bool:
        return not same(self.read(self.tuned, name), self.read(self.base, name))

    def change(self, name: str) -> float:
        """‖tuned − base‖ / ‖base‖."""
        one, two = self.read(self.tuned, name), self.read(self.base, name)
        difference = whole = 0.0
        for a, b in zip(torch.split(one.reshape(-1), _BLOCK), torch.split(two.reshape(-1), _BLOCK), strict=True):
            difference += float((a.double() - b.double()).square().sum())
            whole += float(b.double().square().sum())
        return (difference / whole) ** 0.5 if whole else float("inf") if difference else 0.0

    def delta(self, name: str) -> Tensor:
        """tuned − base in float32; NaN and Inf are refused by name."""
        one, two = self.read(self.tuned, name), self.read(self.base, name)
        delta = one.to(torch.float32, copy=True).sub_(two.float())
        if not bool(torch.isfinite(delta.sum())) and not bool(torch.isfinite(delta).all()):
            bad = self.base if bool(torch.isfinite(one).all()) else self.tuned
            raise InputError(f"{bad.file_of(self._place(bad, name) or name)}: NaN or Inf in {name!r}")
        return delta

    def hashes(self, name: str) -> dict[str, str]:
        """What `delta` was made from, for the lineage."""
        found = {}
        for checkpoint in (self.tuned, self.base):
            for label, part in checkpoint.stored(self._place(checkpoint, name) or name).items():
                found[f"{checkpoint.source.spec}:{label}"] = hashlib.sha256(as_bytes(part)).hexdigest()
        return found


def same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their dtypes."""
    if one.shape != two.shape:
        return False
    if one.dtype == two.dtype:
        return torch.equal(one, two)
    parts = zip(torch.split(one.reshape(-1), _BLOCK), torch.split(two.reshape(-1), _BLOCK), strict=True)
    return all(torch.equal(a.double(), b.double()) for a, b in parts)
