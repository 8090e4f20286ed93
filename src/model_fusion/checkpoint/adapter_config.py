"""`adapter_config.json` as peft reads it. Every product is stored with its scale inside, so alpha equals rank."""

import json
from collections.abc import Mapping, Sequence


def build(
    ranks: Mapping[str, int],
    targets: Sequence[str],
    *,
    base: str,
    causal: bool,
    transposed: bool,
    saved: Sequence[str] = (),
) -> bytes:
    """The file for modules → ranks. `targets`: names as peft matches them; `saved`: modules kept whole."""
    common = max(set(ranks.values()), key=lambda r: (list(ranks.values()).count(r), r)) if ranks else 1
    own = {module: rank for module, rank in sorted(ranks.items()) if rank != common}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "target_modules": list(targets),
        "modules_to_save": list(saved) or None,
        "rank_pattern": own,
        "alpha_pattern": own,
    }
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
