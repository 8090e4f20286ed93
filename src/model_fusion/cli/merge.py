"""`model-fusion merge recipe.yml -o out/`: parses flags, calls the engine, prints. No logic."""

import gc
import re
from pathlib import Path

import typer

from model_fusion.errors import InputError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500M" or "1000"."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"--shard-size {text!r}: give a size such as 5GB or 500MB")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def merge(
    recipe: Path = typer.Argument(help="A merge recipe (mergekit's YAML)."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder to write; must not exist."),
    overwrite: bool = typer.Option(False, help="Replace an existing output folder."),
    resume: bool = typer.Option(False, help="Continue an interrupted merge of the same recipe and inputs."),
    threads: int = typer.Option(0, min=0, help="Worker threads; 0 means one per core."),
    shard_size: str = typer.Option("5GB", help="Largest weight file."),
    allow_nan: bool = typer.Option(False, help="Merge tensors that hold NaN or Inf."),
    dry_run: bool = typer.Option(False, help="Check everything and print the plan; write nothing."),
) -> None:
    """Merge models of one architecture as a recipe says."""
    gc.disable()  # importing torch makes a million objects and no garbage: collecting costs a fifth of the start
    from model_fusion.merge import engine  # torch loads here, not for --help

    gc.freeze()
    gc.enable()
    if dry_run:
        work = engine.plan(recipe)
        size = sum(item.spec.nbytes for item in work.outputs)
        count = len(work.checkpoints)
        typer.echo(f"{work.method.name}: {count} models, {len(work.outputs)} tensors, {size / 1e9:.3f} GB")
        return
    folder = engine.merge(
        recipe,
        output,
        overwrite=overwrite,
        resume=resume,
        threads=threads,
        shard_size=parse_size(shard_size),
        allow_nan=allow_nan,
    )
    typer.echo(f"wrote {folder}")
