"""What a recipe's text may look like: numbers as YAML files in the wild write them, mergekit's other spellings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from model_fusion.errors import InputError
from model_fusion.recipe.merge import load, parse
from model_fusion.recipe.parameters import fitted
from model_fusion.recipe.reading import yaml_documents


def read(folder: Path, text: str) -> Any:
    (folder / "r.yml").write_text(text)
    return yaml_documents(folder / "r.yml")[0]


def test_a_number_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    """mergekit's documentation writes karcher's tol as 1e-5, which YAML 1.1 takes for a text."""
    text = "[1e-5, -2.E3, +1e+3, 1e, '1e-5']"
    assert read(tmp_path, text) == [1e-5, -2e3, 1e3, "1e", "1e-5"]
    assert yaml.safe_load(text)[0] == "1e-5"  # what the test above guards against


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "m:\n- {w: 1, w: 2}\n"])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"r\.yml, line [23]: not valid YAML \(key '[aw]' stands twice\)"):
        read(tmp_path, text)


def test_anchors_and_merged_keys_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, "- &m {a: 1, b: 2}\n- {<<: *m, a: 3}\n")[1] == {"a": 3, "b": 2}


LINEAR: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}


def test_models_taken_apart_are_texts() -> None:
    whole = {"model": {"path": "o/n", "revision": "v1"}, "lora": {"path": "l"}, "override_architecture": None}
    apart = {**LINEAR, "base_model": {"model": {"path": "x"}}, "models": [{"model": whole}, {"model": {"path": "y"}}]}
    assert parse(apart).model_names() == ["o/n@v1+l", "y", "x"]


def test_random_seed_is_the_seed(tmp_path: Path) -> None:
    assert parse(LINEAR | {"random_seed": 7}).seed == 7
    (tmp_path / "r.yml").write_text(
        "name: one\nmerge_method: linear\nrandom_seed: 3\nmodels: [{model: a}]\n---\n"
        "merge_method: linear\nrandom_seed: 4\nmodels: [{model: one}]\n"
    )
    both = load(tmp_path / "r.yml")
    assert (both.seed, both.merges["one"].seed) == (4, 3)


def stack(**more: Any) -> dict[str, Any]:
    return {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}], **more}]}


def test_a_residual_weight_of_null_is_no_key() -> None:
    assert parse(stack(residual_weight=None)).slices is not None


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (LINEAR | {"random_seed": 7, "seed": 8}, "seed and random_seed are one thing"),
        (stack(residual_weight=0.5), "residual_weight does nothing, in mergekit neither: remove it"),
        (LINEAR | {"base_model": {"pth": "x"}}, "unknown key 'pth'; valid: lora, model"),
        (LINEAR | {"base_model": {"model": {"path": "x", "revison": "y"}}}, "did you mean 'revision'"),
        (LINEAR | {"base_model": {"model": 3}}, "give a text, or a mapping with `path`"),
        (LINEAR | {"models": ["a", "b"]}, r"models\[0\]: expected a mapping such as `model: a`"),
        (LINEAR | {"models": {"model": "a"}}, "models: expected a list"),
    ],
)
def test_refused_with_the_way_out(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(recipe)


@dataclass(frozen=True)
class Params:
    weight: float = 1.0
    count: int = 1
    flag: bool = False
    share: float | None = None
    rescale: bool | Literal["l1", "1/d"] = True
    word: str = ""


def test_values_take_the_types_of_their_fields() -> None:
    given = {"weight": "0.5", "count": 10.0, "flag": 1, "share": None, "rescale": "1/d", "word": "x"}
    got = Params(**fitted(Params, given))
    assert got == Params(0.5, 10, True, None, "1/d", "x")
    assert [type(value) for value in (got.weight, got.count, got.flag)] == [float, int, bool]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", "high", "weight must be a number, got 'high'"),
        ("weight", True, "weight must be a number"),
        ("weight", float("nan"), "weight must be a number"),
        ("count", 2.5, "count must be a whole number"),
        ("flag", 0.5, "flag must be true or false"),
        ("rescale", "l2", "rescale must be true or false or 'l1' or '1/d', got 'l2'"),
        ("word", 3, "word must be a text"),
    ],
)
def test_other_types_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fitted(Params, {name: value})
