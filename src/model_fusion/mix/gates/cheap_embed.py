"""mergekit's `cheap_embed`: the prompts' summed token embeddings at unit length, the same in every layer."""

from torch import Tensor

from model_fusion.mix.gates.base import Gate, GateInputs, contrast, unit


def cheap_embed(inputs: GateInputs) -> Tensor:
    """mergekit/moe/router.py, get_cheap_embedding: each side is scaled to unit length before the difference."""
    positive = [unit(p) if p is not None else None for p in inputs.embeddings(False)]
    negative = [unit(n) if n is not None else None for n in inputs.embeddings(True)]
    rows = unit(contrast(positive, negative))
    return rows.expand(inputs.layers, *rows.shape)


CHEAP_EMBED = Gate("cheap_embed", "embeddings", cheap_embed)
