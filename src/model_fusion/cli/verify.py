"""`model-fusion verify out/`: recomputes the recorded hashes and prints what was checked."""

from pathlib import Path

import typer


def verify(
    folder: Path = typer.Argument(help="A folder that model-fusion wrote."),
    models: Path = typer.Option(None, help="Folder that relative names of the inputs start from."),
    outputs_only: bool = typer.Option(False, help="Do not read the inputs."),
    threads: int = typer.Option(0, min=0, help="Worker threads; 0 means one per core."),
) -> None:
    """Recompute the SHA-256 of every tensor and file of an output, and of its inputs where they are still here."""
    from model_fusion.checkpoint.verify import verify as check
    from model_fusion.report.progress import bar

    with bar("verifying") as step:
        result = check(folder, models=models, inputs=not outputs_only, threads=threads, step=step)
    typer.echo(f"unchanged: {result.tensors} tensors, {result.files} files in {folder}")
    if result.inputs:
        typer.echo(f"unchanged inputs: {', '.join(result.inputs)}")
    if result.unread:
        typer.echo(f"inputs not found here, so not checked: {', '.join(result.unread)} (--models FOLDER)")
    typer.echo(f"sha256 of the lineage itself: {result.lineage}")
