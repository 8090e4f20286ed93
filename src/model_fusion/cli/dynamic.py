"""`model-fusion dynamic twin | route | masks | unmask`: parses flags, calls the public API, prints. No logic."""

from pathlib import Path

import typer

app = typer.Typer(help="Merges that are made anew for each input, or for each task.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Merges that are made anew for each input, or for each task."""


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


@app.command("route")
def route(
    folder: Path = typer.Argument(help="The output of `model-fusion dynamic twin`."),
    prompt: list[str] = typer.Option(..., "--prompt", help="What would be asked; may be repeated."),
) -> None:
    """Show how a Twin's router weighs its experts for a prompt, one line each."""
    from model_fusion.run.twin import route as run  # torch loads here, not for --help

    for weights in run(folder, prompt):
        typer.echo(", ".join(f"{name} {weight:.2f}" for name, weight in weights.items()))


@app.command("masks")
def masks(
    experts: list[str] = typer.Argument(help="Fine-tunes of the base: NAME=MODEL each, or MODEL, named as its folder."),
    base: str = typer.Option(..., help="The model that they were tuned from."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder to write; must not exist."),
    kind: str = typer.Option("emr", help="emr, or tall."),
    strength: list[float] = typer.Option(
        None, help="Of TALL's masks: larger keeps less; once for all experts (0.4 unless given), or once for each."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing output folder."),
) -> None:
    """Keep all experts as one shared task vector and one bit an element each; the task's id brings one back."""
    from model_fusion.errors import InputError
    from model_fusion.run.masks import write_masks  # torch loads here, not for --help

    named: dict[str, str] = {}
    for text in experts:
        name, equals, model = text.partition("=")
        name, model = (name, model) if equals else (Path(text).name, text)
        if not name or not model or name in named:
            raise InputError(f"{text!r}: give each expert as NAME=MODEL, under a name of its own")
        named[name] = model
    each = strength[0] if strength and len(strength) == 1 else strength or None
    made = write_masks(base, named, output, kind=kind, strength=each, overwrite=overwrite)
    sizes = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in made.bytes.items())
    typer.echo(f"{sizes}, beside the base; the experts whole: {made.experts_bytes / 1e6:.2f} MB")
    typer.echo(f"wrote {made.folder}")


@app.command("unmask")
def unmask(
    folder: Path = typer.Argument(help="The output of `model-fusion dynamic masks`."),
    task: str = typer.Option(..., help="Which expert: the name it was given."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder to write; must not exist."),
    base: str = typer.Option(None, help="Where the base is now, if not where it was."),
    tokenizer: str = typer.Option(None, help="Model whose tokenizer and chat template to take; the base unless given."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an existing output folder."),
) -> None:
    """Write one task's model, an ordinary checkpoint, from the base and the masks."""
    from model_fusion.run.masks import unmask as run  # torch loads here, not for --help

    typer.echo(f"wrote {run(folder, task, output, base=base, tokenizer=tokenizer, overwrite=overwrite)}")
