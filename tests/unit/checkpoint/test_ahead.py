"""Hashes taken while torch is imported are those of the bytes, and a merge that uses them writes the same."""

import hashlib
import json
from pathlib import Path

import pytest

from merge_fixtures import tensors, write
from model_fusion.checkpoint.ahead import Ahead
from model_fusion.checkpoint.formats import read_header
from model_fusion.merge.engine import merge


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        write(tmp_path / name, seed)
    (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "linear", "models": [{"model": m} for m in "ab"]}))
    return tmp_path / "r.yml"


def finished(recipe: Path) -> Ahead:
    ahead = Ahead(recipe)
    ahead._thread.join()
    return ahead


def lineage(recipe: Path, name: str, ahead: Ahead | None) -> str:
    return (merge(recipe, recipe.parent / name, ahead=ahead) / "model_fusion.json").read_text()


def test_every_tensor_is_hashed(recipe: Path) -> None:
    ahead = finished(recipe)
    for model in "ab":
        file = recipe.parent / model / "model.safetensors"
        entries = read_header(file)
        assert len(entries) == len(tensors(0))
        for entry in entries:
            want = hashlib.sha256(file.read_bytes()[entry.begin : entry.end]).hexdigest()
            assert ahead.digest(file, entry.begin, entry.end) == want
    assert ahead.digest(file, 0, 4) is None


def test_the_lineage_is_the_same_with_and_without(recipe: Path) -> None:
    assert lineage(recipe, "one", finished(recipe)) == lineage(recipe, "two", None)


def test_the_lineage_check_goes_red_when_a_hash_is_wrong(recipe: Path) -> None:
    ahead = finished(recipe)
    ahead._done = dict.fromkeys(ahead._done, "0" * 64)
    assert lineage(recipe, "one", ahead) != lineage(recipe, "two", None)


@pytest.mark.parametrize("text", ["", "[", "models: [{model: a}, {model: nowhere}]", "models: 3"])
def test_what_it_cannot_read_it_leaves_to_the_merge(recipe: Path, text: str) -> None:
    (recipe.parent / "a" / "model.safetensors").write_bytes(b"\xff" * 40)
    recipe.write_text(text)
    assert finished(recipe)._done == {}
