"""What Python callers may hand in: any name of an expert, one question or many, rows of a dataset; what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_fixtures import SCHEMA, TRAINED, chances, plain, tokenizer
from model_fusion.errors import InputError, IntegrityError
from model_fusion.fuse import saving
from model_fusion.fuse.bridges import Gated, Lora, Prefix
from model_fusion.fuse.experts import Expert
from model_fusion.fuse.fit import Example, held_out
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.placeholders import check_names

SMALL = {"steps": 4, "batch_size": 4, "validate_every": 2, "progress": False}


def build(name: str = "sign", bridge: Any = None, **options: Any) -> FusedModel:
    expert = Expert.from_callable(chances, SCHEMA, classes=("yes", "no"))
    options = {"base": copy.deepcopy(plain("llama")), "tokenizer": tokenizer(), **options}
    return FusedModel.build(experts={name: expert}, bridge=bridge or Gated(layers=(0,), width=16), **options)


def examples(name: str = "sign", count: int = 8) -> list[Example]:
    return [Example(f"hit or stick? <|{name}|>", {name: i / 4 - 1}, "yes" if i > 4 else "no") for i in range(count)]


@pytest.mark.parametrize("name", ["items", "values", "type", "train", "_x", "my-expert2"])
@pytest.mark.parametrize("bridge", TRAINED)
def test_an_expert_may_have_any_name(name: str, bridge: str, tmp_path: Path) -> None:
    fused = build(name, TRAINED[bridge])
    fused.fit(examples(name), **SMALL)
    prompt, given = f"hit or stick? <|{name}|>", {name: 0.3}
    said = fused.answer(prompt, given)
    fused.save_pretrained(tmp_path / "out")
    options = {"base": copy.deepcopy(plain("llama")), "tokenizer": tokenizer(), "given": {name: chances}}
    again = FusedModel.from_pretrained(tmp_path / "out", **options)
    assert again.answer(prompt, given) == said


@pytest.mark.parametrize("name", ["", "a.b", "a b", "1st", "état", "<|x|>", "end"])
def test_a_name_that_a_prompt_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="expert name"):  # <|end|> is this tokenizer's own
        build(name)


def test_a_name_in_the_chat_template_is_refused() -> None:
    spoken = copy.deepcopy(tokenizer())
    check_names(["user"], spoken)
    spoken.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match=r"<\|user\|> is this LLM's own token"):
        check_names(["user"], spoken)


@pytest.mark.parametrize("name", ["", "a.b", "items"])
def test_a_bridge_that_cannot_be_kept_by_that_name(name: str) -> None:
    fused = build()
    with pytest.raises(InputError, match="choose another name"):
        fused.add_bridge(name, Lora(tokens=2, width=16))
    assert list(fused.fusions) == ["default"]
    with pytest.raises(InputError, match="no bridge called 'other'; loaded: default"):
        fused.remove_bridge("other")


def test_one_question_has_one_answer() -> None:
    fused = build()
    prompt = "hit or stick? <|sign|>"
    one = fused.answer(prompt, {"sign": 0.4})
    assert [one] == fused.answer([prompt], [{"sign": 0.4}])
    assert isinstance(fused.answer("hit or stick?"), str)
    for asked, given in (([prompt], {"sign": 0.4}), (prompt, [{"sign": 0.4}])):
        with pytest.raises(InputError, match="list of"):
            fused.answer(asked, given)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="role and content"):
        fused.answer([[{"role": "user"}]])
    with pytest.raises(InputError, match="role and content"):
        fused.answer([{"role": "user", "content": "hit?"}])  # type: ignore[list-item]


def test_rows_of_a_dataset_train_like_examples() -> None:
    rows = [{"prompt": e.prompt, "inputs": e.inputs, "answer": e.answer} for e in examples()]
    losses = [build().fit(given, **SMALL).losses for given in (examples(), rows)]
    assert losses[0] == losses[1]
    other = [{**row, "answer": "hit"} for row in rows]
    assert build().fit(other, **SMALL).losses != losses[0]
    numbers = [{**row, "answer": i} for i, row in enumerate(rows)]
    assert len(build().fit(numbers, **SMALL).losses) == 4


def test_the_collator_makes_what_the_processor_makes() -> None:
    fused, rows = build(), [vars(e) | {"inputs": {**e.inputs, "other": None}} for e in examples()]
    batch = fused.collator(rows)(rows[:3])
    expert = fused.experts["sign"]
    features = expert.encode([e.inputs["sign"] for e in examples()]).values
    assert torch.allclose(fused.normalisers["sign"].mean, features.double().mean(dim=(0, 1)).float())
    encoded = fused.processor.encode(
        *([vars(e)[key] for e in examples()[:3]] for key in ("prompt", "inputs", "answer"))
    )
    expected = fused.processor.collate(encoded, labels=True)
    assert batch.keys() == expected.keys() >= {"labels", "expert_features"}
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    # The check is red for other rows.
    assert not torch.equal(fused.collator(rows)(rows[1:4])["expert_features"], expected["expert_features"])


def test_a_prompt_longer_than_the_llm_reads_is_refused() -> None:
    fused = build()
    assert fused.context == 256
    with pytest.raises(InputError, match=r"the LLM reads 256: shorten the prompt"):
        fused.answer("hit or stick? " * 100)
    with pytest.raises(InputError, match="its answer may take 300"):
        fused.answer("hit?", max_new_tokens=300)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"answer": None}, "example 3: expected prompt, inputs"),
        ({"prompt": None}, "example 3: expected prompt, inputs"),
        ({"inputs": [0.1]}, "example 3: expected prompt, inputs"),
        ({"answer": ["yes"]}, "example 3: the answer is the text"),
        ({"answer": True}, "example 3: the answer is the text"),
    ],
)
def test_a_row_that_is_no_example_is_named(wrong: dict[str, Any], message: str) -> None:
    rows: list[Any] = [{"prompt": e.prompt, "inputs": e.inputs, "answer": e.answer} for e in examples()]
    rows[2] = {**rows[2], **wrong}
    with pytest.raises(InputError, match=message):
        build().fit(rows, **SMALL)
    with pytest.raises(InputError, match="validation example 3"):
        build().fit(examples(), validation=rows, **SMALL)


def shifted(base: Any) -> Any:
    with torch.no_grad():
        base.get_input_embeddings().weight.add_(0.05)
    return base


def test_another_base_is_refused_in_any_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(bridge=Prefix(tokens=2, width=16)).save_pretrained(tmp_path / "out")
    options = {"tokenizer": tokenizer(), "given": {"sign": chances}}
    for dtype in (torch.float32, torch.bfloat16):
        same, other = (copy.deepcopy(plain("llama")).to(dtype) for _ in range(2))
        FusedModel.from_pretrained(tmp_path / "out", base=same, **options)
        with pytest.raises(IntegrityError, match="has changed since this bridge was trained"):
            FusedModel.from_pretrained(tmp_path / "out", base=shifted(other), **options)
    # The check is red when only equal dtypes are compared.
    monkeypatch.setattr(saving, "fingerprint", lambda base, dtype=None: saving.read_config(tmp_path / "out")["base"][
        "fingerprint" if dtype is None else "fingerprint_bfloat16"])  # fmt: skip
    FusedModel.from_pretrained(tmp_path / "out", base=shifted(copy.deepcopy(plain("llama")).bfloat16()), **options)


def test_a_base_handed_in_must_be_handed_in_again(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "out")
    with pytest.raises(InputError, match="hand it in again"):
        FusedModel.from_pretrained(tmp_path / "out", given={"sign": chances})


def test_the_expert_reads_every_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, read = build(), list[float]()
    expert = fused.experts["sign"]
    encode = type(expert).encode
    monkeypatch.setattr(type(expert), "encode", lambda self, items: (read.extend(items), encode(self, items))[1])
    rows = examples(count=10)
    inputs = sorted(e.inputs["sign"] for e in rows)
    fused.fit(rows, **SMALL)
    assert sorted(read) == inputs
    # Normalised over the training rows alone: with those that validate the mean is another.
    trained = [e.inputs["sign"] for e in held_out(rows, 0)[0]]
    means = [encode(expert, items).values.double().mean(dim=(0, 1)).float() for items in (trained, inputs)]
    assert torch.allclose(fused.normalisers["sign"].mean, means[0])
    assert not torch.allclose(fused.normalisers["sign"].mean, means[1])
    # Keeping the language and aligning read one item more, for all their prompts.
    fused.add_bridge("soft", Prefix(tokens=1, width=16))
    for train in (
        lambda: fused.fit(rows, keep_language=0.5, **SMALL),
        lambda: fused.align([e.inputs["sign"] for e in rows], steps=1, batch_size=4, validate_every=1, progress=False),
    ):
        read.clear()
        train()
        assert sorted(set(read)) == inputs
        assert sum(read.count(x) > 1 for x in inputs) <= 2
