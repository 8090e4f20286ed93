"""`model-fusion dynamic twin`: parses flags, calls the public API, prints. No logic."""

from pathlib import Path

import typer

app = typer.Typer(help="Merges that are made anew for each input.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Merges that are made anew for each input."""


@app.command("twin")
def twin(
    recipe: Path = typer.Argument(help="A twin recipe (YAML)."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder to write; must not exist."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing output folder."),
) -> None:
    """Build a Twin: a shared model, small parts of each expert, and a router that weighs them by the prompt."""
    from model_fusion.run.twin import twin as run  # torch loads here, not for --help

    made = run(recipe, output, overwrite=overwrite)
    sizes = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in made.bytes.items())
    typer.echo(f"{sizes}; the experts whole: {made.experts_bytes / 1e6:.2f} MB")
    typer.echo(f"router: right on {made.router_accuracy:.1%} of the validation text")
    typer.echo(f"wrote {made.folder}")
