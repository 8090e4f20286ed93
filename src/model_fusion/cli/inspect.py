"""`model-fusion inspect A B --base C`: parses flags, calls `merge/inspect`, prints the tables. No logic."""

from pathlib import Path

import typer


def inspect(
    models: list[str] = typer.Argument(help="Models to look at before they are merged."),
    base: str | None = typer.Option(None, help="The model they were tuned from."),
    spectra: bool = typer.Option(True, help="Compute ranks and subspaces too (most of the time)."),
    json_file: Path | None = typer.Option(
        None, "--json", help="Write everything here, each tensor's numbers included."
    ),
    threads: int = typer.Option(0, min=0, help="Worker threads; 0 means one per core."),
) -> None:
    """Look before you merge: do the models fit, how far are they from their base, how much do they conflict."""
    from model_fusion.merge.inspect import inspect as look
    from model_fusion.report.inspection import show
    from model_fusion.report.json_file import check, write
    from model_fusion.report.progress import bar

    check(json_file)
    with bar("inspecting") as step:
        found = look(models, base, with_spectra=spectra, threads=threads, step=step)
    show(found.as_dict())
    if json_file is not None:
        write(json_file, found.as_dict())
        typer.echo(f"wrote {json_file}")
