"""Reading, comparing and uniting vocabularies, checked against the tokenizers library."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from model_fusion.errors import InputError
from model_fusion.tokenizer.chat_templates import BUILT_IN, choose, template_of, with_template
from model_fusion.tokenizer.compare import Relation, compare
from model_fusion.tokenizer.table import TokenTable, read_table
from model_fusion.tokenizer.unite import output_files, unite
from tokenizer_fixtures import CORPUS, table, train

A = train(CORPUS, 60, ("<eos>",))
B = train("sunny dogs dream of warm summers in the sun", 60, ("<eos>", "<think>"))


def read(data: dict[str, Any]) -> TokenTable:
    found = read_table({"tokenizer.json": json.dumps(data).encode()}, "m")
    assert found is not None
    return found


@pytest.mark.parametrize("data", [A, B])
def test_the_table_is_what_the_library_reads(data: dict[str, Any]) -> None:
    assert read(data).ids == table(data)


@pytest.mark.parametrize(
    ("first", "second", "rows", "relation"),
    [
        ({"a": 0, "b": 1}, {"a": 0, "b": 1}, (2, 2), Relation.EQUAL),
        ({"a": 0, "b": 1}, {"a": 0, "b": 1}, (2, 8), Relation.PADDED),
        ({"a": 0, "b": 1}, {"a": 1, "b": 0}, (2, 2), Relation.PERMUTED),
        ({"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2}, (2, 3), Relation.SUBSET),
        ({"a": 0, "b": 1}, {"a": 1, "c": 0}, (2, 2), Relation.DIFFERENT),
    ],
)
def test_relations(first: dict[str, int], second: dict[str, int], rows: tuple[int, int], relation: Relation) -> None:
    assert compare(first, second, rows) is relation


def test_a_union_keeps_the_base_and_holds_every_token() -> None:
    union = unite({"a": read(A), "b": read(B)}, "a")
    assert set(union.ids) == set(table(A)) | set(table(B))
    assert {t: union.ids[t] for t in table(A)} == table(A)
    assert sorted(union.ids.values()) == list(range(len(union.ids)))
    assert table(union.raw or {}) == union.ids


def test_new_tokens_are_reached_by_text() -> None:
    union = Tokenizer.from_str(json.dumps(unite({"a": read(A), "b": read(B)}, "a").raw))
    text = "sunny dogs dream<think> of the mat<eos>"
    assert union.decode(union.encode(text).ids, skip_special_tokens=False) == text
    new = set(union.encode(text).tokens) - set(table(A))
    assert "<think>" in new
    assert len(new) > 1, "no ordinary token of the second tokenizer is ever used"


def test_without_its_merges_a_new_token_is_dead() -> None:
    """The mutation beside the test above."""
    raw = json.loads(json.dumps(unite({"a": read(A), "b": read(B)}, "a").raw))
    raw["model"]["merges"] = A["model"]["merges"]
    tokens = Tokenizer.from_str(json.dumps(raw)).encode("sunny dogs dream<think> of the mat<eos>").tokens
    letters = {t for t in tokens if len(t) == 1}
    assert set(tokens) - set(table(A)) - letters == {"<think>"}


def test_named_tokens_are_added_once() -> None:
    made = unite({"a": read(A)}, "a", ["<new>", "<eos>"])
    assert made.ids == {**table(A), "<new>": len(table(A))}
    files = output_files({"tokenizer.json": json.dumps(A).encode(), "merges.txt": b"old"}, made, "a")
    assert set(files) == {"tokenizer.json"}
    assert Tokenizer.from_str(files["tokenizer.json"].decode()).get_vocab() == made.ids


def test_unigram_and_wordpiece_unions_read_back() -> None:
    def unigram(words: list[str]) -> dict[str, Any]:
        return {"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": [
            ["<unk>", 0.0], *([w, -float(i + 1)] for i, w in enumerate(words))]}}  # fmt: skip

    def wordpiece(words: list[str]) -> dict[str, Any]:
        model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                 "max_input_chars_per_word": 100, "vocab": {w: i for i, w in enumerate(["[UNK]", *words])}}  # fmt: skip
        return {"version": "1.0", "added_tokens": [], "model": model}

    for make in (unigram, wordpiece):
        union = unite({"a": read(make(["cat", "dog"])), "b": read(make(["dog", "sun"]))}, "a", ["<x>"])
        assert list(union.ids)[-2:] == ["sun", "<x>"]
        assert table(union.raw or {}) == union.ids


def test_kinds_that_cannot_be_joined_are_refused() -> None:
    other = {"added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": [["x", 0.0]]}}
    with pytest.raises(InputError, match="different kinds"):
        unite({"a": read(A), "b": read(other)}, "a")


def test_shared_ids_and_damaged_files_are_named() -> None:
    with pytest.raises(InputError, match="share id 0"):
        read_table({"vocab.json": b'{"a": 0, "b": 0}'}, "m")
    with pytest.raises(InputError, match=r"m/tokenizer\.json: not valid JSON"):
        read_table({"tokenizer.json": b"{"}, "m")
    assert read_table({"vocab.json": b'{"a": 0}', "added_tokens.json": b'{"b": 1}'}, "m") == TokenTable(
        {"a": 0, "b": 1}
    )
    assert read_table({}, "m") is None


def test_templates_auto_named_and_written() -> None:
    assert choose("auto", ["x{{1}}", "y{{1}}", "y{{1}}", None]) == "y{{1}}"
    assert choose("auto", [None]) is None
    assert choose("chatml", []) == BUILT_IN["chatml"]
    with pytest.raises(InputError, match="chat_template 'chatlm'"):
        choose("chatlm", [])
    old = {"tokenizer_config.json": b'{"chat_template": "old{{1}}", "k": 1}'}
    new = with_template(old, "new{{1}}", "m")
    assert template_of(old, "m") == "old{{1}}"
    assert template_of(new, "m") == "new{{1}}"
    assert json.loads(new["tokenizer_config.json"]) == {"k": 1}


TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]
SAID = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] S\n\nU [/INST] A</s>[INST] V [/INST]",
    "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n### Response:\n",
    "exaone": "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n[|user|]V\n[|assistant|]",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_say_what_their_models_expect(name: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(BUILT_IN[name])
    said = template.render(messages=TALK, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    assert said == SAID[name]


def test_of_several_named_templates_the_default_is_meant() -> None:
    named = b'{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d{{1}}"}]}'
    assert template_of({"tokenizer_config.json": named}, "x") == "d{{1}}"
    assert template_of({"tokenizer_config.json": b'{"chat_template": [{"name": "rag", "template": "r"}]}'}, "x") is None
