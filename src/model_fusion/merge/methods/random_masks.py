"""Random masks that are a function of (seed, tensor name, model index, element index) and of nothing else.

Each block of 65,536 elements gets two 32-bit keys from a cryptographic hash; within it a counter is mixed by
a 32-bit finaliser (xor-shift-multiply, Wellons' "lowbias32" constants). So any slice can be made alone, in
any order, on any thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 1 << 16


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Mixes in place; every input bit reaches every output bit."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


_COUNTER = _mix(np.arange(1, BLOCK + 1, dtype=np.uint32))


def _fill(counter: NDArray[np.uint32], first: np.uint32, second: np.uint32, out: NDArray[np.uint32]) -> None:
    np.bitwise_xor(counter, first, out=out)
    _mix(out)
    out += second


def uniform_bits(
    seed: int, name: str, model: int, start: int, count: int, *, fill: Callable[..., None] | None = None
) -> NDArray[np.uint32]:
    """uint32 values, uniform, for the flat elements start … start + count − 1.

    `fill` is a compiled function that does what numpy does here, for callers that have started the compiler anyway.
    """
    fill = fill or _fill
    out = np.empty(count, dtype=np.uint32)
    done = 0
    while done < count:
        block, offset = divmod(start + done, BLOCK)
        take = min(BLOCK - offset, count - done)
        text = f"{seed}\x00{name}\x00{model}\x00{block}".encode()
        first, second = np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), dtype="<u4")
        fill(_COUNTER[offset : offset + take], first, second, out[done : done + take])
        done += take
    return out


def kept(density: float, seed: int, name: str, model: int, start: int, count: int) -> Tensor:
    """int8 [count]: −1 (all bits set) where an element is kept, with probability `density`, else 0."""
    return kept_below(uniform_bits(seed, name, model, start, count), density)


def kept_below(drawn: NDArray[np.uint32], density: float) -> Tensor:
    """int8: −1 where a drawn value lies in the first `density` of the range, else 0."""
    if density >= 1.0:
        return torch.full((drawn.size,), -1, dtype=torch.int8)
    return as_mask(drawn < np.uint32(min(round(density * 2.0**32), 2**32 - 1)))


def as_mask(keep: NDArray[np.bool_]) -> Tensor:
    """int8: −1 where `keep`, else 0; overwrites `keep`."""
    ones = keep.view(np.int8)
    return torch.from_numpy(np.negative(ones, out=ones))


def apply_mask_(values: Tensor, mask: Tensor) -> Tensor:
    """Zeroes, in place, the float32 values whose mask is 0: a bitwise and, several times as fast as a fill."""
    values.view(torch.int32).bitwise_and_(mask.to(torch.int32))
    return values
