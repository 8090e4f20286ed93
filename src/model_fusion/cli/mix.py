"""`model-fusion mix build|train|eval`: parses flags, calls the public API, prints. No logic."""

import json
from pathlib import Path

import typer

from model_fusion.cli.merge import parse_size
from model_fusion.errors import InputError

app = typer.Typer(help="Make trained models the experts of a mixture-of-experts model.", no_args_is_help=True)

TEXTS = typer.Option(None, "--texts", help="Folder with a sub-folder (or file) a domain, named as the experts are.")
TOKENS = typer.Option(0, min=0, help="At most so many training tokens a domain; 0 takes all.")


@app.command("build")
def build(
    recipe: Path = typer.Argument(help="A mix recipe (ours, or mergekit-moe's YAML)."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder to write; must not exist."),
    overwrite: bool = typer.Option(False, help="Replace an existing output folder."),
    resume: bool = typer.Option(False, help="Continue an interrupted build of the same recipe and inputs."),
    shard_size: str = typer.Option("5GB", help="Largest weight file."),
    dry_run: bool = typer.Option(False, help="Check everything and print the plan; write nothing."),
) -> None:
    """Build the mixture that a recipe describes."""
    from model_fusion.mix import build as building  # torch loads here, not for --help

    if dry_run:
        work = building.plan(recipe)
        size = sum(item.spec.nbytes for item in work.outputs)
        names = ", ".join(work.recipe.names())
        typer.echo(f"{work.family.architecture}: experts {names}; {len(work.outputs)} tensors, {size / 1e9:.3f} GB")
        return
    built = building.build(recipe, output, overwrite=overwrite, resume=resume, shard_size=parse_size(shard_size))
    for note in building.notes(built.plan, built.gate_accuracy):
        typer.echo(note)
    typer.echo(f"wrote {built.folder} ({built.plan.family.architecture})")


@app.command("train")
def train(
    folder: Path = typer.Argument(help="A folder that `mix build` wrote; its routers are replaced."),
    texts: Path | None = TEXTS,
    steps: int = typer.Option(200, min=1),
    batch_size: int = typer.Option(8, min=1),
    learning_rate: float = typer.Option(3e-3),
    window: int = typer.Option(128, min=2, help="Tokens a sequence."),
    tokens: int = TOKENS,
    routing: str = typer.Option("top_k", help="top_k (as the model runs) or soft (every expert) while training."),
    balance: float = typer.Option(0.0, min=0.0, help="Weight of the load-balancing loss."),
    domain: float = typer.Option(0.0, min=0.0, help="Weight of the loss that asks for the text's own expert."),
    patience: int = typer.Option(5, min=0, help="Validations without improvement before stopping; 0 never stops."),
    seed: int = typer.Option(0),
) -> None:
    """Train the routers of a mixture, and nothing else, on text. An interrupted run goes on where it stopped."""
    from model_fusion.mix.train import RouterSettings, train_router

    if routing not in ("top_k", "soft"):
        raise InputError(f"--routing {routing!r}: give top_k or soft")
    settings = RouterSettings(
        routing="soft" if routing == "soft" else "top_k",
        balance=balance,
        domain=domain,
        window=window,
        tokens=tokens or None,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        seed=seed,
    )
    done = train_router(folder, texts, settings)
    typer.echo(f"{done.parameters} parameters; held-out loss {done.before:.4f} → {done.after:.4f} nats a token")
    typer.echo(f"wrote {folder}" if done.kept else "training lowered nothing: the routers stay as they were")


@app.command("eval")
def evaluate(
    folder: Path = typer.Argument(help="A folder that `mix build` wrote."),
    texts: Path | None = TEXTS,
    window: int = typer.Option(128, min=2, help="Tokens a sequence."),
    tokens: int = TOKENS,
    json_file: Path | None = typer.Option(None, "--json", help="Write the numbers here."),
    html: Path | None = typer.Option(None, help="Write a page with heatmaps here."),
) -> None:
    """Say whether a router can pay: experts × domains, oracle, soup, gateless, routing, and a sentence."""
    from model_fusion.mix import verdict
    from model_fusion.report import mix as report

    for file in (json_file, html):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise InputError(f"{file}: give a file in a folder that exists")
    found = verdict.evaluate(folder, texts, window=window, tokens=tokens or None)
    report.show(found.to_json())
    if json_file is not None:
        json_file.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    if html is not None:
        html.write_text(report.page(found.to_json()), encoding="utf-8")
