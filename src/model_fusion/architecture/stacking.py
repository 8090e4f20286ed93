"""The config of a model whose layers come from elsewhere: every field that speaks of layers follows them.

Three kinds of field: a list with one entry a layer, a list of layer numbers, and a rule of position ("every fourth
layer"). A rule that the new order breaks is written out as a list where the family has one, and refused elsewhere.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from model_fusion.errors import InputError

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_NUMBERS = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers", "moe_layers")
# rules of the form "every n-th layer", whatever the offset
_PERIODS = ("attn_layer_period", "expert_layer_period", "global_attn_every_n_layers", "no_rope_layer_interval",
            "full_attention_interval", "interleave_moe_layer_step", "moe_layer_freq", "every_n_layers")  # fmt: skip

Pick = tuple[Mapping[str, Any], int]
"""One output layer: the config of the model it comes from, and its number there."""


def language_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config that speaks of the language model's layers."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def layer_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers a config states."""
    inner = language_part(config)
    return next((inner[key] for key in _COUNTS if isinstance(inner.get(key), int)), None)


def stacked_config(config: Mapping[str, Any], picks: Sequence[Pick]) -> dict[str, Any]:
    """`config` for the layers `picks`. Unchanged where they are its own layers in order.

    Raises `InputError` where a rule of position cannot describe the new order.
    """
    result = copy.deepcopy(dict(config))
    length = layer_count(config)
    if length is None or [number for _, number in picks] == list(range(length)):
        return result
    inner: dict[str, Any] = result["text_config"] if isinstance(result.get("text_config"), dict) else result
    sources = [(language_part(source), number) for source, number in picks]
    done = _spell_out(inner, sources)
    for key, value in list(inner.items()):
        if key in done:
            continue
        if key in _COUNTS and value == length:
            inner[key] = len(picks)
        elif key == "max_window_layers" and isinstance(value, int):
            inner[key] = _windowed(value, length, [number for _, number in sources])
        elif key in _NUMBERS and isinstance(value, list):
            inner[key] = [i for i, (source, number) in enumerate(sources) if number in (source.get(key) or [])]
        elif key == "first_k_dense_replace" and isinstance(value, int):
            inner[key] = _leading([number < (source.get(key) or 0) for source, number in sources], key)
        elif key in _PERIODS and isinstance(value, int) and value > 1:
            _check_period(key, value, sources)
        elif isinstance(value, list) and len(value) == length and ("layer" in key or "block" in key or length > 8):
            lists = [source.get(key) for source, _ in sources]
            inner[key] = [
                found[number] if isinstance(found, list) and number < len(found) else value[number % length]
                for found, (_, number) in zip(lists, sources, strict=True)
            ]
    return result


def _spell_out(inner: dict[str, Any], sources: Sequence[Pick]) -> set[str]:
    """Write rules as lists where the family has one; returns the fields that are then right."""
    done: set[str] = set()
    step = inner.get("decoder_sparse_step")
    if isinstance(step, int) and step > 1:  # Qwen MoE: experts where (i + 1) % step == 0 and i not in mlp_only_layers
        inner["mlp_only_layers"] = [i for i, (source, number) in enumerate(sources) if _dense(source, number)]
        inner["decoder_sparse_step"] = 1
        done |= {"mlp_only_layers", "decoder_sparse_step"}
    pattern = inner.get("sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 0 and not inner.get("layer_types"):  # Gemma 2 and 3
        kinds = ("full_attention", "sliding_attention")
        inner["layer_types"] = [kinds[(n + 1) % (c.get("sliding_window_pattern") or pattern) > 0] for c, n in sources]
        done.add("layer_types")
    return done


def _dense(config: Mapping[str, Any], number: int) -> bool:
    step = config.get("decoder_sparse_step") or 1
    return number in (config.get("mlp_only_layers") or []) or (number + 1) % step != 0


def _windowed(value: int, length: int, numbers: Sequence[int]) -> int:
    """Layers from `max_window_layers` on slide their window."""
    return len(numbers) if value >= length else _leading([n < value for n in numbers], "max_window_layers")


def _leading(flags: Sequence[bool], key: str) -> int:
    """How many layers at the start are of a kind that only the first ones can be."""
    count = next((i for i, flag in enumerate(flags) if not flag), len(flags))
    if any(flags[count:]):
        raise InputError(f"layer order: {key} counts layers from the start, and these slices put one of them later")
    return count


def _check_period(key: str, value: int, sources: Sequence[Pick]) -> None:
    for i, (source, number) in enumerate(sources):
        if source.get(key) != value or number % value != i % value:
            raise InputError(
                f"layer order: {key} is {value}, so layer {number} cannot become layer {i}; move layers by multiples "
                f"of {value}"
            )
