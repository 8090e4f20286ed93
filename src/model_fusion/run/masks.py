"""Masks from checkpoints to a folder, and from that folder one expert's ordinary checkpoint; with lineage and card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_fusion.checkpoint import card, lineage
from model_fusion.checkpoint.output_folder import check_target
from model_fusion.checkpoint.reader import Checkpoint, open_checkpoint, read_json
from model_fusion.checkpoint.record import record
from model_fusion.checkpoint.sources import Source, resolve
from model_fusion.checkpoint.state import State, inputs_of
from model_fusion.checkpoint.whole_folder import whole_folder
from model_fusion.checkpoint.writer import CheckpointWriter
from model_fusion.dynamic.mask_file import BITS, UNIFIED, load_masks, save_masks
from model_fusion.dynamic.masks import emr, tall
from model_fusion.errors import InputError

FILE = "masks.safetensors"
KINDS = ("emr", "tall")


@dataclass(frozen=True)
class Masked:
    """What was written: bytes of the shared vector, the masks and the factors; and of all experts whole."""

    folder: Path
    bytes: dict[str, int]
    experts_bytes: int


def write_masks(
    base: str,
    experts: Mapping[str, str],
    output: str | Path,
    *,
    kind: str = "emr",
    strength: float | Sequence[float] | None = None,
    overwrite: bool = False,
) -> Masked:
    """One shared task vector and a mask for each expert, as a folder. It holds one model's worth in memory.

    **Arguments**
    base, experts: models as a merge recipe names them; `experts` maps each task's id to its model.
    kind: emr or tall. strength: of TALL's masks (0.4), one for all or one for each expert, in their order.

    **Raises** InputError.
    """
    if kind not in KINDS:
        raise InputError(f"kind {kind!r}: give {' or '.join(KINDS)}")
    if kind == "emr" and strength is not None:
        raise InputError("strength belongs to kind tall: EMR has none")
    output = Path(output)
    root = State(open_checkpoint(resolve(base)))
    tuned = {task: State(open_checkpoint(resolve(model))) for task, model in experts.items()}
    every = [root, *tuned.values()]
    places = [place for state in every for place in state.checkpoint.source.places]
    check_target(output, places, overwrite=overwrite)
    chosen = 0.4 if strength is None else strength
    made = emr(root, tuned) if kind == "emr" else tall(root, tuned, chosen)
    settings: dict[str, Any] = {"base": base, "experts": dict(experts), "kind": kind}
    words = [f"{task}={model}" for task, model in experts.items()] + ["--base", base, "--kind", kind]
    if kind == "tall":
        settings["strength"] = chosen
        for one in [chosen] if isinstance(chosen, int | float) else chosen:
            words += ["--strength", f"{one:g}"]
    with whole_folder(output, places, overwrite=overwrite) as work:
        save_masks(made, root, work / FILE)
        record(
            work,
            "masks",
            kind,
            settings,
            [state.checkpoint for state in every],
            lambda name: inputs_of(name.partition("/")[2], every),
            {},
            command=shlex.join(["model-fusion", "dynamic", "masks", *words, "-o", "out"]),
            notes=[
                f"A shared task vector and a mask for each of {', '.join(made.tasks)}. No model by itself: "
                "`model-fusion dynamic unmask` writes the one of a task, whose id must be given."
            ],
        )
    whole = sum(spec.nbytes for state in tuned.values() for spec in state.checkpoint)
    return Masked(output, made.nbytes, whole)


def unmask(
    folder: str | Path,
    task: str,
    output: str | Path,
    *,
    base: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> Path:
    """The ordinary checkpoint of one task, tensor by tensor, in the base's dtypes.

    **Arguments**
    folder: what `write_masks` wrote. base: where the base is now, if not where it was. tokenizer: the model whose
        tokenizer, chat template and generation config the output takes; the base unless given.

    **Raises** InputError; IntegrityError where the masks were changed or belong to another base.
    """
    folder, output = Path(folder), Path(output)
    if not (folder / FILE).is_file():
        raise InputError(f"{folder}: no {FILE} here; expected the output of `model-fusion dynamic masks`")
    if base is None:
        base = _base_of(folder)
    root = State(open_checkpoint(resolve(base, folder.resolve().parent)))
    files = root.checkpoint.files() if tokenizer is None else open_checkpoint(resolve(tokenizer)).files()
    places = [folder, *root.checkpoint.source.places]
    check_target(output, places, overwrite=overwrite)
    masks = load_masks(folder / FILE, root)
    number = masks.number(task)
    own = State(Checkpoint(Source(str(folder), folder)))
    specs = [spec for spec in root.checkpoint if spec.name in root]
    settings = {"masks": str(folder), "task": task, **({"tokenizer": tokenizer} if tokenizer else {})}
    words = [str(folder), *(["--tokenizer", tokenizer] if tokenizer else []), "--task", task]
    with CheckpointWriter(output, specs, key="") as writer:
        for spec in specs:
            kept = masks.tied.get(spec.name, spec.name)
            sources = {**inputs_of(spec.name, [root]), **_read(own, kept)}
            writer.write(spec.name, masks.tensor(kept, root[spec.name], number).to(spec.dtype), sources)
        if root.checkpoint.config:
            config = json.dumps(root.checkpoint.config, indent=2, ensure_ascii=False)
            files["config.json"] = config.encode() + b"\n"
        files[lineage.NAME] = lineage.build(
            "unmasked",
            masks.kind,
            settings,
            [root.checkpoint, own.checkpoint],
            specs,
            writer.done,
            writer.inputs_of,
            files,
            command=shlex.join(["model-fusion", "dynamic", "unmask", *words, "-o", "out"]),
            defaults={},
            notes=[f"The model of task {task!r} alone, brought back by its mask."],
        )
        files[card.NAME] = card.build(files[lineage.NAME])
        writer.finish(files)
    return output


def _base_of(folder: Path) -> str:
    """As it was called when the masks were made."""
    if not (folder / lineage.NAME).is_file():
        raise InputError(f"{folder}: no {lineage.NAME}, so the base is not known: give --base")
    return str(read_json(folder / lineage.NAME)["recipe"]["base"])


def _read(masks: State, name: str) -> dict[str, str]:
    """Hashes of what the masks hold of one tensor; each is read once more for it."""
    found: dict[str, str] = {}
    for key in (UNIFIED + name, BITS + name):
        if key in masks.checkpoint:
            masks[key]
            found |= inputs_of(key, [masks])
    return found
