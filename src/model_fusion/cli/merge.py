"""`model-fusion merge recipe.yml -o out/`: parses flags, calls the engine, prints. No logic."""

import gc
import re
import warnings
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
    size = int(float(match.group(1)) * _UNITS[match.group(2).upper()])
    if size < 1:
        raise InputError(f"--shard-size {text!r}: give at least one byte")
    return size


def _target(place: Path | None, output: Path | None) -> Path:
    if (place is None) == (output is None):
        raise InputError("name the folder to write once: `model-fusion merge recipe.yml -o out`")
    return place or output or Path()


def merge(
    context: typer.Context,
    recipe: Path = typer.Argument(help="A merge recipe (mergekit's YAML)."),
    place: Path | None = typer.Argument(None, metavar="output", help="As --output."),
    output: Path | None = typer.Option(None, "--output", "-o", help="Folder to write; must not exist."),
    overwrite: bool = typer.Option(False, help="Replace an existing output folder."),
    resume: bool = typer.Option(False, help="Continue an interrupted merge of the same recipe and inputs."),
    threads: int = typer.Option(0, min=0, help="Worker threads; 0 means one per core."),
    shard_size: str = typer.Option("5GB", help="Largest weight file."),
    allow_nan: bool = typer.Option(False, help="Merge tensors that hold NaN or Inf."),
    device: str = typer.Option("cpu", help="Where tensors are combined: cpu, cuda, cuda:1 …"),
    fill_missing: str = typer.Option(None, help="Model (or base) that gives the tensors another model lacks."),
    trust_remote_code: bool = typer.Option(False, help="Copy the Python files that a model's loader runs."),
    dry_run: bool = typer.Option(False, help="Check everything, print plan, bytes and expected time; write nothing."),
) -> None:
    """Merge models of one architecture as a recipe says. mergekit-yaml's flags are understood too."""
    output, largest = _target(place, output), parse_size(shard_size)
    if context.meta.get("dropped"):
        typer.echo(f"not needed here: {', '.join(context.meta['dropped'])}", err=True)
    from model_fusion.checkpoint.ahead import Ahead

    ahead = None if dry_run else Ahead(recipe)
    gc.disable()  # importing torch makes a million objects and no garbage: collecting costs a fifth of the start
    from model_fusion.checkpoint import lineage
    from model_fusion.merge import engine  # torch loads here, not for --help

    gc.freeze()
    gc.enable()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if dry_run:
            from model_fusion.merge.dry_run import dry_run as foresee
            from model_fusion.report.forecast import forecast

            found = foresee(
                recipe,
                output,
                overwrite=overwrite,
                threads=threads,
                device=device,
                fill_missing=fill_missing,
                trust_remote_code=trust_remote_code,
                allow_nan=allow_nan,
            )
            told = forecast(found)
        else:
            folder = engine.merge(
                recipe,
                output,
                overwrite=overwrite,
                resume=resume,
                threads=threads,
                shard_size=largest,
                allow_nan=allow_nan,
                device=device,
                fill_missing=fill_missing,
                trust_remote_code=trust_remote_code,
                ahead=ahead,
            )
            told = "\n".join([*lineage.notes(folder), f"wrote {folder}"])
    for text in dict.fromkeys(str(one.message) for one in warned):
        typer.echo(f"warning: {text}", err=True)
    typer.echo(told)
