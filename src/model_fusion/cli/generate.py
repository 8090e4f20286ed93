"""`model-fusion generate out/ --prompt "…" --input table='16 10 no'`: parses flags, asks, prints. No logic."""

import json
from pathlib import Path

import typer


def generate(
    folder: Path = typer.Argument(help="The output of `model-fusion fuse`."),
    prompt: str | None = typer.Option(None, "--prompt", help="A prompt with the experts' placeholders, <|NAME|>."),
    inputs: list[str] = typer.Option([], "--input", help="NAME=VALUES in words or JSON; once for each placeholder."),
    prompts: Path | None = typer.Option(None, "--prompts", help="A JSONL or CSV file of prompts with inputs."),
    max_new_tokens: int = typer.Option(64, help="Longest answer."),
    temperature: float = typer.Option(0.0, help="0 takes the likeliest words; above it samples."),
    seed: int = typer.Option(0, help="Of the sampling."),
    bridge_off: bool = typer.Option(False, "--bridge-off", help="Ask the plain LLM."),
    allow_pickle: bool = typer.Option(False, "--allow-pickle", help="Load joblib experts: runs code in their files."),
) -> None:
    """Ask a fused model: one prompt, or a file of them (then one JSON object a line)."""
    from model_fusion.run.load import generate as run  # torch loads here, not for --help

    answers = run(
        folder,
        prompt=prompt,
        inputs=inputs,
        file=prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        bridge_off=bridge_off,
        allow_pickle=allow_pickle,
    )
    for asked, answer in answers:
        typer.echo(answer if prompts is None else json.dumps({"prompt": asked, "answer": answer}, ensure_ascii=False))
