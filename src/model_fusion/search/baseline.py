"""Plain task arithmetic, which every search is compared with: base + λ Σ (model − base), λ from a small grid."""

from __future__ import annotations

from collections.abc import Sequence

from model_fusion.recipe.merge import MergeRecipe, ModelEntry

SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def plain(recipe: MergeRecipe, base: str | None = None) -> list[tuple[float, MergeRecipe]]:
    """(λ, recipe) of the same models; `base` where the recipe names none.

    Without any base only λ = 1/T is defined, where base + 1/T Σ (model − base) is the mean of T models for every base.
    """
    base = base or _base(recipe)
    every = [recipe, *recipe.merges.values()]
    names = dict.fromkeys(name for part in every for name in part.model_names() if name not in recipe.merges)
    models = [name for name in names if name != base]
    if base is None:
        return [(1 / len(models), _recipe(recipe, "linear", models, None, {}))]
    return [
        (scale, _recipe(recipe, "task_arithmetic", models, base, {"lambda": scale, "weight": 1.0})) for scale in SCALES
    ]


def _base(recipe: MergeRecipe) -> str | None:
    bases = [part.base_model for part in (recipe, *recipe.merges.values())]
    return next((base for base in bases if base and base not in recipe.merges), None)


def _recipe(
    recipe: MergeRecipe, method: str, models: Sequence[str], base: str | None, parameters: dict[str, float]
) -> MergeRecipe:
    """Output settings (dtype, tokenizer …) are the recipe's own."""
    own = recipe.model_dump(include={"dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "seed"})
    entries = [ModelEntry(model=model, parameters={} if base else {"weight": 1.0}) for model in models]
    return MergeRecipe.model_validate(
        own | {"merge_method": method, "models": entries, "base_model": base, "parameters": parameters}
    )
