"""A toy fusion: an expert that tells whether two readings sum to more than ten, its recipe and its examples."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

PROMPT = "Is the reading low or high? <|sensor|>"
FIELDS = [{"name": name, "type": "float", "low": 0, "high": 10} for name in ("left", "right")]


def answer(item: Any) -> str:
    return "high" if sum(item) > 10 else "low"


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    items = np.random.default_rng(seed).uniform(0, 10, (count, 2)).round(1).tolist()
    return [{"prompt": PROMPT, "inputs": {"sensor": item}, "answer": answer(item)} for item in items]


def write_rows(file: Path, found: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in found))


def write_onnx(file: Path, *, width: int = 2, operator: str = "Identity") -> None:
    """Logits [-s, s] with s = x · 1 - 10 (for width 2), through one more operator."""
    from onnx import TensorProto, helper, save

    weight = np.tile(np.array([[-1.0, 1.0]], dtype=np.float32), (width, 1))
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["s"]),
            helper.make_node(operator, ["s"], ["logits"]),
        ],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])],
        [
            helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.ravel()),
            helper.make_tensor("b", TensorProto.FLOAT, [2], [10.0, -10.0]),
        ],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)


def write_skops(file: Path, columns: int = 2) -> None:
    import skops.io
    from sklearn.linear_model import LogisticRegression

    x = np.random.default_rng(1).uniform(0, 10, (200, columns))
    skops.io.dump(LogisticRegression(max_iter=1000).fit(x, np.where(x.sum(1) > 5 * columns, "high", "low")), file)


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "experts": {"sensor": {"file": "expert.onnx", "inputs": FIELDS, "classes": ["low", "high"]}},
        "bridge": {"kind": "gated", "width": 32},
        "data": "train.jsonl",
        "training": {"steps": 4, "batch_size": 4, "validate_every": 2},
        "dtype": "float32",
        **changes,
    }


def write_recipe(folder: Path, data: dict[str, Any]) -> Path:
    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump(data))
    return file


def write_all(folder: Path, examples: int = 10, **changes: Any) -> Path:
    """Expert, examples and recipe in `folder`; the recipe's path."""
    write_onnx(folder / "expert.onnx")
    write_rows(folder / "train.jsonl", rows(examples))
    return write_recipe(folder, recipe(**changes))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """Run the command line in this process; the exit code."""
    from model_fusion.cli.main import main

    monkeypatch.setattr(sys, "argv", ["model-fusion", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
