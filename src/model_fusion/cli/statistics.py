"""`model-fusion statistics MODEL -o FILE`, `model-fusion adamerge BASE MODELS`: flags to calls. No logic."""

from pathlib import Path

import typer

from model_fusion.errors import InputError

WINDOW = typer.Option(128, min=2, help="Tokens a sequence.")
DEVICE = typer.Option("cpu", help="Where models run: cpu, cuda, cuda:1 …")
TOKENS = typer.Option(16384, min=0, help="At most so many tokens of each text; 0 takes all.")


def statistics(
    models: list[str] = typer.Argument(help="The model; with --merged, all models of the merge."),
    texts: list[str] = typer.Option(..., "--texts", help="Text file or folder; with --merged, one a model, in order."),
    output: Path = typer.Option(..., "--output", "-o", help="FILE.safetensors; with --merged, a folder."),
    kind: str = typer.Option("gram", help="gram (for regmean) or fisher."),
    merged: bool = typer.Option(False, help="RegMean++: activations go through the merged model."),
    alpha: float = typer.Option(0.9, help="With --merged: the alpha of the regmean merge."),
    labels: str = typer.Option("own", help="Fisher: own (drawn from the model) or next (the text's next token)."),
    only: list[str] = typer.Option([], "--only", help="Part of tensor names; the others are left out."),
    seed: int = typer.Option(0, help="Of the labels that are drawn."),
    window: int = WINDOW,
    tokens: int = TOKENS,
    device: str = DEVICE,
) -> None:
    """Run a model on text and write what a data-based merge needs of it."""
    from model_fusion.checkpoint.statistics import KINDS, check_file
    from model_fusion.merge.calibration import language
    from model_fusion.report.progress import bar

    if kind not in KINDS or labels not in ("own", "next"):
        raise InputError(f"--kind {kind!r} --labels {labels!r}: give gram or fisher, and own or next")
    limit = tokens or None
    if merged:
        if kind != "gram":
            raise InputError("--merged collects Gram matrices: leave --kind out")
        names = [f"{number}-{Path(model).name}.gram.safetensors" for number, model in enumerate(models)]
        check_file(output / names[0] if output.is_dir() else output.with_name(names[0]))
        with bar("layers") as step:
            each = [language.Texts([text], window, limit) for text in texts]
            found = language.of_merged(models, each, alpha=alpha, device=device, step=step)
        output.mkdir(exist_ok=True)
        for name, own in zip(names, found, strict=True):
            typer.echo(f"wrote {own.save(output / name)}")
        return
    if len(models) != 1:
        raise InputError(f"{len(models)} models: give one at a time, or --merged")
    check_file(output)
    with bar("batches") as step:
        own = language.of_model(
            models[0],
            language.Texts(texts, window, limit),
            "gram" if kind == "gram" else "fisher",
            labels="own" if labels == "own" else "next",
            seed=seed,
            only=only,
            device=device,
            step=step,
        )
    typer.echo(f"{len(own)} tensors, {own.count} {'inputs' if kind == 'gram' else 'samples'}")
    if own.unseen:
        typer.echo(f"{len(own.unseen)} layers without statistics (means, then), the first is {own.unseen[0]!r}")
    typer.echo(f"wrote {own.save(output)}")


def adamerge(
    base: str = typer.Argument(help="The model that the others were tuned from."),
    models: list[str] = typer.Argument(help="Its fine-tunes."),
    texts: list[str] = typer.Option(..., "--texts", help="Text file or folder without labels, one a task."),
    output: Path = typer.Option(..., "--output", "-o", help="Recipe to write; `model-fusion merge` takes it."),
    steps: int = typer.Option(100, min=1, help="Steps of Adam, each on one batch of every text."),
    learning_rate: float = typer.Option(1e-3, help="Of Adam, on the coefficients."),
    window: int = WINDOW,
    tokens: int = TOKENS,
    device: str = DEVICE,
) -> None:
    """AdaMerging: find how much of each model to take, tensor by tensor, by the entropy of the merged one's answers."""
    import yaml

    from model_fusion.merge.calibration import language
    from model_fusion.report.progress import bar

    if not output.parent.is_dir():
        raise InputError(f"no such folder: {output.parent} (of the recipe {output.name})")
    each = [language.Texts([text], window, tokens or None) for text in texts]
    with bar("steps") as step:
        found = language.coefficients(
            base, models, each, steps=steps, learning_rate=learning_rate, device=device, step=step
        )
    output.write_text(yaml.safe_dump(found.recipe(base, models), sort_keys=False), encoding="utf-8")
    typer.echo(f"entropy {found.entropy[0]:.4f} → {found.entropy[-1]:.4f} nats, summed over {len(texts)} texts")
    typer.echo(f"wrote {output}")
