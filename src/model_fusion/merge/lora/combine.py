"""Several adapters of one base as one adapter, without the base."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import torch
from torch import Tensor

from model_fusion.checkpoint import adapter_config
from model_fusion.checkpoint.adapter import PREFIX, WEIGHTS, Adapter, Pair
from model_fusion.checkpoint.appending import AppendingWriter
from model_fusion.checkpoint.formats import TensorSpec
from model_fusion.checkpoint.output_folder import check_target
from model_fusion.checkpoint.reader import Checkpoint, map_tensor
from model_fusion.checkpoint.sources import Source, resolve
from model_fusion.checkpoint.writer import as_bytes
from model_fusion.errors import InputError
from model_fusion.merge.lora.factors import Factors, Wanted, average, join, retruncate
from model_fusion.merge.lora.record import finish
from model_fusion.merge.ordered import ordered

_NOTES = {
    "cat": "The products sum exactly: the matrices stand side by side.",
    "svd": "The exact sum of the products, cut to a lower rank by its singular values.",
    "linear": "A and B were averaged apart, which is not the sum of the products: it has cross terms.",
}


@dataclass
class Combined:
    """What was made: module → rank, and module → share of the exact sum's energy that is kept (1 for cat)."""

    folder: Path
    ranks: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)


def combine(
    adapters: Sequence[str],
    output: Path,
    weights: Sequence[float] = (),
    mode: str = "cat",
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: str | None = None,
    overwrite: bool = False,
    threads: int = 0,
) -> Combined:
    """Write Σ weight · (the adapters' products) to `output`; without weights, their mean.

    **Arguments**
    mode: cat is exact, of the ranks' sum; svd keeps `rank` (default: the largest rank given) or `energy` of that
        sum; linear averages A and B apart as peft's "linear" does (cross terms, equal ranks).
    base: the base's name, where the adapters name different ones.

    **Raises** `InputError` where the adapters do not belong together.
    """
    if mode not in _NOTES:
        raise InputError(f"mode {mode!r}: give cat, svd or linear")
    if mode != "svd" and (rank is not None or energy is not None):
        raise InputError(f"rank and energy belong to mode svd, not to {mode}")
    if len(adapters) < 2 or len(set(adapters)) != len(adapters):
        raise InputError("give two or more different adapters")
    factors = list(weights) or [1 / len(adapters)] * len(adapters)
    if len(factors) != len(adapters) or not all(math.isfinite(w) for w in factors):
        raise InputError(f"{len(adapters)} adapters but weights {', '.join(f'{w:g}' for w in factors)}")
    opened = [Adapter(resolve(text).folder) for text in adapters]
    check_target(output, [adapter.folder for adapter in opened], overwrite=overwrite)
    name = _base(adapters, opened, base)
    modules = _modules(adapters, opened)
    if mode == "svd":
        most = None if rank is None and energy is not None else rank or max(_ranks(opened))
        wanted = Wanted(most, energy, True)
    result = Combined(output)

    def make(module: str) -> tuple[str, Factors, dict[str, str]]:
        parts, hashes = [], {}
        for text, adapter, weight in zip(adapters, opened, factors, strict=True):
            pair = adapter.pairs.get(module)
            if pair is not None:
                a, b = pair.factors()
                parts.append((a, b, weight * pair.scale))
                for entry in (pair.a, pair.b):
                    hashes[f"{text}:{entry.name}"] = hashlib.sha256(as_bytes(map_tensor(entry))).hexdigest()
        if not all(bool(torch.isfinite(tensor).all()) for a, b, _ in parts for tensor in (a, b)):
            raise InputError(f"NaN or Inf in the matrices of {module!r}")
        return module, _product(parts, mode, wanted if mode == "svd" else None), hashes

    with AppendingWriter(output, WEIGHTS, _largest(opened, modules)) as writer:
        for module, made, hashes in ordered(make, modules, threads):
            if made.rank:
                result.ranks[module], result.shares[module] = made.rank, made.share
                for part, tensor in (("A", made.a), ("B", made.b)):
                    writer.append(_key(module, modules[module], part), tensor, hashes)
        settings = {"weights": [float(w) for w in factors], "mode": mode, "rank": rank, "energy": energy, "base": name}
        config = adapter_config.build(
            result.ranks,
            sorted(result.ranks),
            base=name or "",
            causal=all(adapter.config.get("task_type") == "CAUSAL_LM" for adapter in opened),
            transposed=any(bool(adapter.config.get("fan_in_fan_out")) for adapter in opened),
        )
        finish(
            writer,
            "lora merge",
            list(adapters),
            {"adapters": list(adapters), **{key: value for key, value in settings.items() if value is not None}},
            [Checkpoint(Source(text, a.folder)) for text, a in zip(adapters, opened, strict=True)],
            config,
            [_NOTES[mode]],
        )
    return result


