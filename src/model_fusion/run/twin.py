"""A twin recipe carried out: shared model merged, parts cut, router trained, folder written with lineage and card."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from model_fusion.checkpoint.llm import hash_files, weight_files
from model_fusion.checkpoint.output_folder import check_target
from model_fusion.checkpoint.reader import Checkpoint, open_checkpoint, read_json
from model_fusion.checkpoint.record import record
from model_fusion.checkpoint.small_files import small_files
from model_fusion.checkpoint.sources import Source, resolve
from model_fusion.checkpoint.state import State, inputs_of
from model_fusion.checkpoint.whole_folder import whole_folder
from model_fusion.dynamic import MODEL_TYPE
from model_fusion.dynamic.build import Built, build
from model_fusion.dynamic.parts import exclusive
from model_fusion.dynamic.saving import CONFIG, SHARED, write_twin
from model_fusion.errors import InputError
from model_fusion.merge.engine import merge
from model_fusion.recipe import merge as merging
from model_fusion.recipe.twin import TwinRecipe, load, parse
from model_fusion.report.progress import bar
from model_fusion.run.load import open_checkpoint as open_folder
from model_fusion.training.texts import documents


@dataclass(frozen=True)
class Twinned:
    """What was written: bytes of the shared model, the experts' parts and the router; of all experts whole; and the
    router's share of right choices on validation text."""

    folder: Path
    bytes: dict[str, int]
    experts_bytes: int
    router_accuracy: float


def twin(
    recipe: str | Path | Mapping[str, Any] | TwinRecipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Twinned:
    """Build a twin as the recipe (a file, its content, or a `TwinRecipe`) says. The folder is complete or not there.

    Raises InputError; everything that can be is checked before the first byte is written.
    """
    if isinstance(recipe, (str, Path)):
        recipe = load(Path(recipe))
    elif not isinstance(recipe, TwinRecipe):
        recipe = parse(dict(recipe))
    output = Path(output)
    sources = [resolve(expert.model) for expert in recipe.experts]
    experts = [State(open_checkpoint(source)) for source in sources]
    texts = {expert.name: documents(expert.texts) for expert in recipe.experts}
    wanted = merging.parse(recipe.merge_recipe(), "shared")
    inputs = [place for source in sources for place in source.places]
    check_target(output, inputs, overwrite=overwrite)
    logging.disable_progress_bar()
    with whole_folder(output, inputs, overwrite=overwrite) as work:
        merge(wanted, work / SHARED)
        shared = State(Checkpoint(Source(str(work / SHARED), work / SHARED)))
        with bar("cutting parts") as cut:
            parts = exclusive(shared, experts, recipe.rank, step=lambda: cut(len(shared)))
        try:
            model = AutoModelForCausalLM.from_pretrained(work / SHARED, dtype="auto", trust_remote_code=False).eval()
            tokenizer = AutoTokenizer.from_pretrained(work / SHARED, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(f"the shared model is no causal LM ({str(error).splitlines()[0]})") from None
        hashes = {e.name: hash_files(_files(s)) for e, s in zip(recipe.experts, sources, strict=True)}
        record = {"recipe": recipe.model_dump(by_alias=True, exclude_none=True), "experts_sha256": hashes}
        with bar("reading texts") as read:
            made = build(
                model, tokenizer, parts, texts, recipe.router,
                seed=recipe.seed, built=record, step=read, progress=progress,
            )  # fmt: skip
        for name in small_files(work / SHARED):
            (work / name).write_bytes((work / SHARED / name).read_bytes())
        write_twin(work, made.twin)
        _record(work, recipe, experts, made)
    whole = sum(spec.nbytes for expert in experts for spec in expert.checkpoint)
    if made.validation < 0.5:
        warnings.warn(f"the router is right on {made.validation:.0%} of the validation text: give more", stacklevel=2)
    return Twinned(output, made.twin.bytes(), whole, made.validation)


def route(folder: str | Path, prompts: Sequence[str]) -> list[dict[str, float]]:
    """For each prompt the experts' weights, likeliest first, as `model-fusion generate` weighs them.

    Raises InputError where the folder holds no twin with a router."""
    folder = Path(folder)
    if not prompts:
        raise InputError("no prompt: give at least one with --prompt")
    if not (folder / CONFIG).is_file() or read_json(folder / CONFIG).get("model_type") != MODEL_TYPE:
        raise InputError(f"{folder}: no twin here; expected the output of `model-fusion dynamic twin`")
    opened = open_folder(folder)
    batch = opened.processor(list(prompts))
    found = opened.base.route(batch["input_ids"], batch["attention_mask"]).tolist()
    named = (zip(opened.base.config.experts, row, strict=True) for row in found)
    return [dict(sorted(row, key=lambda item: -item[1])) for row in named]


def _record(work: Path, recipe: TwinRecipe, experts: Sequence[State], made: Built) -> None:
    """Lineage and card of the folder's own tensors; `shared/` has those of the merge that made it."""
    files = {name: (work / name).read_bytes() for name in (CONFIG, *small_files(work))}
    names = ", ".join(expert.name for expert in recipe.experts)
    notes = [
        f"A twin of {names}: the shared model of `{SHARED}/`, beyond it each expert's leading singular directions "
        f"(rank {recipe.rank:g} of each matrix's smaller side), and a router that weighs them by the prompt.",
        f"The router is right on {made.validation:.1%} of the validation text, by which its step was chosen.",
        "No stock architecture: open it with model-fusion.",
    ]
    record(
        work,
        "twin",
        "twin",
        recipe.model_dump(by_alias=True, exclude_none=True),
        [expert.checkpoint for expert in experts],
        lambda name: inputs_of(name.rpartition(":")[0], experts),
        files,
        command="model-fusion dynamic twin recipe.yml -o out",
        seed=recipe.seed,
        notes=notes,
        parts=[SHARED],
    )


def _files(source: Source) -> list[Path]:
    found: list[Path] = []
    for place in source.places:
        if place.is_file():
            found.append(place)
        elif (place / "config.json").is_file():
            found += weight_files(place)
        else:
            found += sorted(p for p in place.iterdir() if p.is_file())
    return found
