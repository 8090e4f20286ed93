"""Models with different vocabularies, merged by token: what is written is what transformers reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from architecture_fixtures import save
from model_fusion.errors import InputError
from model_fusion.merge import engine, prepare
from model_fusion.recipe.merge import parse
from tokenizer_fixtures import CORPUS, put, table, train

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = {"a": CORPUS, "b": "sunny dogs dream of warm summers in the sun"}
SPECIAL = {"a": ("<eos>",), "b": ("<think>", "<eos>")}
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Llamas: `a` has 40 tokens, `b` 48 under other numbers; `p` is `a` padded to 64 rows, like Qwen."""
    room = tmp_path_factory.mktemp("models")
    for seed, (name, words, size) in enumerate([("a", "a", 40), ("b", "b", 48), ("p", "a", 40)]):
        folder = save("llama", room / name, seed)
        put(folder, train(WORDS[words], size, SPECIAL[words]), chat_template=f"{{{{ '{name}' }}}}")
        state = load_file(folder / "model.safetensors")
        rows = 64 if name == "p" else size
        save_file(
            {k: v[:rows] if k in (EMBEDDING, HEAD) else v for k, v in state.items()}, folder / "model.safetensors"
        )
        config = json.loads((folder / "config.json").read_text())
        config |= {"vocab_size": rows, "eos_token_id": SPECIAL[words].index("<eos>"), "bos_token_id": None}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config["eos_token_id"]}))
    return room


def run(models: Path, out: Path, *names: str, **recipe: Any) -> Path:
    entries = [{"model": str(models / name)} for name in names]
    full = {"merge_method": "linear", "models": entries, "parameters": {"weight": 1.0}, **recipe}
    text = json.dumps(full)
    for name in "abp":
        text = text.replace(f'"@{name}"', json.dumps(str(models / name)))
    return engine.merge(parse(json.loads(text)), out)


def tokens(folder: Path) -> dict[str, int]:
    return table(json.loads((folder / "tokenizer.json").read_text()))


