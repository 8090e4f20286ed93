"""Looking at models before they are merged: do they fit, how far are they from their base, how much do they conflict.

Streams tensor by tensor; only sums stay in memory. Prints nothing: the result is plain data.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from statistics import median
from typing import Any

from model_fusion.architecture.align import family, multimodal
from model_fusion.architecture.roles import role_of
from model_fusion.checkpoint.formats import TensorSpec
from model_fusion.checkpoint.lineage import licence_of
from model_fusion.checkpoint.reader import Checkpoint, open_model
from model_fusion.checkpoint.sources import resolve
from model_fusion.errors import InputError
from model_fusion.merge.findings import findings
from model_fusion.merge.measures import Overlap, Spectrum, Sums, empty, overlap_of, spectra, sums
from model_fusion.merge.ordered import ordered
from model_fusion.merge.prepare import aligned_with
from model_fusion.merge.spectrum import Leading
from model_fusion.tokenizer.compare import compare
from model_fusion.tokenizer.table import read_table

_WITHOUT_MATRIX = ("norm", "embedding")


@dataclass(frozen=True)
class Looked:
    """One model. vocabulary: tokens, or None; vocabulary_is: its relation to the base's (the first model's)."""

    model: str
    architecture: str | None
    tensors: int
    parameters: int
    bytes: int
    dtypes: list[str]
    vocabulary: int | None
    vocabulary_is: str | None
    licences: list[str | None]


@dataclass(frozen=True)
class Measured:
    """One tensor."""

    name: str
    file: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    sums: Sums
    spectra: list[Spectrum | None]
    overlaps: list[Overlap | None]


@dataclass
class Inspection:
    """models: the base last, where there is one. groups: "total", "by role", "by layer" → label → numbers."""

    models: list[Looked]
    base: str | None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def inspect(
    models: Sequence[str],
    base: str | None = None,
    *,
    with_spectra: bool = True,
    threads: int = 0,
    step: Callable[[int], object] = lambda total: None,
) -> Inspection:
    """Measure `models` beside `base`.

    **Arguments**
    with_spectra: whether to compute ranks and subspaces too (needs a base; most of the time).
    step: called after each tensor with the number of tensors.

    **Raises** `InputError` where a model cannot be opened, or no tensor is common to all.
    """
    if len(set(models)) < len(models) or base in models:
        raise InputError("a model is named twice")
    opened = [open_model(resolve(text)) for text in models]
    own = open_model(resolve(base)) if base is not None else None
    if own is None and len(opened) < 2:
        raise InputError("one model alone has nothing to be compared with: give --base, or a second model")
    named = next((c for c in [*([own] if own else []), *opened] if multimodal(c.config)), own or opened[0])
    opened = [aligned_with(checkpoint, named) for checkpoint in opened]
    own = aligned_with(own, named) if own else None
    everyone = [*opened, *([own] if own else [])]
    reference = own or opened[0]
    result = Inspection([_look(checkpoint, reference) for checkpoint in everyone], base)
    specs, result.problems = _common(everyone, reference)
    if not specs:
        raise InputError(f"no tensor is common to all: {'; '.join(result.problems[:3])}")

    def measure(spec: TensorSpec) -> Measured:
        return _measure(spec, opened, own, with_spectra)

    measured = []
    for one in ordered(measure, specs, threads):
        step(len(specs))
        measured.append(one)
    names = list(models)
    result.tensors = {
        one.name: _numbers([one], names) | {"shape": list(one.shape), "role": one.role} for one in measured
    }
    result.groups = {
        "total": {"all": _numbers(measured, names)},
        "by role": _grouped(measured, names, lambda one: one.role),
        "by layer": _grouped(measured, names, lambda one: "none" if one.layer is None else str(one.layer)),
    }
    result.warnings = findings(result.models, result.groups, result.tensors, names, base)
    return result


def _look(checkpoint: Checkpoint, reference: Checkpoint) -> Looked:
    specs = list(checkpoint)
    table, other = (read_table(c.files(), c.source.spec) for c in (checkpoint, reference))
    kinds = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")]
    adapter = checkpoint.source.adapter
    return Looked(
        model=checkpoint.source.spec,
        architecture=kinds[0],
        tensors=len(specs),
        parameters=sum(spec.nbytes // spec.dtype.itemsize for spec in specs),
        bytes=sum(spec.nbytes for spec in specs),
        dtypes=sorted({str(spec.dtype).removeprefix("torch.") for spec in specs}),
        vocabulary=len(table.ids) if table else None,
        vocabulary_is=str(compare(table.ids, other.ids)) if table and other else None,
        licences=[licence_of(folder) for folder in (checkpoint.folder, adapter) if folder],
    )


def _common(everyone: Sequence[Checkpoint], reference: Checkpoint) -> tuple[list[TensorSpec], list[str]]:
    """Float tensors that all have in one shape, in the reference's order; and what does not fit."""
    problems = []
    towers = any(multimodal(c.config) for c in everyone)
    kinds = {c.source.spec: family(c.config) if towers else c.config.get("model_type") for c in everyone}
    if len(set(kinds.values()) - {None}) > 1:
        problems.append("different architectures: " + ", ".join(f"{name} is {kind}" for name, kind in kinds.items()))
    own = reference.source.spec
    for checkpoint in everyone:
        if checkpoint is reference:
            continue
        name = checkpoint.source.spec
        absent = [n for n in reference.names if n not in checkpoint]
        extra = [n for n in checkpoint.names if n not in reference]
        shared = [n for n in reference.names if n in checkpoint]
        odd = [n for n in shared if checkpoint.spec(n).shape != reference.spec(n).shape]
        for which, found in ((f"not in {name}", absent), (f"not in {own}", extra), ("shapes differ", odd)):
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                problems.append(f"{name} and {own}: {which}: {found[0]}{more}")
    specs = [
        spec
        for spec in reference
        if spec.dtype.is_floating_point
        and spec.nbytes
        and all(spec.name in c and c.spec(spec.name).shape == spec.shape for c in everyone)
    ]
    return specs, problems


