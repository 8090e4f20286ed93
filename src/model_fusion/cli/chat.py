"""`model-fusion chat out/`: parses flags, opens the session, hands it the terminal. No logic."""

import sys
from pathlib import Path

import typer


def chat(
    folder: Path = typer.Argument(help="The output of `fuse`, `merge` or `mix`, or any causal LM's folder."),
    max_new_tokens: int = typer.Option(256, help="Longest answer."),
    temperature: float = typer.Option(0.0, help="0 takes the likeliest words; above it samples."),
    seed: int = typer.Option(0, help="Of the sampling."),
    allow_pickle: bool = typer.Option(False, "--allow-pickle", help="Load joblib experts: runs code in their files."),
) -> None:
    """Talk with a fused, merged or mixed model; /help lists the commands."""
    from model_fusion.fuse.chat import converse  # torch loads here, not for --help
    from model_fusion.run.load import open_chat

    session = open_chat(
        folder, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, allow_pickle=allow_pickle
    )
    converse(session, sys.stdin, sys.stdout)
