"""Makes one output tensor of a plan from its parts. No file but through the readers, no loop over the model."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.mix.plan import Output, Part


def combine(output: Output, checkpoints: Mapping[str, Checkpoint], seed: int) -> Tensor:
    """The tensor in the planned shape (before widening) and dtype; a view of the input file where nothing changes."""
    spec = output.spec
    if output.how == "zeros":
        return torch.zeros(spec.shape, dtype=spec.dtype)
    if output.how == "mean":
        total = sum(checkpoints[p.model].read(p.tensor).float() * p.scale for p in output.parts)
        return torch.as_tensor(total).to(spec.dtype)
    pieces = [_piece(part, checkpoints[part.model], output, seed) for part in output.parts]
    made = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1 if output.how == "columns" else 0)
    return made if output.widened else made.view(spec.shape)


def _piece(part: Part, checkpoint: Checkpoint, output: Output, seed: int) -> Tensor:
    tensor = checkpoint.read(part.tensor)
    if part.noise:
        key = hashlib.sha256(f"{seed}:{output.spec.name}:{part.model}:{part.tensor}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        tensor = tensor.float() + torch.randn(tensor.shape, generator=generator) * part.noise
    if part.scale != 1.0:
        tensor = tensor.float() * part.scale
    return tensor.to(output.spec.dtype)


def unchanged(output: Output, checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Whether the output is, byte for byte, its single input."""
    if len(output.parts) != 1 or output.how == "mean" or output.widened:
        return False
    part = output.parts[0]
    same = checkpoints[part.model].spec(part.tensor).dtype == output.spec.dtype
    return same and part.scale == 1.0 and not part.noise and checkpoints[part.model].source.adapter is None
