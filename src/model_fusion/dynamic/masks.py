"""One task vector for all experts and one bit an element for each: a mask per expert brings its own model back.

The task's id is needed when a model is asked for: nothing here looks at an input. Two ways to make vector and masks, on
state dicts of the same names and shapes, with τ_t = θ_t − θ0:

- EMR (Huang et al. 2024, arXiv 2405.17461): elected sign, largest magnitude of that sign, one rescaler an expert.
- TALL masks (Wang et al. 2024, arXiv 2405.07813): the sum Στ, kept where τ_t outweighs the rest. The merge method
  `consensus` needs no id: it is one ordinary model of the entries that several of these masks keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.consensus import relevant

State = Mapping[str, Tensor]
Kind = Literal["emr", "tall"]


@dataclass(frozen=True)
class Masks:
    """unified: the shared task vector, in the base's dtypes. bits: uint8 [T, ⌈n / 8⌉] of each tensor of n elements, as
    `numpy.packbits` packs its elements in order. rescale: float32 [T]. tied: name → the name whose tensor it shares.
    """

    kind: Kind
    tasks: tuple[str, ...]
    unified: dict[str, Tensor]
    bits: dict[str, Tensor]
    rescale: Tensor
    tied: dict[str, str]

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes kept beside the base: the shared vector, the masks of all tasks, the rescalers."""
        return {
            "unified": sum(t.nbytes for t in self.unified.values()),
            "masks": sum(t.nbytes for t in self.bits.values()),
            "rescale": self.rescale.nbytes,
        }

    def reconstruct(self, base: State, task: str | int) -> dict[str, Tensor]:
        """The task's own state dict, θ0 + rescale_t · (mask_t ⊙ unified), in the base's dtypes. What no expert changed,
        and what is no float, is a copy of the base's. Raises InputError for an unknown task or another base."""
        number = self.number(task)
        if missing := sorted((set(self.unified) | set(self.tied)) - set(base)):
            raise InputError(f"the base has no tensor {missing[0]!r}: hand in the base these masks were made from")
        made: dict[str, Tensor] = {}
        for name, own in base.items():
            if name in self.tied:
                continue
            made[name] = self.tensor(name, own, number)
        return {name: made[self.tied.get(name, name)] for name in base}

    def tensor(self, name: str, own: Tensor, number: int) -> Tensor:
        """One tensor of task `number`, from the base's; a fresh one."""
        if name not in self.unified:
            return own.detach().clone()
        shared = self.unified[name]
        if shared.shape != own.shape:
            raise InputError(f"tensor {name!r}: the base has {list(own.shape)}, the masks {list(shared.shape)}")
        kept = unpacked(self.bits[name][number], shared.shape)
        change = torch.where(kept, shared.float(), 0.0) * self.rescale[number]
        return (own.float() + change).to(own.dtype)

    def number(self, task: str | int) -> int:
        """A task's place. Raises InputError for an unknown one."""
        if isinstance(task, str) and task in self.tasks:
            return self.tasks.index(task)
        if isinstance(task, int) and 0 <= task < len(self.tasks):
            return task
        raise InputError(f"no task {task!r} here; there are {', '.join(self.tasks)}")


def emr(base: State, experts: Mapping[str, State]) -> Masks:
    """Elect, mask and rescale: γ = sign(Στ), unified = γ · max over τ_t of sign γ of |τ_t|, mask_t = τ_t · unified > 0,
    rescale_t = Σ|τ_t| / Σ|mask_t · unified| over all elements of the model. float32 arithmetic, sums in float64."""
    made = _Making("emr", base, experts)
    own, kept = (torch.zeros(len(experts), dtype=torch.float64) for _ in range(2))
    for name, tau in made.vectors():
        sign = tau.sum(0).sign()
        unified = made.add(name, sign * (tau * sign).clamp(min=0).amax(0))
        masks = tau * unified > 0
        made.mask(name, masks)
        own += _total(tau)
        kept += _total(torch.where(masks, unified, 0.0))
    # an expert that equals the base has an empty mask: nothing to rescale
    return made.done(torch.where(kept > 0, own / kept.clamp(min=torch.finfo(torch.float64).tiny), 1.0).float())


