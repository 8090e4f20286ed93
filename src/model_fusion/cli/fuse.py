"""`model-fusion fuse recipe.yml -o out/`: parses flags, calls the run, prints. No logic."""

from pathlib import Path

import typer


def fuse(
    recipe: Path = typer.Argument(help="A fuse recipe (YAML)."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder to write."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a fusion that is there; forget a started run."),
    resume: bool = typer.Option(False, "--resume", help="Continue an interrupted run of the same recipe."),
) -> None:
    """Give a frozen LLM the skill of small experts, as a recipe says."""
    from model_fusion.run.fuse import fuse as run  # torch loads here, not for --help

    result = run(recipe, output, overwrite=overwrite, resume=resume)
    if result.written:
        typer.echo(str(result))
