"""The model card: what a person would publish, and nothing that the lineage does not say."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_fixtures import write
from model_fusion.checkpoint import card
from model_fusion.checkpoint.lineage import licence_of
from model_fusion.checkpoint.verify import verify
from model_fusion.merge import engine


def merged(folder: Path, licences: tuple[str | None, str | None], recipe: dict[str, Any] | None = None) -> Path:
    for seed, (name, licence) in enumerate(zip("ab", licences, strict=True)):
        write(folder / name, seed)
        if licence:
            (folder / name / "README.md").write_text(f"---\nlicense: {licence}\n---\nlicense: not this one\n")
    models = [{"model": m, "parameters": {"weight": w, "density": 0.5}} for m, w in (("a", 0.25), ("b", 0.5))]
    full = {"merge_method": "ties", "base_model": "a", "models": models, "parameters": {"normalize": True}, "seed": 3}
    (folder / "recipe.yml").write_text(json.dumps(full | (recipe or {})))
    return engine.merge(folder / "recipe.yml", folder / "out")


def read(out: Path) -> tuple[dict[str, Any], str]:
    _, head, body = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.mark.parametrize(
    ("licences", "licence", "sentence"),
    [
        (("apache-2.0", "apache-2.0"), "apache-2.0", "Every parent is under `apache-2.0`"),
        (("apache-2.0", "mit"), "other", "`apache-2.0` and `mit`: the terms of all of them apply at once"),
        (("mit", None), "other", "under `mit`, others name no licence"),
        ((None, None), "other", "No parent names its licence"),
    ],
)
def test_licence_follows_the_parents(
    tmp_path: Path, licences: tuple[str | None, str | None], licence: str, sentence: str
) -> None:
    head, body = read(merged(tmp_path, licences))
    assert head["license"] == licence
    assert sentence in body


def test_card_says_where_the_model_comes_from(tmp_path: Path) -> None:
    out = merged(tmp_path, ("mit", "mit"))
    head, body = read(out)
    assert "base_model" not in head  # folders: the hub refuses a card whose base it does not know
    assert {"model-fusion", "merge", "ties"} <= set(head["tags"])
    lineage = (out / "model_fusion.json").read_bytes()
    assert hashlib.sha256(lineage).hexdigest() in body
    for parent in json.loads(lineage)["parents"]:
        assert f"| {parent['model']} | – | mit | `{parent['sha256']}` |" in body
    assert "| normalize | true | recipe |" in body
    assert "| lambda | 1.0 | default |" in body
    assert "| density | of each part | recipe, below |" in body
    assert "seed 3" in body


def test_models_of_the_hub_are_linked(tmp_path: Path) -> None:
    record = json.loads((merged(tmp_path, ("mit", "mit")) / "model_fusion.json").read_text())
    one, two = record["parents"]
    parents = [one | {"model": "org/tiny@v2+folder/lora", "revision": "abc"}, two]
    front = card.build(json.dumps(record | {"parents": parents}).encode()).decode().split("---\n")[1]
    head = yaml.safe_load(front)
    assert head["base_model"] == ["org/tiny"]
    assert head["base_model_relation"] == "merge"


def test_the_recipe_in_the_card_makes_the_same_bytes(tmp_path: Path) -> None:
    """A reader who copies the recipe gets the same model: hashes, card and all."""
    out = merged(tmp_path, ("mit", "mit"))
    text = (out / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "copied.yml").write_text(text)
    again = engine.merge(tmp_path / "copied.yml", tmp_path / "again")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}
    (tmp_path / "copied.yml").write_text(text.replace("density: 0.5", "density: 0.25"))
    other = engine.merge(tmp_path / "copied.yml", tmp_path / "other")
    assert (other / "model.safetensors").read_bytes() != (out / "model.safetensors").read_bytes()


def test_the_card_may_be_edited(tmp_path: Path) -> None:
    out = merged(tmp_path, ("mit", "mit"))
    (out / "README.md").write_text("my own words")
    assert verify(out).tensors


def test_local_folders_above_a_model_are_not_published() -> None:
    assert card._published("/home/me/models/x+./adapters/y") == "x+y"
    assert card._published("owner/name") == "owner/name"


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("license: mit\n", None),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("---\nlicense:\n- mit\n---\n", None),
        ("", None),
    ],
)
def test_licence_is_read_from_the_front_matter(tmp_path: Path, text: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == licence