def tall(base: State, experts: Mapping[str, State], strength: float | Sequence[float] = 0.4) -> Masks:
    """unified = Στ, mask_t = |τ_t| > λ_t · |Στ − τ_t|. strength: λ, one for all experts or one for each; above 0, a
    larger one keeps less. The paper chooses it for each task on validation data among 0.2 … 0.6."""
    strengths = _strengths(strength, len(experts))
    made = _Making("tall", base, experts)
    for name, tau in made.vectors():
        total = tau.sum(0)
        made.add(name, total)
        made.mask(name, torch.stack(relevant(tau.unbind(), total, strengths)))
    return made.done(torch.ones(len(experts)))


def _places(every: Sequence[Tensor]) -> tuple[object, ...]:
    return tuple((t.data_ptr() or id(t), t.shape, t.stride()) for t in every)


def packed(masks: Tensor) -> Tensor:
    """bool [T, …] to uint8 [T, ⌈n / 8⌉]."""
    return torch.from_numpy(np.packbits(masks.reshape(len(masks), -1).cpu().numpy(), axis=1))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """uint8 [⌈n / 8⌉] to bool of `shape`, which has n elements."""
    size = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=size).astype(bool)).view(tuple(shape))


def _total(tau: Tensor) -> Tensor:
    """Σ|τ_t| over the elements, float64 [T]."""
    return tau.abs().reshape(len(tau), -1).sum(1, dtype=torch.float64)


def _strengths(strength: float | Sequence[float], count: int) -> list[float]:
    each = [float(strength)] * count if isinstance(strength, int | float) else [float(s) for s in strength]
    if len(each) != count or not all(s > 0 for s in each):
        raise InputError(f"strength {strength}: give a number above 0, or one for each of the {count} experts")
    return each


class _Making:
    """The parts of `Masks` while they are made, tensor by tensor."""

    def __init__(self, kind: Kind, base: State, experts: Mapping[str, State]) -> None:
        if not experts:
            raise InputError("no expert was given: name at least one")
        for task, state in experts.items():
            if odd := sorted(set(base) ^ set(state)):
                raise InputError(f"expert {task!r} and the base differ in {len(odd)} tensors, first {odd[0]!r}")
        self.kind, self.base, self.experts = kind, base, experts
        self.unified: dict[str, Tensor] = {}
        self.bits: dict[str, Tensor] = {}
        self.tied: dict[str, str] = {}

    def vectors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, τ float32 [T, …]) of each float tensor; a tensor that two names share in every model comes once."""
        first: dict[tuple[object, ...], str] = {}
        for name, own in self.base.items():
            every = [own, *(state[name] for state in self.experts.values())]
            if self._same(first, name, every) or not own.is_floating_point():
                continue
            for task, tensor in zip(self.experts, every[1:], strict=True):
                if tensor.shape != own.shape or not tensor.is_floating_point():
                    raise InputError(f"expert {task!r}: tensor {name!r} is not the base's in shape or kind")
                if not bool(torch.isfinite(tensor).all()):
                    raise InputError(f"expert {task!r}: tensor {name!r} holds NaN or Inf")
            yield name, torch.stack([tensor.detach().float() - own.detach().float() for tensor in every[1:]])

    def _same(self, first: dict[tuple[object, ...], str], name: str, every: Sequence[Tensor]) -> bool:
        key = _places(every)
        if (other := first.setdefault(key, name)) == name:
            return False
        # read again while `every` is alive: tensors made as they are read may take a freed one's place
        if _places([self.base[other], *(state[other] for state in self.experts.values())]) != key:
            return False
        self.tied[name] = other
        return True

    def add(self, name: str, unified: Tensor) -> Tensor:
        """Keep the shared vector of a tensor; returns it as kept (rounded to the base's dtype), float32."""
        self.unified[name] = unified.to(self.base[name].dtype)
        return self.unified[name].float()

    def mask(self, name: str, masks: Tensor) -> None:
        self.bits[name] = packed(masks)

    def done(self, rescale: Tensor) -> Masks:
        return Masks(self.kind, tuple(self.experts), self.unified, self.bits, rescale, self.tied)