def _base(names: Sequence[str], adapters: Sequence[Adapter], given: str | None) -> str | None:
    """The base they share; paths count as one where their last parts agree."""
    if given is not None:
        return given
    bases = [str(adapter.config.get("base_model_name_or_path") or "") for adapter in adapters]
    first = next((base for base in bases if base), None)
    for name, base in zip(names, bases, strict=True):
        if base and first and PurePath(base).name != PurePath(first).name:
            raise InputError(
                f"adapters of different bases: {first!r} and {base!r} ({name}); --base says what they share"
            )
    return first


def _modules(names: Sequence[str], adapters: Sequence[Adapter]) -> dict[str, Pair]:
    """Every module that some adapter changes; each one's shapes checked."""
    found: dict[str, Pair] = {}
    for name, adapter in zip(names, adapters, strict=True):
        if adapter.saved:
            whole = next(iter(adapter.saved))
            raise InputError(f"{name} holds whole tensors ({whole!r}): merge base+adapter models by a recipe instead")
        for module, pair in adapter.pairs.items():
            other = found.setdefault(module, pair)
            if other.shape != pair.shape or other.embedding != pair.embedding:
                raise InputError(f"{name}: {module!r} is {pair.shape}, {other.shape} in another: not of one base")
    return found


def _ranks(adapters: Sequence[Adapter]) -> list[int]:
    return [pair.rank for adapter in adapters for pair in adapter.pairs.values()]


def _key(module: str, pair: Pair, part: str) -> str:
    return f"{PREFIX}{module}." + (f"lora_embedding_{part}" if pair.embedding else f"lora_{part}.weight")


def _largest(adapters: Sequence[Adapter], modules: dict[str, Pair]) -> list[TensorSpec]:
    specs = []
    for module, pair in modules.items():
        rank = sum(adapter.pairs[module].rank for adapter in adapters if module in adapter.pairs)
        specs.append(TensorSpec(_key(module, pair, "A"), torch.float32, (rank, pair.shape[1])))
        specs.append(TensorSpec(_key(module, pair, "B"), torch.float32, (pair.shape[0], rank)))
    return specs


def _product(parts: Sequence[tuple[Tensor, Tensor, float]], mode: str, wanted: Wanted | None) -> Factors:
    a, b = join(parts)
    if wanted is not None:
        return retruncate(a, b, wanted)
    if mode == "cat":
        return Factors(a.contiguous(), b.contiguous(), 1.0, 1.0)
    one, two = average(parts)
    # energy of the exact sum, and of what this product misses of it: both from the small matrices
    total = _energy(a, b)
    missed = _energy(torch.cat([a, one]), torch.cat([b, -two], dim=1))
    return Factors(one.contiguous(), two.contiguous(), max(total - missed, 0.0), total)


def _energy(a: Tensor, b: Tensor) -> float:
    """‖B A‖² = tr((BᵀB)(AAᵀ)), in float64."""
    return float(((b.double().T @ b.double()) * (a.double() @ a.double().T)).sum())
