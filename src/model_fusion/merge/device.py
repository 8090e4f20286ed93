"""Where tensors are combined and models run: is it there?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from model_fusion.errors import InputError


@contextmanager
def usable(device: str) -> Iterator[None]:
    """What torch says of a device inside the block, as an `InputError` that names `--device`."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {device!r} cannot be used here ({reason}): leave it out, or give cpu") from error


def check_device(device: str) -> None:
    """Raises `InputError` where tensors cannot be combined there."""
    with usable(device):
        torch.zeros(1, device=device).cpu()
