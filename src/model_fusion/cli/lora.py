"""`model-fusion lora extract | merge`: parses flags, calls `merge/lora`, prints. No logic."""

from pathlib import Path

import typer

app = typer.Typer(help="Extract a LoRA adapter from a fine-tune, or merge adapters.", no_args_is_help=True)


@app.command("extract")
def extract(
    finetune: str = typer.Argument(help="The fine-tuned model."),
    base: str = typer.Option(..., help="The model that it was tuned from."),
    output: Path = typer.Option(..., "--output", "-o", help="Adapter folder to write; must not exist."),
    rank: int | None = typer.Option(None, help="Rank of every matrix pair (16 unless --energy is given)."),
    energy: float | None = typer.Option(None, help="Smallest ranks that keep this share of the squared norm."),
    svd: str = typer.Option("auto", help="exact, randomized, or auto (exact up to 1024 rows or columns)."),
    save_rest: bool = typer.Option(False, help="Keep changed embeddings, norms and biases whole (modules_to_save)."),
    exclude: list[str] = typer.Option([], help="Leave out tensors whose name holds this; may be repeated."),
    dtype: str = typer.Option("float32", help="Of the matrices: float32, float16 or bfloat16."),
    overwrite: bool = typer.Option(False, help="Replace an existing output folder."),
    threads: int = typer.Option(0, min=0, help="Worker threads; 0 means one per core."),
) -> None:
    """Write a fine-tune's difference from its base as a LoRA adapter that peft loads."""
    from model_fusion.errors import InputError
    from model_fusion.merge.lora.extract import extract as run
    from model_fusion.merge.lora.factors import Wanted
    from model_fusion.report.lora import extracted
    from model_fusion.report.progress import bar

    choice = {"auto": None, "exact": True, "randomized": False}
    if svd not in choice:
        raise InputError(f"--svd {svd!r}: give auto, exact or randomized")
    wanted = Wanted(16 if rank is None and energy is None else rank, energy, choice[svd])
    with bar("extracting") as step:
        made = run(
            finetune,
            base,
            output,
            wanted,
            save_rest=save_rest,
            exclude=exclude,
            dtype=dtype,
            overwrite=overwrite,
            threads=threads,
            step=step,
        )
    typer.echo(extracted(made))


@app.command("merge")
def merge(
    adapters: list[str] = typer.Argument(help="Two or more adapter folders of one base."),
    output: Path = typer.Option(..., "--output", "-o", help="Adapter folder to write; must not exist."),
    weights: str = typer.Option("", help="Numbers in the adapters' order, such as 0.7,0.3; without them, the mean."),
    mode: str = typer.Option("cat", help="cat (exact), svd (cut to a lower rank) or linear (as peft's)."),
    rank: int | None = typer.Option(None, help="Rank to cut to (svd)."),
    energy: float | None = typer.Option(None, help="Share of the squared norm to keep (svd)."),
    base: str | None = typer.Option(None, help="The base's name, where the adapters name different ones."),
    overwrite: bool = typer.Option(False, help="Replace an existing output folder."),
    threads: int = typer.Option(0, min=0, help="Worker threads; 0 means one per core."),
) -> None:
    """Merge adapters of one base into one adapter. To apply one, name base+adapter as a model of a merge recipe."""
    from model_fusion.errors import InputError
    from model_fusion.merge.lora.combine import combine
    from model_fusion.report.lora import combined

    try:
        numbers = [float(word) for word in weights.split(",")] if weights else []
    except ValueError as error:
        raise InputError(f"--weights {weights!r}: give numbers such as 0.7,0.3") from error
    made = combine(
        adapters, output, numbers, mode, rank=rank, energy=energy, base=base, overwrite=overwrite, threads=threads
    )
    typer.echo(combined(made))
