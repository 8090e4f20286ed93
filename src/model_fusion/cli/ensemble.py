"""`model-fusion ensemble A B --prompt "…"`: parses flags, opens the models, prints what they write together."""

import typer


def ensemble(
    models: list[str] = typer.Argument(help="Causal LMs: names, hub ids, folders, GGUF files or base+adapter."),
    prompt: str = typer.Option(..., "--prompt", help="What to continue, or to answer with --chat."),
    chat: bool = typer.Option(False, "--chat", help="Put the prompt through each model's chat template."),
    weight: list[float] = typer.Option(None, help="A model's share; give it once for each model."),
    top_k: int = typer.Option(10, help="Tokens of each model that are united where vocabularies differ."),
    max_new_tokens: int = typer.Option(64, min=1, help="Longest answer."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 takes the likeliest words; above it samples."),
    seed: int = typer.Option(0, help="Of the sampling."),
) -> None:
    """Let several models write one text: their next-token probabilities are averaged."""
    from model_fusion.dynamic.ensemble import ensemble as open_models  # torch loads here, not for --help

    opened = open_models(models, weights=weight or None, top_k=top_k)
    asked = [{"role": "user", "content": prompt}] if chat else prompt
    typer.echo(opened.generate(asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))