def weights(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def by_token(models: Path, names: str, base: str | None, name: str) -> dict[str, Tensor]:
    """Token → merged row by mergekit's documented rules, in float64, one token at a time."""
    own = {m: (tokens(models / m), weights(models / m)[name].double()) for m in names}
    rows = {}
    for token in set().union(*(ids for ids, _ in own.values())):
        holders = [m for m in names if token in own[m][0]]
        default = [base] if base in holders else holders
        total = torch.zeros(16, dtype=torch.float64)
        for model in names:
            donors = [model] if model in holders else default
            total += sum(own[d][1][own[d][0][token]] for d in donors) / len(donors)
        rows[token] = total / len(names)
    return rows


def check(models: Path, out: Path, base: str | None) -> None:
    ids, got = tokens(out), weights(out)
    for name in (EMBEDDING, HEAD):
        expected = by_token(models, "ab", base, name)
        assert got[name].shape[0] >= len(ids)
        for token, row in ids.items():
            assert torch.allclose(got[name][row].double(), expected[token], rtol=2**-7, atol=1e-7), (name, token)


@pytest.mark.parametrize("base", [None, "a", "b"])
def test_union_merges_by_token(models: Path, tmp_path: Path, base: str | None) -> None:
    extra = {"base_model": f"@{base}"} if base else {}
    out = run(models, tmp_path / "out", "a", "b", tokenizer_source="union", **extra)
    assert set(tokens(out)) == set(tokens(models / "a")) | set(tokens(models / "b"))
    check(models, out, base)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert tokenizer.get_vocab() == tokens(out)
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<eos>")
    text = "sunny dogs dream<think> of the mat"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert model(ids).logits.isfinite().all()


def test_merging_by_row_turns_the_union_test_red(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_row(self: Any, model: str, read: Callable[[str], Tensor]) -> Tensor:
        return torch.nn.functional.pad(read(model), (0, 0, 0, self.rows - len(read(model))))

    monkeypatch.setattr(prepare.RowMap, "remap", by_row)
    out = run(models, tmp_path / "out", "a", "b", tokenizer_source="union")
    with pytest.raises(AssertionError):
        check(models, out, None)


@pytest.mark.parametrize("source", ["base", "@b", "model:@b"])
def test_one_model_s_tokenizer(models: Path, tmp_path: Path, source: str) -> None:
    extra = {"base_model": "@a"}
    source = source.replace("model:@b", f"model:{models / 'b'}")
    out = run(models, tmp_path / "out", "a", "b", tokenizer_source=source, **extra)
    which = "a" if source == "base" else "b"
    assert tokens(out) == tokens(models / which)
    check(models, out, "a")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == tokens(out)["<eos>"]


def test_padding_stays_and_grows_to_a_multiple(models: Path, tmp_path: Path) -> None:
    base = {"base_model": "@p"}
    plain = weights(run(models, tmp_path / "plain", "p", "a", tokenizer_source="base", **base))
    p, a = weights(models / "p")[EMBEDDING], weights(models / "a")[EMBEDDING]
    assert plain[EMBEDDING].shape[0] == 64
    assert torch.equal(plain[EMBEDDING][40:], p[40:])
    assert torch.equal(plain[EMBEDDING][:40], ((p[:40].float() + a.float()) / 2).bfloat16())
    spec = {"source": "union", "pad_to_multiple_of": 48}
    out = run(models, tmp_path / "more", "p", "b", tokenizer=spec)
    assert weights(out)[HEAD].shape[0] == json.loads((out / "config.json").read_text())["vocab_size"] == 96


def test_padding_that_differs_is_refused_with_the_way_out(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is \[40, 16\], .* has \[64, 16\] \(tokenizer_source: base"):
        run(models, tmp_path / "out", "p", "a")


def test_per_token_sources(models: Path, tmp_path: Path) -> None:
    wanted = {
        "<eos>": {"source": "@b", "force": True},
        "<new>": {"source": {"kind": "model_token", "model": "@a", "token": "<eos>"}},
        "<none>": {"source": {"kind": "zero"}},
    }
    out = run(models, tmp_path / "out", "a", "b", tokenizer={"source": "union", "tokens": wanted})
    got, ids = weights(out)[EMBEDDING], tokens(out)
    assert torch.equal(got[ids["<eos>"]], weights(models / "b")[EMBEDDING][tokens(models / "b")["<eos>"]])
    assert torch.equal(got[ids["<new>"]], weights(models / "a")[EMBEDDING][tokens(models / "a")["<eos>"]])
    assert not got[ids["<none>"]].any()
    report = json.loads((out / "tokenizer_report.json").read_text())
    assert report["filled"]["<think>"]["from"] == str(models / "b")
    assert report["filled"]["<none>"]["from"] == "zero"


def test_chat_templates(models: Path, tmp_path: Path) -> None:
    chosen = {"auto": "{{ 'a' }}", "{{ 'mine' }}": "{{ 'mine' }}", "chatml": "<|im_start|>"}
    for number, (asked, written) in enumerate(chosen.items()):
        out = run(models, tmp_path / str(number), "a", "p", tokenizer_source="base", chat_template=asked)
        assert written in (out / "chat_template.jinja").read_text()
        assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
        assert AutoTokenizer.from_pretrained(out).chat_template is not None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no word on tokenizers": ({}, "its vocabulary differs.*tokenizer_source"),
    "both keys": ({"tokenizer_source": "base", "tokenizer": {"source": "base"}}, "not both"),
    "typo in tokenizer": ({"tokenizer": {"sorce": "base"}}, "did you mean 'source'"),
    "typo in token": ({"tokenizer": {"tokens": {"x": {"source": "@a", "forse": True}}}}, "did you mean 'force'"),
    "kind": ({"tokenizer": {"tokens": {"x": {"source": {"kind": "zer"}}}}}, "did you mean 'zero'"),
    "token and id": (
        {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "@a"}}}}},
        "either `token` or `token_id`",
    ),
    "row that is not there": (
        {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "@a", "token_id": 99}}}}},
        "wants row 99",
    ),
    "token that is not there": ({"tokenizer": {"tokens": {"x": {"source": "@a"}}}}, "no embedding of token 'x'"),
    "padding of 0": ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of"),
    "template word": ({"tokenizer_source": "union", "chat_template": "chatlm"}, "chat_template 'chatlm'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_line(models: Path, tmp_path: Path, case: str) -> None:
    recipe, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        run(models, tmp_path / "out", "a", "b", **recipe)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda b: (b / "tokenizer.json").unlink(), "no tokenizer files"),
    "damaged": (lambda b: (b / "tokenizer.json").write_text("{"), r"tokenizer\.json: not valid JSON"),
    "another kind": (
        lambda b: (b / "tokenizer.json").write_text(
            json.dumps({"model": {"type": "Unigram", "unk_id": 0, "vocab": [[f"x{i}", 0.0] for i in range(48)]}})
        ),
        "different kinds",
    ),
    "two tokens of one id": (
        lambda b: (b / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0, "y": 0}}})),
        "share id 0",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_tokenizer_files_that_cannot_be_united(models: Path, tmp_path: Path, case: str) -> None:
    change, message = FILES[case]
    room = tmp_path / "room"
    shutil.copytree(models, room)
    change(room / "b")
    with pytest.raises(InputError, match=message) as caught:
        run(room, tmp_path / "out", "a", "b", tokenizer_source="union")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["room"]
