"""Tasks: an expert, prompts, splits and a score each. This registry is the only list of their names."""

from __future__ import annotations

from typing import Any

from model_fusion.errors import InputError
from model_fusion.evaluate.tasks.base import Task

NAMES = ("blackjack", "digits", "diabetes")


def task(name: str, **options: Any) -> Task:
    """Make a task by name; options as its factory takes them. Raises InputError for an unknown name."""
    if name == "blackjack":
        from model_fusion.evaluate.tasks.blackjack import blackjack_task

        return blackjack_task(**options)
    if name == "digits":
        from model_fusion.evaluate.tasks.digits import digits_task

        return digits_task(**options)
    if name == "diabetes":
        from model_fusion.evaluate.tasks.diabetes import diabetes_task

        return diabetes_task(**options)
    raise InputError(f"unknown task {name!r}: one of {', '.join(NAMES)}")
