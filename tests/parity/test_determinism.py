"""Two runs, one and two threads, any chunk size: the same bytes, for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from merge_fixtures import write, write_statistics
from model_fusion.merge.engine import merge
from model_fusion.merge.methods import Key, Method, all_methods, blocks, build

METHODS = all_methods()
GIVEN: dict[str, dict[str, Any]] = {"nearswap": {"t": 0.1}, "sce": {"select_topk": 0.5}}
MODELS = {"slerp": 1}


def count_of(method: Method) -> int:
    return MODELS.get(method.name, min(method.max_models or 2, 2))


def each_of(method: Method) -> dict[str, float]:
    return {"density": 0.5} if "density" in method.model_params.__dataclass_fields__ else {}


def merged(method: Method, threads: int, chunk: int) -> torch.Tensor:
    """Of tensors large enough for torch to split an operation between threads."""
    g = torch.Generator().manual_seed(1)
    base = (torch.randn(300, 1000, generator=g) * 0.02).bfloat16()
    models = [(base + torch.randn(300, 1000, generator=g) * 1e-3).bfloat16() for _ in range(count_of(method))]
    data = None
    if method.needs_data is not None:
        data = [torch.randn(300, 1000, generator=g).square() for _ in models]
        data = [x.T @ x for x in data] if method.needs_data == "gram" else data
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return method.run(
            models,
            None if method.needs_base == "forbidden" else base,
            [build(method.model_params, each_of(method), method.name)] * len(models),
            build(method.params, GIVEN.get(method.name, {}), method.name),
            Key(3, "w", depth=0.5, data=data),
            chunk_size=chunk,
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_threads_and_chunks_change_no_bit(method: Method) -> None:
    whole = merged(method, 1, 1 << 20)
    assert torch.equal(whole, merged(method, 2, 1 << 17))
    assert torch.equal(whole, merged(method, 1, 10_007))


def test_the_thread_check_goes_red(monkeypatch: pytest.MonkeyPatch) -> None:
    method = next(m for m in METHODS if m.name == "dare_ties")
    real = blocks.total
    loose = lambda values: real(values) * (1 + 1e-3 * torch.get_num_threads() * float(values[0] > 0))  # noqa: E731
    monkeypatch.setattr("model_fusion.merge.methods.dare.total", loose)
    assert not torch.equal(merged(method, 1, 1 << 20), merged(method, 2, 1 << 20))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_two_runs_and_two_thread_counts_write_the_same_files(method: Method, tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        write(tmp_path / name, seed)
    models: list[dict[str, Any]] = [{"model": n} for n in "ab"[: count_of(method)]]
    text: dict[str, Any] = {"merge_method": method.name, "models": models, "seed": 5}
    if method.needs_base == "required" or method.name == "slerp":
        text["base_model"] = "c"
    if method.name == "slerp":
        models.append({"model": "c"})
    text["parameters"] = {**each_of(method), **GIVEN.get(method.name, {})}
    if method.name.startswith("della"):
        text["parameters"]["epsilon"] = 0.2
    if method.needs_data is not None:
        for entry in models:
            entry["statistics"] = write_statistics(tmp_path, entry["model"], method.needs_data)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(text))
    runs = [merge(tmp_path / "recipe.yml", tmp_path / f"out{i}", threads=t) for i, t in enumerate((1, 2, 2))]
    assert bytes_of(runs[0]) == bytes_of(runs[1]) == bytes_of(runs[2])
