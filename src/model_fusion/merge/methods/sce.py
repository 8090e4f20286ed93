"""sce: select by variance, calculate weights from energy, erase minority signs (Wan et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, check_unit, register
from model_fusion.merge.methods.blocks import BLOCK, parts, sizes
from model_fusion.merge.methods.compiled import kernel
from model_fusion.merge.methods.selection import LARGEST, Cut, Tally, cut_and_energy, halved
from model_fusion.merge.methods.task_arithmetic import agreeing_, elected_sign, flip_


@dataclass(frozen=True)
class SceParams:
    """select_topk: share of the elements with non-zero variance to keep."""

    select_topk: float = 1.0
    int8_mask: bool = False

    def __post_init__(self) -> None:
        check_unit("select_topk", self.select_topk)


def _compiled(name: str, tensor: Tensor) -> Any:
    return kernel(name) if tensor.device.type == "cpu" else None


def _tasks(models: Sequence[Tensor], base: Tensor) -> Tensor:
    """float32 [M, N], fresh: models − base, all flat."""
    out = torch.empty(len(models), base.numel(), device=base.device)
    narrow = all(t.dtype == torch.bfloat16 for t in (*models, base))
    if narrow and (difference := _compiled("difference", base)) is not None:
        below = base.view(torch.uint16).numpy()
        for model, row in zip(models, out, strict=True):
            difference(model.view(torch.uint16).numpy(), below, row.numpy())
        return out
    wide = base.float()
    for model, row in zip(models, out, strict=True):
        torch.sub(model.float(), wide, out=row)
    return out


def _variance(tasks: Tensor) -> Tensor:
    """float32 [N]: population variance across models, element by element."""
    if (compiled := _compiled("variance", tasks)) is not None:
        out = torch.empty(tasks.shape[1])
        compiled(tasks.numpy(), out.numpy())
        return out
    if len(tasks) == 2:
        return (tasks[0] - tasks[1]).mul_(0.5).square_()
    mean = tasks[0].clone()
    for task in tasks[1:]:
        mean += task
    mean /= len(tasks)
    out = torch.zeros_like(mean)
    for task in tasks:
        out += (task - mean).square_()
    return out.div_(len(tasks))


def _tally(spread: Tensor, tasks: Tensor, level: int) -> Tally:
    bits = spread.view(torch.int32)
    if (energy_of := _compiled("energy_of", tasks)) is not None:
        patterns, into = bits.numpy(), np.empty(bits.numel(), np.float32)
        sums = [
            [float(energy_of(task.numpy(), patterns, np.int32(low), np.int32(high), into)) for task in tasks]
            for low, high in ((level + 1, LARGEST), (level, level))
        ]
        return Tally(*kernel("counts")(patterns, np.int32(level)), *sums)
    # all bits set where a pattern is larger: the difference is then below zero
    at_least, above_it = ((limit - bits).bitwise_right_shift_(31) for limit in (level - 1, level))
    masks = torch.stack((above_it, at_least.bitwise_xor_(above_it)))
    above, ties = (-masks).sum(1).tolist()
    # a bitwise and is several times as fast as a fill
    chosen = (tasks.view(torch.int32) & masks[:, None]).view(torch.float32)
    energy = halved(chosen.square_().flatten(0, 1))
    return Tally(above, ties, int(torch.count_nonzero(bits)), energy[: len(tasks)], energy[len(tasks) :])


def _select(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: SceParams,
    key: Key,
) -> tuple[Cut | None, list[float]]:
    """The variance's cut (None: everything) and each model's weight."""
    assert base is not None
    flat, flat_base = [m.reshape(-1) for m in models], base.reshape(-1)
    n = flat_base.numel()

    def look(i: int, step: int) -> tuple[Tensor, Tensor]:
        part = slice(i * BLOCK, (i + 1) * BLOCK, step)
        tasks = _tasks([m[part].contiguous() for m in flat], flat_base[part].contiguous())
        return _variance(tasks), tasks

    cut: Cut | None = None
    if params.select_topk < 1.0:
        cut, energy = cut_and_energy(look, sizes(n), float(params.select_topk), _tally)
    else:
        energy = [0.0] * len(models)
        for part in parts(n):
            more = halved(_tasks([m[part] for m in flat], flat_base[part]).square_())
            energy = [a + b for a, b in zip(energy, more, strict=True)]
    means = [e / n for e in energy]
    whole = sum(means)
    if whole < 1e-6:
        return cut, [1.0 / len(models)] * len(models)
    return cut, [m / whole for m in means]


def _keep_selected_(tasks: Tensor, cut: Cut, start: int) -> None:
    """Zeroes, in place, what the variance's cut does not keep."""
    spread = _variance(tasks)
    compiled = _compiled("keep_selected", tasks)
    for part, limit in cut.limits(spread.numel(), start):
        here = spread[part]
        for task in tasks[:, part]:
            if compiled is not None:
                compiled(task.numpy(), here.numpy(), np.float32(limit))
            else:
                above = torch.hardshrink(here, limit).view(torch.int32).neg_().bitwise_right_shift_(31)
                task.view(torch.int32).bitwise_and_(above)


def _sce(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: SceParams,
    key: Key,
    state: tuple[Cut | None, list[float]],
    start: int,
) -> Tensor:
    """base + Σ(wδm) ÷ max(Σ(wm), 1e-6), m: δ's sign is the sum's."""
    assert base is not None
    cut, weights = state
    tasks, wide = _tasks(models, base), base.float()
    if cut is not None:
        _keep_selected_(tasks, cut, start)
    if (compiled := _compiled("add_agreeing", tasks)) is not None:
        out = torch.empty_like(wide)
        compiled(tasks.numpy(), np.array(weights, np.float32), wide.numpy(), out.numpy())
        return out
    sign = elected_sign(tasks.unbind())
    merged, share = torch.zeros_like(wide), torch.zeros_like(wide)
    for task, weight in zip(tasks, weights, strict=True):
        agreeing_(task, sign)
        share += task.sign().mul_(weight)
        merged += task.mul_(weight)
    return flip_(merged.div_(share.clamp_min_(1e-6)), sign).add_(wide)


register(Method("sce", Sees.TWO_PASS, SceParams, NoParams, "required", statistics=_select, chunk=_sce))
