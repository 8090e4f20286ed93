"""A fine-tune's difference from its base as a LoRA adapter that peft loads; what does not fit is told, not dropped."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model_fusion.architecture.roles import role_of
from model_fusion.checkpoint import adapter_config
from model_fusion.checkpoint.adapter import PREFIX, WEIGHTS
from model_fusion.checkpoint.appending import AppendingWriter
from model_fusion.checkpoint.formats import TensorSpec
from model_fusion.checkpoint.output_folder import check_target
from model_fusion.checkpoint.reader import open_model
from model_fusion.checkpoint.sources import resolve
from model_fusion.errors import InputError
from model_fusion.merge.lora.factors import Factors, Wanted, truncate
from model_fusion.merge.lora.layout import is_causal, is_linear, target_names
from model_fusion.merge.lora.pair import HEAD, Pair
from model_fusion.merge.lora.record import finish
from model_fusion.merge.ordered import ordered

_FUSED = "experts and routers are no linear layers in transformers 5"
_WHOLE = "not a linear layer; --save-rest keeps it whole"


@dataclass(frozen=True)
class Kept:
    """One tensor of the adapter: `share` of its difference's energy that B A, as stored, holds."""

    name: str
    rank: int
    share: float
    energy: float


@dataclass(frozen=True)
class Left:
    """One changed tensor that the adapter does not hold, why, and ‖difference‖ / ‖base‖ (None: not compared)."""

    name: str
    why: str
    change: float | None


@dataclass
class Extracted:
    """What was made. `saved`: modules kept whole."""

    folder: Path
    kept: list[Kept] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Kept energy of all tensors that have matrices, as a share."""
        total = sum(kept.energy for kept in self.kept)
        return sum(kept.energy * kept.share for kept in self.kept) / total if total else 1.0


def extract(
    finetune: str,
    base: str,
    output: Path,
    wanted: Wanted,
    *,
    save_rest: bool = False,
    exclude: Sequence[str] = (),
    dtype: str = "float32",
    overwrite: bool = False,
    threads: int = 0,
    step: Callable[[int], object] = lambda total: None,
) -> Extracted:
    """Write the adapter to `output`.

    **Arguments**
    save_rest: keep changed embeddings, norms and biases whole (peft's modules_to_save).
    exclude: parts of tensor names to leave out. dtype: of the stored matrices. `step` is called after each
        tensor with the number of tensors.

    **Raises** `InputError` where the two differ in names or shapes, hold NaN, or are equal.
    """
    kind = getattr(torch, dtype, None)
    if kind not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"dtype {dtype!r}: give float32, float16 or bfloat16")
    pair = Pair(open_model(resolve(finetune)), open_model(resolve(base)), exclude)
    sources = [checkpoint.source for checkpoint in (pair.tuned, pair.base)]
    check_target(output, [p for s in sources for p in (s.folder, s.adapter) if p], overwrite=overwrite)
    result = Extracted(output)
    whole = _rest(pair, save_rest, result)
    linear = [spec for spec in pair.specs if _is_linear(pair, spec) and pair.module(spec.name) not in whole]
    saved = [spec.name for spec in pair.specs if pair.module(spec.name) in whole]

    def make(spec: TensorSpec) -> tuple[TensorSpec, Factors, dict[str, str]]:
        delta = pair.delta(spec.name)
        if role_of(spec.name, pair.base.config).transposed:
            delta = delta.T.contiguous()
        seed = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:7])
        return spec, _stored(delta, truncate(delta, wanted, seed), kind), pair.hashes(spec.name)

    largest = [TensorSpec(f"{_key(pair, s)}.lora_{part}.weight", kind, s.shape) for s in linear for part in "AB"]
    largest += [_renamed(pair.tuned_spec(name), PREFIX + pair.path(name)) for name in saved]
    with AppendingWriter(output, WEIGHTS, largest) as writer:
        for spec, factors, hashes in ordered(make, linear, threads):
            step(len(linear))
            if factors.rank:
                result.kept.append(Kept(spec.name, factors.rank, factors.share, factors.total))
                writer.append(f"{_key(pair, spec)}.lora_A.weight", factors.a, hashes)
                writer.append(f"{_key(pair, spec)}.lora_B.weight", factors.b, hashes)
        for name in saved:
            writer.append(PREFIX + pair.path(name), pair.read(pair.tuned, name), pair.hashes(name))
        if not writer.done:
            raise InputError(f"{finetune} and {base} differ in nothing that an adapter can hold")
        result.saved = sorted(whole)
        _finish(writer, pair, result, _settings(wanted, save_rest, exclude, dtype))
    return result


def _is_linear(pair: Pair, spec: TensorSpec) -> bool:
    """A head that the base ties is no layer of its own: a LoRA on it would untie the two."""
    return is_linear(spec, pair.base.config) and not (pair.embedding and spec.name == HEAD)


def _rest(pair: Pair, save: bool, result: Extracted) -> set[str]:
    """Modules to keep whole; what changed and cannot be kept goes to `result.left`."""
    whole: set[str] = set()
    result.left = [Left(name, "excluded", None) for name in pair.excluded]
    for spec in pair.specs:
        if _is_linear(pair, spec) or not pair.changed(spec.name):
            continue
        if role_of(spec.name, pair.base.config).role in ("expert", "router"):
            result.left.append(Left(spec.name, _FUSED, pair.change(spec.name)))
        elif save:
            whole.add(pair.module(spec.name))
        elif spec.name in pair.base or not pair.ties_alike:
            result.left.append(Left(spec.name, _WHOLE, pair.change(spec.name)))
    return whole


def _stored(delta: Tensor, factors: Factors, dtype: torch.dtype) -> Factors:
    """The factors as they are written, with the energy that these still hold."""
    a, b = factors.a.to(dtype), factors.b.to(dtype)
    lost = torch.addmm(delta, b.float(), a.float(), alpha=-1)
    left = sum(float(part.double().square().sum()) for part in torch.split(lost.reshape(-1), 1 << 20))
    return Factors(a, b, max(factors.total - left, 0.0), factors.total)


def _key(pair: Pair, spec: TensorSpec) -> str:
    return PREFIX + pair.module(spec.name)


def _renamed(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name, spec.dtype, spec.shape)


def _settings(wanted: Wanted, save_rest: bool, exclude: Sequence[str], dtype: str) -> dict[str, object]:
    given = {"rank": wanted.rank, "energy": wanted.energy, "dtype": dtype, "exclude": list(exclude)}
    if wanted.exact is not None:
        given["svd"] = "exact" if wanted.exact else "randomized"
    return {**{key: value for key, value in given.items() if value}, **({"save-rest": True} if save_rest else {})}


def _finish(writer: AppendingWriter, pair: Pair, result: Extracted, settings: dict[str, object]) -> None:
    config = pair.base.config
    ranks = {pair.module(kept.name): kept.rank for kept in result.kept}
    every = [pair.module(name) for name in pair.base.names]
    base = pair.base.source.spec
    files = adapter_config.build(
        ranks,
        target_names(ranks, every),
        base=base,
        causal=is_causal(config),
        transposed=any(role_of(kept.name, config).transposed for kept in result.kept),
        saved=result.saved,
    )
    notes = [f"The matrices hold {result.share:.4f} of the squared norm of the differences they stand for."]
    notes += [f"Not held: `{left.name}` ({left.why})." for left in result.left]
    recipe = {"finetune": pair.tuned.source.spec, "base": base, **settings}
    finish(writer, "lora extract", [pair.tuned.source.spec], recipe, [pair.tuned, pair.base], files, notes)
