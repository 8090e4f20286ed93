"""Random masks that are a function of (seed, tensor name, model index, element index) and of nothing else.

Each block of 65,536 elements gets two 32-bit keys from a cryptographic hash; within it a counter is mixed by
a 32-bit finaliser (xor-shift-multiply, Wellons' "lowbias32" constants). So any slice can be made alone, in
any order, on any thread.
"""

from __future__ import annotations

import hashlib

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


def uniform_bits(seed: int, name: str, model: int, start: int, count: int) -> NDArray[np.uint32]:
    """uint32 values, uniform, for the flat elements start … start + count − 1."""
    out = np.empty(count, dtype=np.uint32)
    done = 0
    while done < count:
        block, offset = divmod(start + done, BLOCK)
        take = min(BLOCK - offset, count - done)
        text = f"{seed}\x00{name}\x00{model}\x00{block}".encode()
        first, second = np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), dtype="<u4")
        part = out[done : done + take]
        np.bitwise_xor(_COUNTER[offset : offset + take], first, out=part)
        _mix(part)
        part += second
        done += take
    return out


def dropped(density: float, seed: int, name: str, model: int, start: int, count: int) -> Tensor:
    """bool [count]: True where an element is dropped, with probability 1 − density."""
    if density >= 1.0:
        return torch.zeros(count, dtype=torch.bool)
    limit = np.uint32(min(round(density * 2.0**32), 2**32 - 1))
    return torch.from_numpy(uniform_bits(seed, name, model, start, count) >= limit)
