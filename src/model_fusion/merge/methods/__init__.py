"""Merge methods: pure functions of float32 tensors, one family a file, all found through the registry."""

from model_fusion.merge.methods import dare, della, linear, model_stock, sce, slerp, task_arithmetic, ties
from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, all_methods, build, get, register

__all__ = ["Key", "Method", "NoParams", "Sees", "all_methods", "build", "get", "register"]

_FAMILIES = (dare, della, linear, model_stock, sce, slerp, task_arithmetic, ties)
