"""Merge methods: pure functions of float32 tensors, one family a file, all found through the registry."""

from model_fusion.merge.methods import (
    arcee_fusion,
    consensus,
    dare,
    data_based,
    della,
    linear,
    model_stock,
    nearswap,
    ram,
    safemerge,
    sce,
    slerp,
    sphere,
    subspace,
    task_arithmetic,
    ties,
)
from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, all_methods, build, get, register
from model_fusion.merge.methods.state_dicts import global_cuts, merge_state_dicts

__all__ = [
    "Key",
    "Method",
    "NoParams",
    "Sees",
    "all_methods",
    "build",
    "get",
    "global_cuts",
    "merge_state_dicts",
    "register",
]

_FAMILIES = (
    arcee_fusion,
    consensus,
    dare,
    data_based,
    della,
    linear,
    model_stock,
    nearswap,
    ram,
    safemerge,
    sce,
    slerp,
    sphere,
    subspace,
    task_arithmetic,
    ties,
)
