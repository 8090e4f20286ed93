"""Streams a plan's tensors into a checkpoint. Memory: views of the inputs, and one stacked MoE layer where a family
stores it so; the gates come first, so that a model loaded for calibration is gone before anything is written.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model_fusion.checkpoint import card, lineage
from model_fusion.checkpoint.output_folder import check_target
from model_fusion.checkpoint.reader import open_checkpoint
from model_fusion.checkpoint.small_files import small_files
from model_fusion.checkpoint.sources import resolve
from model_fusion.checkpoint.writer import CheckpointWriter, as_bytes
from model_fusion.errors import InputError
from model_fusion.mix import plan as planning
from model_fusion.mix.calibrate import calibrate
from model_fusion.mix.combine import combine, unchanged
from model_fusion.mix.plan import MixPlan, Output
from model_fusion.mix.room import Evidence, widen
from model_fusion.recipe.mix import MixRecipe, load, parse


@dataclass(frozen=True)
class Built:
    """What was written, the gate it starts with, and that gate's held-out accuracy per layer where it has one."""

    folder: Path
    plan: MixPlan
    gate: str
    gate_accuracy: list[float]


def plan(recipe: Path | MixRecipe | dict[str, Any], relative_to: Path | None = None) -> MixPlan:
    """Resolve and check everything; writes nothing. Paths are looked up from the recipe's folder as well."""
    folder = recipe.parent if isinstance(recipe, Path) else relative_to
    parsed = load(recipe) if isinstance(recipe, Path) else parse(recipe) if isinstance(recipe, dict) else recipe
    checkpoints = {name: open_checkpoint(resolve(name, folder)) for name in parsed.model_names()}
    return planning.build(parsed, checkpoints)


def build(
    recipe: Path | MixRecipe | dict[str, Any],
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    shard_size: int = 5 * 10**9,
) -> Built:
    """Mix as the recipe says and put an ordinary checkpoint at `output`.

    Raises `InputError` with nothing left behind; an interruption keeps a hidden partial folder for `resume`.
    """
    folder = recipe.parent if isinstance(recipe, Path) else None
    work = plan(recipe, folder)
    inputs = [c.folder for c in work.checkpoints.values()]
    inputs += [c.source.adapter for c in work.checkpoints.values() if c.source.adapter]
    check_target(output, inputs, overwrite=overwrite)
    started = calibrate(work, folder)
    gates, accuracy = dict(zip(work.mixed, started.gates, strict=True)), started.accuracy
    specs = [item.spec for item in work.outputs]
    with CheckpointWriter(output, specs, key=_key(work), shard_size=shard_size, resume=resume) as writer:
        for item in work.outputs:
            if item.spec.name not in writer.done:
                _write(item, work, writer, gates, started.evidence)
        for item in work.outputs:
            if unchanged(item, work.checkpoints):  # hashed once: the input is the output
                part = item.parts[0]
                writer.inputs_of[item.spec.name] = {f"{part.model}:{part.tensor}": writer.done[item.spec.name]}
        files = _files(work)
        files[lineage.NAME] = lineage.build(
            "mix",
            f"{work.family.model_type} mixture, {work.recipe.chosen_gate()} gates",
            _found_again(work.recipe, folder, output),
            list(work.checkpoints.values()),
            specs,
            writer.done,
            writer.inputs_of,
            files,
            command="model-fusion mix build recipe.yml -o out",
            defaults={},
            seed=work.recipe.seed,
            notes=notes(work, accuracy),
        )
        files[card.NAME] = card.build(files[lineage.NAME])
        writer.finish(files)
    return Built(output, work, work.recipe.chosen_gate(), accuracy)


def _found_again(recipe: MixRecipe, folder: Path | None, output: Path) -> dict[str, Any]:
    """The recipe for the record, its texts told from the output's parent: training and eval read them from there."""
    told: dict[str, Any] = recipe.model_dump(exclude_none=True, mode="json")
    for entry in told["experts"]:
        for i, name in enumerate(entry["texts"]):
            path = Path(name).expanduser()
            if not path.is_absolute():
                found = path if folder is None or path.exists() else folder / path
                entry["texts"][i] = os.path.relpath(found.resolve(), output.parent.resolve())
    return told


def _write(
    item: Output, work: MixPlan, writer: CheckpointWriter, gates: dict[int, torch.Tensor], evidence: Evidence | None
) -> None:
    with torch.inference_mode():
        if item.how == "gate":
            writer.write(item.spec.name, gates[item.layer].to(item.spec.dtype))
            return
        hashes = {}
        if not unchanged(item, work.checkpoints):
            for part in item.parts:
                for name, tensor in work.checkpoints[part.model].stored(part.tensor).items():
                    hashes[f"{part.model}:{name}"] = hashlib.sha256(as_bytes(tensor)).hexdigest()
        made = combine(item, work.checkpoints, work.recipe.seed)
        if work.room is not None and evidence is not None:
            made = widen(item.parts[0].tensor, made, work.room, evidence)
        if not _finite(made):
            where = ", ".join(f"{part.model}: {part.tensor}" for part in item.parts)
            raise InputError(f"NaN or Inf in {item.spec.name!r}, made of {where}")
        writer.write(item.spec.name, made, hashes)


def notes(work: MixPlan, accuracy: list[float]) -> list[str]:
    """What the card says about the mixture."""
    recipe, names = work.recipe, work.recipe.names()
    found = [
        f"{len(names)} experts ({', '.join(names)}), {recipe.top_k()} for a token, in {len(work.mixed)} layers.",
        f"Everything else: {recipe.trunk.replace('_', ' ')} of `base_model`.",
    ]
    if work.room is not None:
        found.append(
            f"Widened for gate prefix: hidden size {work.room.hidden} → {work.room.width}, attention heads "
            f"{work.room.heads} → {work.room.config()['num_attention_heads']}; without routing, the same function."
        )
    if recipe.chosen_gate() != "gateless" and not accuracy:
        found.append("The routers were not calibrated on text: measure them (`model-fusion mix eval`) before use.")
    if accuracy:
        mean = sum(accuracy) / len(accuracy)
        found.append(
            f"The routers name a token's domain with accuracy {mean:.3f} (mean over layers) on calibration text "
            "kept out of the fit, at the inputs of the dense trunk; in the mixture inputs depend on earlier routing."
        )
    return found


def _finite(tensor: torch.Tensor) -> bool:
    """A finite sum has finite terms: the exact test runs only where the cheap one fails."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def _files(work: MixPlan) -> dict[str, bytes]:
    folder = work.checkpoints[work.recipe.base_model].folder
    files = {name: (folder / name).read_bytes() for name in small_files(folder)}
    files["config.json"] = json.dumps(work.config, indent=2, ensure_ascii=False).encode() + b"\n"
    return files


def _key(work: MixPlan) -> str:
    """Identity of recipe and inputs, by size, time and inode of every file: a resumed run must find the same."""
    digest = hashlib.sha256(work.recipe.model_dump_json().encode())
    for name, checkpoint in work.checkpoints.items():
        folders = [checkpoint.folder, *([checkpoint.source.adapter] if checkpoint.source.adapter else [])]
        for file in [p for folder in folders for p in sorted(folder.iterdir()) if p.is_file()]:
            stat = file.stat()
            digest.update(repr((name, file.name, stat.st_size, stat.st_mtime_ns, stat.st_ino)).encode())
    return digest.hexdigest()
