"""One set of names for models of one family: a text model's tensors under a multimodal model's prefix, and modules.

`model.layers.0.…` of a text model is `language_model.model.layers.0.…`, `model.language_model.layers.0.…` or the same
name in the multimodal models built on it, depending on who wrote the file.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from model_fusion.architecture.roles import has_row_a_token, main_stack, role_of

_PROJECTOR = re.compile(r"(^|\.)(multi_modal_projector|mm_projector|projector|connector|merger|aligner)\b")
_TEXT = ("text_decoder", "language_model", "text_model", "llm")
_VISION = ("vision_tower", "vision_encoder", "vision_model", "visual")
_BRIDGE = ("multi_modal_projector", "projector", "connector")


def multimodal(config: Mapping[str, Any]) -> bool:
    """Whether a config describes a language model with a tower."""
    return any(isinstance(config.get(key), dict) for key in ("vision_config", "audio_config", "text_config"))


def family(config: Mapping[str, Any]) -> str | None:
    """`qwen2` of qwen2, qwen2_vl, qwen2_5_vl_text; `llama` of a Llava on Llama. None where the config does not say."""
    text = config.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else config.get("model_type")
    return str(kind).split("_")[0] if kind else None


def backbone(names: Sequence[str]) -> list[str]:
    """The language model's own tensors: all under its prefix, its embeddings and heads."""
    found = main_stack(names)
    if found is None:
        return list(names)
    root = found[0].rpartition(".")[0]
    inside = [n for n in names if not root or n.startswith(root + ".")]
    inside += [n for n in names if has_row_a_token(n)]
    return [n for n in dict.fromkeys(inside) if role_of(n).role != "tower" and not _PROJECTOR.search(n)]


def aligned(names: Sequence[str], template: Sequence[str]) -> dict[str, str]:
    """Template name → own name, for each of `names`; a name without a counterpart keeps itself."""
    known, by_end = set(template), _by_end(template)
    own, other = main_stack(names), main_stack(template)
    swap = (_root(own[0]), _root(other[0])) if own and other else ("", "")
    result: dict[str, str] = {}
    for name in names:
        moved = swap[1] + name.removeprefix(swap[0]) if name.startswith(swap[0]) else name
        if name not in known and moved not in known:
            moved = _by_its_end(name, known, by_end)
        result[name if name in known else moved] = name
    return result


def _root(stack: str) -> str:
    """`model.` of `model.layers`, empty where a stack stands at the top."""
    return stack.rpartition(".")[0] + "." if "." in stack else ""


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def _by_end(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        for end in _ends(name):
            found.setdefault(end, []).append(name)
    return found


def _by_its_end(name: str, known: set[str], by_end: Mapping[str, list[str]]) -> str:
    """The one name of the same part (tower or language model) that is this one with a longer or shorter prefix."""
    near = [*by_end.get(name, []), *(end for end in _ends(name) if end in known)]
    near = [n for n in near if (role_of(n).role == "tower") == (role_of(name).role == "tower")]
    return near[0] if len(near) == 1 else name


def module(key: str, names: Sequence[str]) -> list[str]:
    """The tensors a recipe's module means: a prefix of their names, or a usual word for a part. Empty: none."""
    if key == "default":
        return list(names)
    prefix = [n for n in names if n.startswith(key + ".")] or [n for n in names if f".{key}." in f".{n}"]
    if prefix and key not in _TEXT:
        return prefix
    if key in _TEXT or key == "decoder":
        return backbone(names)
    if key in _VISION:
        return [n for n in names if role_of(n).role == "tower" and not _PROJECTOR.search(n)]
    if key in _BRIDGE:
        return [n for n in names if _PROJECTOR.search(n)]
    return []


def known_modules(names: Iterable[str]) -> list[str]:
    """Words that `module` understands for these names."""
    every = list(names)
    words = [*dict.fromkeys(n.split(".")[0] for n in every), _TEXT[0], _VISION[0], _BRIDGE[0]]
    return [word for word in words if module(word, every)]
