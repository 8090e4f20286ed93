"""From a recipe to a folder that generates: `model-fusion dynamic twin`, tiny byte-level Llamas."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mix_fixtures
import model_fusion as mf
from model_fusion.checkpoint import verify as verifying
from model_fusion.cli import main as command
from model_fusion.errors import InputError, IntegrityError
from model_fusion.evaluate.safety.audit import _from_lineage
from model_fusion.recipe.twin import load, parse
from model_fusion.run.load import generate
from model_fusion.run.twin import route

WORDS = {"upper": "THE CAT SAT ON THE MAT. ", "digits": "1 22 333 4444 55555. "}


def inputs(folder: Path) -> dict[str, Any]:
    """A base, two experts, and a text that each is for; the recipe's data, paths relative to `folder`."""
    mix_fixtures.write(folder / "base")
    experts = []
    for number, (name, words) in enumerate(WORDS.items()):
        mix_fixtures.write(folder / name, seed=number + 1)
        (folder / f"{name}.txt").write_text(words * 200)
        experts.append({"model": name, "name": name, "texts": [f"{name}.txt"]})
    router = {"window": 16, "tokens": 1600, "steps": 60, "learning_rate": 1e-2, "temperature": 2.0}
    return {"shared": {"base": "base", "lambda": 0.3}, "experts": experts, "rank": 0.25, "router": router}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin")
    (folder / "twin.yml").write_text(yaml.safe_dump(inputs(folder)))
    code = "from model_fusion.cli.main import main\nmain()"
    words = ["dynamic", "twin", str(folder / "twin.yml"), "-o", str(folder / "out")]
    path = {"PYTHONPATH": str(Path(mf.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env={**os.environ, **path}
    )
    assert done.returncode == 0, done.stderr
    assert "router: right on 100.0%" in done.stdout
    assert "shared 0.09 MB, exclusive 0.07 MB, router 0.03 MB; the experts whole: 0.19 MB" in done.stdout
    return folder


def test_the_folder_generates_and_knows_where_prompts_belong(made: Path) -> None:
    twin, tokenizer = mf.TwinForCausalLM.from_pretrained(made / "out"), AutoTokenizer.from_pretrained(made / "out")
    tokenizer.padding_side, tokenizer.pad_token = "left", "!"
    batch = tokenizer([words[:20] for words in WORDS.values()], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    weights = twin.route(**batch)
    assert weights.argmax(-1).tolist() == [0, 1]
    out = twin.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape == (2, batch["input_ids"].shape[1] + 5)
    built = twin.config.built
    assert built["router"]["validation_accuracy"] == 1.0
    assert set(built["experts_sha256"]) == set(WORDS)


def test_the_shared_model_is_the_merge_and_full_rank_gives_the_experts_back(made: Path, tmp_path: Path) -> None:
    recipe = load(made / "twin.yml")
    plain = recipe.router.model_copy(update={"temperature": 1.0})
    full = recipe.model_copy(update={"rank": 1.0, "router": plain})
    assert mf.twin(full, tmp_path / "full", progress=False).router_accuracy == 1.0
    last = [load_file(folder / "router.safetensors")["layers.8.weight"] for folder in (made / "out", tmp_path / "full")]
    torch.testing.assert_close(2.0 * last[0], last[1])  # the first was softened by its temperature
    twin = mf.TwinForCausalLM.from_pretrained(tmp_path / "full")
    ids = torch.arange(40, 60)[None]
    for number, name in enumerate(WORDS):
        expert = AutoModelForCausalLM.from_pretrained(made / name)
        got = twin(ids, expert_weights=torch.eye(2)[number : number + 1]).logits
        torch.testing.assert_close(got, expert(ids).logits, atol=1e-4, rtol=1e-4)
    states = [AutoModelForCausalLM.from_pretrained(made / name).state_dict() for name in ("base", *WORDS)]
    for key, value in AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "shared").state_dict().items():
        summed = states[0][key] + 0.3 * sum(state[key] - states[0][key] for state in states[1:])
        torch.testing.assert_close(value, summed, atol=1e-5, rtol=1e-5)


def test_route_shows_what_generate_weighs(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["THE CAT SAT ON THE", "22 333 4444"]
    words = ["model-fusion", "dynamic", "route", str(made / "out"), "--prompt", prompts[0], "--prompt", prompts[1]]
    monkeypatch.setattr(sys, "argv", words)
    command.main()
    upper, digits = capsys.readouterr().out.splitlines()
    assert upper.startswith("upper ")
    assert digits.startswith("digits ")
    twin, tokenizer = mf.TwinForCausalLM.from_pretrained(made / "out"), AutoTokenizer.from_pretrained(made / "out")
    ids = tokenizer(prompts[1] + "\n", return_tensors="pt")["input_ids"]  # what generate asks without a chat template
    weights = twin.generate(ids, max_new_tokens=1, return_dict_in_generate=True, pad_token_id=0)
    want = weights.past_key_values.expert_weights[0].tolist()
    assert digits == f"digits {want[1]:.2f}, upper {want[0]:.2f}"
    with pytest.raises(InputError, match="no twin here"):
        route(made / "base", ["a"])


def test_lineage_card_and_verify_know_the_folder(made: Path, tmp_path: Path) -> None:
    found = mf.verify(made / "out")
    assert found.inputs == [str((made / name).resolve()) for name in (*WORDS, "base")]
    record = json.loads((made / "out" / "model_fusion.json").read_text())
    assert record["parts"] == ["shared"]
    assert _from_lineage(made / "out") == ([str((made / name).resolve()) for name in WORDS], str(made / "base"))
    assert found.tensors == len(record["tensors"]) + len(
        json.loads((made / "out/shared/model_fusion.json").read_text())["tensors"]
    )
    card = (made / "out" / "README.md").read_text()
    assert "A twin of upper, digits" in card
    assert "The router is right on 100.0% of the validation text" in card
    shutil.copytree(made / "out", tmp_path / "copy")
    for name, what in (("router", "router.safetensors"), ("shared/model", "shared/model.safetensors")):
        file = tmp_path / "copy" / f"{name}.safetensors"
        old = file.read_bytes()
        file.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=f"{what}: tensor .* changed since it was written"):
            mf.verify(tmp_path / "copy")
        file.write_bytes(old)
    mf.verify(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "shared")
    with pytest.raises(IntegrityError, match="shared: removed since it was written"):
        mf.verify(tmp_path / "copy")


def test_a_verify_that_skips_the_parts_is_seen(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verifying.read_lineage

    def without(folder: Path) -> tuple[dict[str, Any], str]:
        return {key: value for key, value in real(folder)[0].items() if key != "parts"}, ""

    monkeypatch.setattr(verifying, "read_lineage", without)
    assert str((made / "base").resolve()) not in mf.verify(made / "out").inputs


def test_generate_command_opens_it(made: Path) -> None:
    [(_, said)] = generate(made / "out", prompt="THE CAT", max_new_tokens=4)
    tokenizer, twin = AutoTokenizer.from_pretrained(made / "out"), mf.TwinForCausalLM.from_pretrained(made / "out")
    ids = tokenizer("THE CAT\n", return_tensors="pt")["input_ids"]  # what the command asks without a chat template
    out = twin.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert said == tokenizer.decode(out[0, ids.shape[1] :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rnk": 0.1}, "unknown key 'rnk'; did you mean 'rank'"),
        ({"rank": 0}, "rank: Input should be greater than 0"),
        ({"shared": {"base": "base"}}, "base and lambda belong together"),
        ({"shared": {"base": "base", "lamda": 1}}, "did you mean 'lambda'"),
        ({"shared": {}}, "give one of `model`, `base`"),
        ({"experts": [{"model": "a", "name": "a", "texts": ["a"]}] * 2}, "two experts are called 'a'"),
        ({"experts": []}, "experts"),
    ],
)
def test_a_wrong_recipe_is_one_line(change: dict[str, Any], message: str) -> None:
    data = {"shared": "base", "experts": [{"model": n, "name": n, "texts": [n]} for n in "ab"], **change}
    with pytest.raises(InputError) as error:
        parse(data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_inside_a_shared_merge_start_from_the_recipe(tmp_path: Path) -> None:
    for name in ("a", "b", "t"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.gram.safetensors").touch()
    models = [{"model": name, "statistics": f"{name}.gram.safetensors"} for name in "ab"]
    data = {
        "shared": {"merge": {"merge_method": "regmean", "models": models, "tokenizer_source": "b"}},
        "experts": [{"model": name, "name": name, "texts": ["t"]} for name in "ab"],
    }
    (tmp_path / "twin.yml").write_text(yaml.safe_dump(data))
    merge = load(tmp_path / "twin.yml").merge_recipe()
    at = tmp_path.resolve()
    assert [one["statistics"] for one in merge["models"]] == [str(at / f"{name}.gram.safetensors") for name in "ab"]
    assert (merge["models"][1]["model"], merge["tokenizer_source"]) == (str(at / "b"), str(at / "b"))


def test_short_texts_and_existing_folders_leave_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load(made / "twin.yml")
    (tmp_path / "short.txt").write_text("few words")
    short = recipe.experts[0].model_copy(update={"texts": [str(tmp_path / "short.txt")]})
    with pytest.raises(InputError, match=r"'upper': .* fewer than one window"):
        mf.twin(recipe.model_copy(update={"experts": [short, recipe.experts[1]]}), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]
    monkeypatch.setattr(
        sys, "argv", ["model-fusion", "dynamic", "twin", str(made / "twin.yml"), "-o", str(made / "out")]
    )
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 2
    assert "already exists: pass --overwrite" in capsys.readouterr().err
    assert json.loads((made / "out" / "config.json").read_text())["model_type"] == "model_fusion_twin"
