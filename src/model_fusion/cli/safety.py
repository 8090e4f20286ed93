"""`model-fusion safety CHILD`: parses flags, calls the public API, prints. No logic."""

from pathlib import Path
from typing import Any

import typer

from model_fusion.errors import InputError


def safety(
    child: str = typer.Argument(help="The model to audit: a folder, hub id, GGUF file or base+adapter."),
    parent: list[str] = typer.Option(None, help="A model it was made from; may be repeated. Default: its lineage's."),
    base: str = typer.Option(None, help="The model that the parents come from. Default: its lineage's."),
    aligned: str = typer.Option(None, help="Aligned model of the pair that shows alignment. Default: safest parent."),
    unaligned: str = typer.Option(None, help="Unaligned model of that pair. Default: the base."),
    prompts: Path = typer.Option(None, help='Your own requests: a JSON list of {"harmful": …, "benign": …}.'),
    phrase: list[str] = typer.Option(None, help="What opens a refusal, instead of the built-in list; repeatable."),
    tokens: int = typer.Option(32, min=1, help="Longest answer."),
    threshold: float = typer.Option(0.35, help="Tensors whose SafeMERGE cosine lies below it count as unaligned."),
    repair: bool = typer.Option(False, "--repair", help="Merge those tensors with a safe model and write the result."),
    safe: str = typer.Option(None, help="With --repair: the safe model. Default: the aligned one, or safest parent."),
    safe_weight: float = typer.Option(0.2, help="With --repair: how much of the safe model these tensors take."),
    add: bool = typer.Option(False, "--add", help="With --repair: add aligned − unaligned; take nothing of the child."),
    output: Path = typer.Option(None, "--output", "-o", help="With --repair: folder to write; must not exist."),
    overwrite: bool = typer.Option(False, help="With --repair: replace an existing output folder."),
    device: str = typer.Option("cpu", help="Where models answer: cpu, cuda, cuda:1 …"),
    json_file: Path = typer.Option(None, "--json", help="Write the report as JSON."),
) -> None:
    """Audit a merged model's refusals beside its parents', and repair what the merge lost."""
    from model_fusion.report import json_file as file

    if repair != (output is not None):
        raise InputError("--repair and --output go together: the repaired model is written there")
    file.check(json_file)
    from model_fusion.evaluate.safety import audit as auditing  # torch loads here, not for --help
    from model_fusion.evaluate.safety import repair as repairing
    from model_fusion.report import safety as report

    given: dict[str, Any] = {
        "base": base,
        "aligned": aligned,
        "unaligned": unaligned,
        "prompts": prompts,
        "phrases": phrase or None,
        "tokens": tokens,
        "threshold": threshold,
        "device": device,
    }
    if output is None:
        found = auditing.audit(child, parent or (), **given)
        typer.echo(report.audited(found))
    else:
        more: dict[str, Any] = {"safe": safe, "safe_weight": safe_weight, "add": add, "overwrite": overwrite}
        done = repairing.repair(child, output, parent or (), **given, **more)
        found = {"before": done.before, "after": done.after}
        typer.echo(report.repaired(done.before, done.after))
        typer.echo(f"wrote {done.folder}")
    if json_file is not None:
        file.write(json_file, found)
