"""How a checkpoint's tensors appear to peft: which are the weights of linear layers, under which module's name."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from model_fusion.architecture.roles import role_of
from model_fusion.checkpoint.formats import TensorSpec

# headless checkpoints of these families lack the name of the module that the full model puts around them
_OUTER = {"gpt2": "transformer.", "bloom": "transformer.", "gptj": "transformer.", "gpt_neo": "transformer."}
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")


def module_path(name: str, config: Mapping[str, Any]) -> str:
    """The parameter's path inside the model class that the config names."""
    outer = _OUTER.get(str(config.get("model_type")), "")
    full = any(_CAUSAL.search(str(kind)) for kind in config.get("architectures") or [])
    return outer + name if full and outer and not name.startswith((outer, "lm_head.")) else name


def is_linear(spec: TensorSpec, config: Mapping[str, Any]) -> bool:
    """Whether peft can put a LoRA on it: a 2-D weight of a linear layer. Experts and routers are no linear layers
    in transformers 5 (it fuses them into one parameter)."""
    role = role_of(spec.name, config).role
    return (
        spec.dtype.is_floating_point
        and len(spec.shape) == 2
        and min(spec.shape) > 0
        and spec.name.endswith(".weight")
        and role not in ("embedding", "norm", "expert", "router")
        and (role == "head" or "embed" not in spec.name)
    )


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether the config names a causal language model (peft's task_type)."""
    return any(_CAUSAL.search(str(kind)) for kind in config.get("architectures") or [])


def target_names(modules: Iterable[str], every: Iterable[str]) -> list[str]:
    """`modules` as short as peft's matching by name endings allows: "q_proj" where every q_proj is meant."""
    chosen, rest = set(modules), set(every) - set(modules)
    taken = {module.rpartition(".")[2] for module in rest}
    return sorted({m if m.rpartition(".")[2] in taken else m.rpartition(".")[2] for m in chosen})
