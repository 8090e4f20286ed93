"""Streams a plan's output tensors through a method: threads over tensors, float32, hashes in cache.

Knows no YAML key and no tensor name. Memory: a thread holds a part of one output tensor and what the method
needs beside it (cache-sized chunks; for some methods a mask, for a few the whole inputs in float32).
"""

import hashlib
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model_fusion.checkpoint.ahead import Ahead
from model_fusion.checkpoint.reader import Checkpoint, place_of
from model_fusion.checkpoint.writer import as_bytes
from model_fusion.errors import InputError
from model_fusion.merge.findings import unequal
from model_fusion.merge.global_trim import find_cuts
from model_fusion.merge.methods import Key
from model_fusion.merge.methods.blocks import delta_square
from model_fusion.merge.methods.selection import Cut
from model_fusion.merge.plan import Input, MergePlan, Output

_PART = 1 << 20


class Sink(Protocol):
    """Where merged tensors go: a writer, memory, or a dry run's waste bin."""

    @property
    def done(self) -> Mapping[str, str]: ...
    def write_parts(self, name: str, parts: Iterable[Tensor], inputs: Mapping[str, str] | None = None) -> str: ...


class Run:
    """One execution of a plan: shared by its worker threads."""

    def __init__(
        self,
        work: MergePlan,
        writer: Sink,
        allow_nan: bool,
        device: str = "cpu",
        ahead: Ahead | None = None,
        hashed: bool = True,
    ) -> None:
        """`hashed` False leaves the inputs' hashes out, for a merge of which no lineage is kept."""
        self._hashed = hashed
        self._work, self._writer, self._allow_nan, self._device, self._ahead = work, writer, allow_nan, device, ahead
        self._every = work.every()
        self._bad: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._squares: dict[str, float] = {}
        self._cuts: dict[str, list[Cut]] = {}

    def all(self, order: list[Output], threads: int) -> None:
        """Make every tensor that is not yet done; the first error stops the rest."""
        if self._ahead is not None:
            self._ahead.stop()
        self._cuts = find_cuts(self._work, threads)
        todo = [item for item in order if item.spec.name not in self._writer.done]
        # one intra-op thread each: tensors are the parallelism, and sums do not depend on the machine's cores
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            for future in [pool.submit(self._one, item) for item in todo]:
                future.result()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        if self._bad:
            found = sorted(set(self._bad))
            more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
            raise InputError(f"NaN or Inf in {'; '.join(found[:20])}{more} (--allow-nan merges them anyway)")

    def warnings(self) -> list[str]:
        """What the tensors merged so far give reason to warn of."""
        return unequal({model: math.sqrt(square) for model, square in self._squares.items()})

    def _one(self, item: Output) -> None:
        if self._stop.is_set():
            return
        with torch.inference_mode():
            sources = [*item.inputs, *([item.base] if item.base else []), *item.data]
            tensors = [self._checkpoint(source).read(source.tensor) for source in sources]
            hashes, finite = {}, True
            for source in sources:
                for label, stored in self._checkpoint(source).stored(source.tensor).items():
                    hashes[f"{source.model}:{label}"], clean = self._digest(stored)
                    if not clean and not item.copied and not self._allow_nan:
                        self._bad.append(f"{self._checkpoint(source).file_of(source.tensor)}: {source.tensor}")
                        finite = False
            if finite:
                parts = (
                    iter([tensors[0].to(item.spec.dtype).reshape(-1)]) if item.copied else self._merged(item, tensors)
                )
                self._writer.write_parts(item.spec.name, parts, hashes)

    def _digest(self, tensor: Tensor) -> tuple[str, bool]:
        """SHA-256 of a tensor's bytes, and whether all its values are finite, in one pass."""
        place = place_of.get(tensor)
        known = None
        if self._ahead is not None and place is not None:
            known = self._ahead.digest(place.file, place.begin, place.end)
        digest, clean = hashlib.sha256(), True
        for part in torch.split(tensor.contiguous().reshape(-1), _PART):
            if known is None and self._hashed:
                digest.update(as_bytes(part))
            clean = clean and finite(part)
        return known or digest.hexdigest(), clean

    def _checkpoint(self, source: Input) -> Checkpoint:
        return self._every[source.model]

    def _merged(self, item: Output, tensors: list[Tensor]) -> Iterator[Tensor]:
        tensors = [tensor.to(self._device) for tensor in tensors]
        count = len(item.inputs)
        models, base = tensors[:count], tensors[count] if item.base else None
        data = tensors[-count:] if item.data else None
        cuts = self._cuts.get(item.spec.name)
        key = Key(self._work.recipe.seed, item.spec.name, cuts=cuts, depth=item.depth, rows=item.rows, data=data)
        method = self._work.method
        if method.equal_norms and base is not None:
            self._measure(item, models, base)
        for part in method.stream(models, base, item.model_params, item.params, key, item.spec.dtype):
            if not self._allow_nan and not finite(part):
                kind = str(item.spec.dtype).removeprefix("torch.")
                raise InputError(
                    f"{method.name} made NaN or Inf in {item.spec.name!r} ({kind}): check weights "
                    "and dtype, or pass --allow-nan"
                )
            yield part.cpu()

    def _measure(self, item: Output, models: list[Tensor], base: Tensor) -> None:
        """Adds up ‖wτ‖² of each model."""
        for source, model, own in zip(item.inputs, models, item.model_params, strict=True):
            square = own.weight**2 * delta_square(model, base)
            with self._lock:
                self._squares[source.model] = self._squares.get(source.model, 0.0) + square


_EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}


def finite(flat: Tensor) -> bool:
    """Whether a flat tensor holds neither NaN nor Inf: no exponent is all ones."""
    if not flat.is_floating_point():
        return True
    if flat.dtype.itemsize == 1:  # FP8: torch has no isfinite for it
        flat = flat.float()
    if flat.dtype not in _EXPONENT or flat.device.type != "cpu":
        return bool(torch.isfinite(flat).all())
    ones = _EXPONENT[flat.dtype]
    kind = np.dtype(f"u{flat.dtype.itemsize}")
    # without its sign bit, a pattern is as large as its value
    patterns = flat.view(torch.int16 if kind.itemsize == 2 else torch.int32).numpy().view(kind)
    return patterns.size == 0 or int(np.left_shift(patterns, kind.type(1)).max()) < 2 * ones
