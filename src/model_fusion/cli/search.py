"""`model-fusion search recipe.yml -o out/`: parses flags, calls the public API, prints. No logic."""

from pathlib import Path

import typer


def search(
    recipe: Path = typer.Argument(help="A merge recipe in which numbers are ranges: weight: {range: [0, 1]}."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder to write; must not exist."),
    metric: str = typer.Option("bits_per_byte", help="bits_per_byte, loss or perplexity; lower is better."),
    validation: list[Path] = typer.Option(..., help="Text file that every trial is judged on; may be repeated."),
    test: list[Path] = typer.Option(..., help="Text file that is read once, after the last trial; may be repeated."),
    trials: int = typer.Option(100, min=1, help="How many mergers to try."),
    sampler: str = typer.Option("tpe", help="tpe, cmaes, grid or random."),
    seed: int = typer.Option(0, help="The same seed proposes the same trials."),
    base: str = typer.Option(None, help="Base of plain task arithmetic, where the recipe names none."),
    window: int = typer.Option(512, min=2, help="Tokens of text read at once."),
    resume: bool = typer.Option(False, help="Go on with an interrupted search."),
    overwrite: bool = typer.Option(False, help="Replace an existing output; its test set then counts as re-read."),
    threads: int = typer.Option(0, min=0, help="Worker threads of a merge; 0 means one per core."),
    fill_missing: str = typer.Option(None, help="Model (or base) that gives the tensors another model lacks."),
    device: str = typer.Option("cpu", help="Where the merged model is judged: cpu, cuda, cuda:1 …"),
    trust_remote_code: bool = typer.Option(False, help="Copy the Python files that a model's loader runs."),
) -> None:
    """Find the numbers of a merge recipe, compare with plain task arithmetic, merge with the best."""
    from model_fusion.report.search import found as said
    from model_fusion.search.run import search as work  # torch loads here, not for --help

    try:
        done = work(
            recipe,
            output,
            metric=metric,
            validation=validation,
            test=test,
            trials=trials,
            sampler=sampler,
            seed=seed,
            base=base,
            window=window,
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            fill_missing=fill_missing,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    except KeyboardInterrupt:
        typer.echo("every finished trial is kept: go on with --resume", err=True)
        raise
    typer.echo(said(done.report))
    typer.echo(f"wrote {done.folder}")
