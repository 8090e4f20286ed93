"""Experts: small models with a skill. Inputs in, features, decisions and words out; they know no LLM."""

from model_fusion.fuse.experts.base import ClassDecision, Decision, Expert, Features, Given, ValueDecision
from model_fusion.fuse.experts.registry import load_expert, save_expert
from model_fusion.fuse.experts.schema import Field, InputSchema

__all__ = [
    "ClassDecision",
    "Decision",
    "Expert",
    "Features",
    "Field",
    "Given",
    "InputSchema",
    "ValueDecision",
    "load_expert",
    "save_expert",
]
