"""The eight-task benchmark's rules: one split for all tasks, coefficients chosen without the test data."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("eight_tasks_data"), importlib.import_module("eight_tasks_rows")


def test_an_image_is_in_one_split_of_all_tasks(modules: tuple[ModuleType, ModuleType]) -> None:
    tasks = modules[0].make_tasks(3)
    assert len(tasks) == 8
    for part in ("train", "validation", "test"):
        assert all(torch.equal(getattr(task, part).y, getattr(tasks[0], part).y) for task in tasks)
        plain = getattr(tasks[0], part).x.view(-1, 8, 8)
        turned, inverted = (getattr(tasks[i], part).x.view(-1, 8, 8) for i in (1, 5))
        assert torch.equal(torch.rot90(plain, 1, (1, 2)), turned)
        assert torch.allclose(1 - plain, inverted)
        assert all(
            torch.equal(getattr(t, part).x.sort(dim=1).values, getattr(tasks[0], part).x.sort(dim=1).values)
            for t in tasks[6:]
        )
    sizes = [len(getattr(tasks[0], part).y) for part in ("train", "validation", "test")]
    assert sum(sizes) == 1797
    assert min(sizes) > 300


def chosen_with(rows: ModuleType, patch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """What `tuned` chooses of three states whose validation and test accuracies disagree, and what it read."""
    read: list[str] = []

    def accuracies(setting: Any, state: Any, split: str) -> list[float]:
        read.append(split)
        return [{"validation": (0.2, 0.9, 0.9), "test": (1.0, 0.1, 0.3)}[split][int(state["x"])]]

    patch.setattr(rows, "accuracies", accuracies)
    result = rows.tuned(None, [{"i": i} for i in range(3)], lambda i: {"x": torch.tensor(float(i))})
    return result, read


def test_coefficients_are_chosen_on_validation(
    modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, read = chosen_with(modules[1], monkeypatch)
    assert (result.chosen, result.test, result.validation, result.stored) == ({"i": 1}, [0.1], 0.9, 4)
    assert read == ["validation"] * 3 + ["test"]


def test_every_static_method_of_many_models_has_a_row(modules: tuple[ModuleType, ModuleType]) -> None:
    from model_fusion.merge.methods import all_methods

    wanted = {m.name for m in all_methods() if m.max_models is None and getattr(m, "needs_data", None) is None}
    assert wanted <= set(modules[1].ROWS)
