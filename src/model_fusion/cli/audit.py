"""`model-fusion audit out/`: parses flags, calls the public API, prints the table. No logic."""

from pathlib import Path

import typer


def audit(
    folder: Path = typer.Argument(help="A saved fusion."),
    task: str = typer.Option("", help="Task to audit on; default: the one the fusion recorded."),
    examples: Path = typer.Option(None, help="Your own examples (.jsonl or .csv: prompt, inputs, answer)."),
    seeds: int = typer.Option(None, min=1, help="Trainings of everything that trains; default 5, with --quick 2."),
    json_file: Path = typer.Option(None, "--json", help="Write the report as JSON."),
    html_file: Path = typer.Option(None, "--html", help="Write the report as one HTML page."),
    resume: bool = typer.Option(False, "--resume", help="Go on with an interrupted audit."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Start afresh; forget the finished cells."),
    allow_pickle: bool = typer.Option(False, "--allow-pickle", help="Load joblib experts: runs code in their files."),
    quick: bool = typer.Option(
        False, "--quick", help="A quick look with few seeds; the output says that it is no audit."
    ),
) -> None:
    """Run the twelve controls on a saved fusion."""
    from model_fusion.evaluate import audit as work  # torch loads here, not for --help
    from model_fusion.report.table import print_audit

    report = work.audit(
        folder,
        task=task or None,
        examples=examples,
        seeds=seeds,
        quick=quick,
        json_file=json_file,
        html_file=html_file,
        resume=resume,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
    )
    print_audit(report)