def _measure(spec: TensorSpec, models: Sequence[Checkpoint], base: Checkpoint | None, with_spectra: bool) -> Measured:
    tensors = [checkpoint.read(spec.name) for checkpoint in models]
    own = base.read(spec.name) if base else None
    totals = sums(tensors, own)
    role = role_of(spec.name, models[0].config)
    found: list[tuple[Spectrum, Leading] | None] = [None] * len(models)
    matrix = len(spec.shape) == 2 and min(spec.shape) > 1 and role.role not in _WITHOUT_MATRIX
    if with_spectra and own is not None and matrix and not any(totals.bad):
        seed = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:7])
        triples = [(w, totals.base, s) for w, s in zip(totals.weight, totals.square, strict=True)]
        found = spectra(tensors, own, triples, seed)
    overlaps = [overlap_of(a, b) if a and b else None for a, b in combinations(found, 2)]
    spectral = [entry[0] if entry else None for entry in found]
    bad = [c for c, count in zip([*models, *([base] if base else [])], totals.bad, strict=False) if count]
    file = str(bad[0].file_of(spec.name)) if bad else ""
    return Measured(spec.name, file, role.role, role.layer, spec.shape, totals, spectral, overlaps)


def _grouped(measured: Sequence[Measured], names: Sequence[str], label: Callable[[Measured], str]) -> dict[str, Any]:
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        groups.setdefault(label(one), []).append(one)
    order = sorted(groups, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0))
    return {key: _numbers(groups[key], names) for key in order}


def _numbers(measured: Sequence[Measured], names: Sequence[str]) -> dict[str, Any]:
    """A group's numbers: norms and cosines from summed sums, spectra as medians and energy-weighted means."""
    total = empty(len(names))
    for one in measured:
        total.add(one.sums)
    pairs = list(combinations(range(len(names)), 2))
    bad = [one for one in measured if any(one.sums.bad)]
    found: dict[str, Any] = {"tensors": len(measured), "parameters": total.numel, "not finite": sum(total.bad)}
    if bad:
        found["not finite in"] = [f"{one.file}: {one.name}" for one in bad]
    found["models"] = {name: _of_model(measured, total, i) for i, name in enumerate(names)}
    found["pairs"] = [
        {"models": [names[a], names[b]], **_of_pair(measured, total, i, a, b)} for i, (a, b) in enumerate(pairs)
    ]
    return found


def _of_model(measured: Sequence[Measured], total: Sums, i: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "norm": total.weight[i] ** 0.5,
        "delta norm": total.square[i] ** 0.5,
        "delta to base": _ratio(total.square[i] ** 0.5, total.base**0.5),
        "cosine to base": _ratio(total.onto_base[i], (total.weight[i] * total.base) ** 0.5),
        "peak to rms": _ratio(total.peak[i], (total.weight[i] / total.numel) ** 0.5 if total.numel else 0.0),
    }
    spectral = [(one.spectra[i], one.sums.square[i]) for one in measured]
    known = [(spectrum, energy) for spectrum, energy in spectral if spectrum]
    if known:
        ranks = [spectrum.rank for spectrum, _ in known]
        full = sum(rank is None for rank in ranks)
        found["rank"] = None if 2 * full > len(ranks) else median(rank for rank in ranks if rank is not None)
        found["matrices"], found["matrices of full rank"] = len(ranks), full
        found["energy in rank 16"] = sum(s.share * e for s, e in known) / sum(e for _, e in known)
        found["subspace error"] = median(spectrum.error for spectrum, _ in known)
    return found


def _of_pair(measured: Sequence[Measured], total: Sums, i: int, a: int, b: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "cosine": _ratio(total.dot[i], (total.square[a] * total.square[b]) ** 0.5),
        "sign conflict": _ratio(total.conflict[i], total.both[i]),
        "both changed": _ratio(total.both[i], total.numel),
    }
    known = [(one.overlaps[i], (one.sums.square[a] * one.sums.square[b]) ** 0.5) for one in measured]
    weighted = [(overlap, energy) for overlap, energy in known if overlap]
    if weighted:
        found["overlap of outputs"] = _mean([(o.outputs, energy) for o, energy in weighted])
        found["overlap of inputs"] = _mean([(o.inputs, energy) for o, energy in weighted])
        found["overlap error"] = _mean([(o.error, energy) for o, energy in weighted])
        found["overlap by chance"] = [_mean([(o.chance[side], energy) for o, energy in weighted]) for side in (0, 1)]
    return found


def _mean(weighted: Sequence[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in weighted) / sum(weight for _, weight in weighted)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
