"""model-fusion: make one model out of several. Importing this loads neither torch nor transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from model_fusion.errors import InputError, IntegrityError, MissingDependencyError, ModelFusionError

if TYPE_CHECKING:
    import model_fusion.fuse as fuse
    import model_fusion.mix as mix
    import model_fusion.search as search
    from model_fusion.checkpoint.statistics import Statistics
    from model_fusion.checkpoint.verify import verify
    from model_fusion.dynamic.causal_lm import TwinConfig, TwinForCausalLM
    from model_fusion.dynamic.ensemble import Ensemble, ensemble
    from model_fusion.dynamic.masks import Masks, emr, tall
    from model_fusion.dynamic.parts import exclusive
    from model_fusion.dynamic.twin import TwinModel
    from model_fusion.evaluate.audit import audit
    from model_fusion.evaluate.safety.audit import audit as audit_safety
    from model_fusion.evaluate.safety.repair import repair as repair_safety
    from model_fusion.fuse.bridges import CrossAttention, Gated, Logit, Lora, Prefix, Tool
    from model_fusion.fuse.estimator import FusedClassifier, FusedRegressor
    from model_fusion.fuse.experts import Expert, Field, Given, InputSchema
    from model_fusion.fuse.fit import Example
    from model_fusion.fuse.model import FusedModel
    from model_fusion.merge.calibration import (
        Coefficients,
        adamerging,
        collect_merged_statistics,
        collect_statistics,
    )
    from model_fusion.merge.engine import merge
    from model_fusion.merge.inspect import inspect
    from model_fusion.merge.methods import merge_state_dicts
    from model_fusion.run.masks import unmask, write_masks
    from model_fusion.run.twin import twin

__version__ = "0.1.0.dev0"

_RENAMED = {
    "audit_safety": ("model_fusion.evaluate.safety.audit", "audit"),
    "repair_safety": ("model_fusion.evaluate.safety.repair", "repair"),
}
_HOMES = {
    **dict.fromkeys(("FusedClassifier", "FusedRegressor"), "model_fusion.fuse.estimator"),
    "FusedModel": "model_fusion.fuse.model",
    "Example": "model_fusion.fuse.fit",
    **dict.fromkeys(("Ensemble", "ensemble"), "model_fusion.dynamic.ensemble"),
    "Statistics": "model_fusion.checkpoint.statistics",
    **dict.fromkeys(
        ("Coefficients", "adamerging", "collect_merged_statistics", "collect_statistics"),
        "model_fusion.merge.calibration",
    ),
    "audit": "model_fusion.evaluate.audit",
    "inspect": "model_fusion.merge.inspect",
    "merge_state_dicts": "model_fusion.merge.methods",
    "verify": "model_fusion.checkpoint.verify",
    **dict.fromkeys(("TwinForCausalLM", "TwinConfig"), "model_fusion.dynamic.causal_lm"),
    **dict.fromkeys(("Masks", "emr", "tall"), "model_fusion.dynamic.masks"),
    "TwinModel": "model_fusion.dynamic.twin",
    "exclusive": "model_fusion.dynamic.parts",
    "twin": "model_fusion.run.twin",
    **dict.fromkeys(("unmask", "write_masks"), "model_fusion.run.masks"),
    **dict.fromkeys(("CrossAttention", "Gated", "Logit", "Lora", "Prefix", "Tool"), "model_fusion.fuse.bridges"),
    **dict.fromkeys(("Expert", "Field", "Given", "InputSchema"), "model_fusion.fuse.experts"),
}


def __getattr__(name: str) -> Any:
    if name in ("fuse", "merge", "mix", "search"):  # the verb and the package share a name: the package is callable
        return importlib.import_module(f"model_fusion.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _RENAMED:
        home, own = _RENAMED[name]
        return getattr(importlib.import_module(home), own)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Coefficients",
    "CrossAttention",
    "Ensemble",
    "Example",
    "Expert",
    "Field",
    "FusedClassifier",
    "FusedModel",
    "FusedRegressor",
    "Gated",
    "Given",
    "InputError",
    "InputSchema",
    "IntegrityError",
    "Logit",
    "Lora",
    "Masks",
    "MissingDependencyError",
    "ModelFusionError",
    "Prefix",
    "Statistics",
    "Tool",
    "TwinConfig",
    "TwinForCausalLM",
    "TwinModel",
    "adamerging",
    "audit",
    "audit_safety",
    "collect_merged_statistics",
    "collect_statistics",
    "emr",
    "ensemble",
    "exclusive",
    "fuse",
    "inspect",
    "merge",
    "merge_state_dicts",
    "mix",
    "repair_safety",
    "search",
    "tall",
    "twin",
    "unmask",
    "verify",
    "write_masks",
]
