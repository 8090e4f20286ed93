"""What a checkpoint's tensors mean: layer, role, tied groups; from names and the raw config alone.

No model class is imported: names on disk are the published ones, while transformers renames and fuses them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

_LAYER = re.compile(r"^((?:.*?\.)?(?:layers|layer|h|blocks|block))\.(\d+)\.(.+)$")
_TOWER = re.compile(r"(^|\.)(vision|visual|audio|image|speech)[\w]*\.")
_ROLES: tuple[tuple[str, str], ...] = (
    ("head", r"(^|\.)(lm_head|embed_out|score|classifier)\b"),
    ("embedding", r"(embed_tokens|wte|wpe|word_embeddings|position_embeddings|embed_in)\b"),
    ("router", r"(mlp|block_sparse_moe|feed_forward)\.(gate|router)\b"),
    ("expert", r"experts?\."),
    ("norm", r"(norm|ln_\w+|layernorm|LayerNorm)\w*\b"),
    ("attention", r"(attn|attention)"),
    ("mlp", r"(mlp|feed_forward|ffn|fc\d|intermediate|output\.dense)"),
)
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$")
_BY_TOKEN = re.compile(r"(^|\.)(lm_head|embed_out|predictions|predictions\.decoder)\.(weight|bias)$")
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.masked_bias|embeddings\.position_ids)$")
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")


Rows = Literal["outputs", "inputs", "tokens"]
"""What a matrix's rows stand for: Linear's are outputs, Conv1D's inputs, an embedding's or a head's tokens."""


@dataclass(frozen=True)
class Role:
    """`stack` is the prefix before the layer number ("model.layers"); both are None outside a layer stack.
    `transposed` marks GPT-2's Conv1D, stored [in, out] where Linear stores [out, in]."""

    name: str
    role: str
    stack: str | None
    layer: int | None
    transposed: bool = False


def role_of(name: str, config: Mapping[str, Any] | None = None) -> Role:
    """Layer and role of one tensor name."""
    match = _LAYER.match(name)
    stack, layer = (match.group(1), int(match.group(2))) if match else (None, None)
    role = next((label for label, pattern in _ROLES if re.search(pattern, name)), "other")
    if _TOWER.search(name):
        role = "tower"
    transposed = (config or {}).get("model_type") == "gpt2" and _CONV1D.search(name) is not None
    return Role(name, role, stack, layer, transposed)


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Layer stacks and their lengths: {"model.layers": 32}."""
    found: dict[str, int] = {}
    for name in names:
        role = role_of(name)
        if role.stack is not None and role.layer is not None:
            found[role.stack] = max(found.get(role.stack, 0), role.layer + 1)
    return found


def main_stack(names: Iterable[str]) -> tuple[str, int] | None:
    """The language model's own layer stack: the longest outside vision and audio towers."""
    found = stacks(names)
    language = {s: n for s, n in found.items() if not _TOWER.search(s + ".")} or found
    return max(language.items(), key=lambda item: item[1]) if language else None


def with_layer(name: str, layer: int) -> str:
    """The same tensor in another layer."""
    match = _LAYER.match(name)
    return f"{match.group(1)}.{layer}.{match.group(3)}" if match else name


def before_layers(name: str) -> bool:
    """Whether a tensor outside the stack acts before the first layer rather than after the last."""
    return role_of(name).role in ("embedding", "tower") or "embed" in name


def depth_of(name: str, lengths: Mapping[str, int]) -> float:
    """Where a tensor's layer lies in its stack: 0 first (and before the layers), 1 last (and after them). `lengths`:
    the model's stacks."""
    role = role_of(name)
    if role.layer is None or role.stack is None:
        return 0.0 if before_layers(name) else 1.0
    return role.layer / max(lengths[role.stack] - 1, 1)


def ties(config: Mapping[str, Any]) -> bool:
    """Whether head and input embedding are one tensor."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    # transformers' default is tied; the families that untie say so in their config
    return bool(config.get("tie_word_embeddings", inner if inner is not None else True))


def heads(names: Iterable[str]) -> list[str]:
    """The language-model heads among the names."""
    return [name for name in names if name.endswith(_HEADS)]


def tied(config: Mapping[str, Any], names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of names that are one tensor: the head and the input embedding, where the config ties them."""
    known = list(names)
    embedding = next((name for name in known if _EMBEDDINGS.search(name)), None)
    found = heads(known)
    return [(embedding, *found)] if ties(config) and embedding and found else []


def input_embedding(names: Iterable[str]) -> str | None:
    """The tensor that holds one row a token."""
    return next((name for name in names if _EMBEDDINGS.search(name) and not _TOWER.search(name)), None)


def has_row_a_token(name: str) -> bool:
    """Whether a tensor's rows are tokens: input embeddings, language-model heads and their biases."""
    return bool(_EMBEDDINGS.search(name) or _BY_TOKEN.search(name)) and not _TOWER.search(name)


def rows_of(name: str, config: Mapping[str, Any] | None = None) -> Rows:
    """What the rows of a matrix of that name stand for."""
    if has_row_a_token(name):
        return "tokens"
    return "inputs" if role_of(name, config).transposed else "outputs"


def computed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a buffer that every loader computes anew: older files hold rotary frequencies, positions and
    causal masks, newer ones of the same models do not."""
    return bool(_COMPUTED.search(name)) or (bool(_MASK.search(name)) and len(shape) == 4 and shape[:2] == (1, 1))
