"""`model-fusion stack A B -o recipe.yml`: writes a recipe that stacks the models' layers at random."""

from pathlib import Path

import typer


def stack(
    models: list[str] = typer.Argument(help="Models of one architecture."),
    output: Path = typer.Option(..., "--output", "-o", help="Recipe file to write."),
    layers: int = typer.Option(None, min=1, help="Layers of the output; as many as the first model unless given."),
    weight: list[float] = typer.Option(None, help="How often a model is drawn; give it once for each model."),
    seed: int = typer.Option(0, help="The same seed draws the same recipe."),
    anywhere: bool = typer.Option(False, help="Let any layer come to any place, not only to its own depth."),
) -> None:
    """Write a recipe of randomly drawn layers, to merge or to search with."""
    from model_fusion.merge.stacking import write_random_stack  # torch loads here, not for --help

    write_random_stack(models, output, layers=layers, weights=weight or None, seed=seed, anywhere=anywhere)
    typer.echo(f"wrote {output}")
