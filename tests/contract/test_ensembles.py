"""Models that speak as one: exactly the single model where all are equal, the naive mean where they are not."""

from __future__ import annotations

import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lora_fixtures
import mix_fixtures
import tokenizer_fixtures as words
from model_fusion.checkpoint.llm import load_llm, resolve_llm
from model_fusion.cli.main import main
from model_fusion.dynamic import averaged, union
from model_fusion.dynamic import ensemble as opening
from model_fusion.dynamic.averaged import AveragedModels, Caches, mean_of
from model_fusion.dynamic.ensemble import Ensemble, ensemble
from model_fusion.dynamic.union import END, Member, UnionOfModels, _Reader
from model_fusion.errors import InputError
from model_fusion.evaluate.bits import bits_per_byte

TEXT = "the cat sat on the mat and the dog ate the hat"


@functools.cache
def tokenizer(size: int) -> Any:
    data = words.train(words.CORPUS, size, ("<eos>",))
    raw = Tokenizer.from_str(json.dumps(data))
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", padding_side="left")


@functools.cache
def llm(kind: str, seed: int, size: int = 40) -> Any:
    torch.manual_seed(seed)
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3}
    sizes = {"vocab_size": len(tokenizer(size)), **ids}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **sizes)).eval()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, **sizes, tie_word_embeddings=False)).eval()


def members(*kinds: tuple[str, int, int]) -> list[Member]:
    return [Member(llm(*kind), tokenizer(kind[2])) for kind in kinds]


def batch() -> dict[str, Tensor]:
    return dict(tokenizer(40)(["the cat", "the dog ate the hat"], return_tensors="pt", padding=True))


DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "no cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "penalty": {"do_sample": False, "repetition_penalty": 3.0},
}


def written(model: Any, options: dict[str, Any]) -> list[list[int]]:
    torch.manual_seed(3)
    out = model.generate(**batch(), max_new_tokens=8, pad_token_id=0, **options)
    return out.tolist()


# ---- one vocabulary --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("options", DECODING.values(), ids=list(DECODING))
def test_two_identical_models_are_the_single_one(kind: str, options: dict[str, Any]) -> None:
    single = llm(kind, 0)
    assert written(AveragedModels([single, single], [0.3, 0.7]), options) == written(single, options)


@torch.no_grad()
def check_exact(single: Any, both: Any) -> None:
    rows = {**batch(), "labels": batch()["input_ids"]}
    out, alone = both(**rows), single(**rows)
    assert torch.equal(out.logits, alone.logits)
    assert out.loss == pytest.approx(float(alone.loss), abs=1e-6)


def test_their_logits_are_bit_identical() -> None:
    check_exact(llm("llama", 0), AveragedModels([llm("llama", 0)] * 3))


def test_a_mean_that_is_not_relative_to_the_largest_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaged, "mean_of", lambda found, shares: torch.stack(found).exp().mean(0).log())
    with pytest.raises(AssertionError):
        check_exact(llm("llama", 0), AveragedModels([llm("llama", 0)] * 3))


@torch.no_grad()
def check_mean(weights: list[float]) -> None:
    models = [llm("llama", 0), llm("gpt2", 1)]
    logits = AveragedModels(models, weights)(**batch()).logits.double()
    probabilities = [model(**batch()).logits.double().softmax(-1) for model in models]
    naive = sum(w * p for w, p in zip(weights, probabilities, strict=True)) / sum(weights)
    assert (logits.softmax(-1) - naive).abs().max() < 1e-6


def test_different_models_give_the_weighted_mean() -> None:
    check_mean([1.0, 3.0])


def test_weights_that_are_left_out_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaged, "mean_of", lambda found, shares: mean_of(found, torch.ones_like(shares)))
    with pytest.raises(AssertionError):
        check_mean([1.0, 3.0])


def check_cache(both: Any) -> None:
    assert written(both, DECODING["greedy"]) == written(both, DECODING["no cache"])


def test_the_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    both = AveragedModels([llm("llama", 0), llm("gpt2", 1)])
    check_cache(both)

    class Mixed(Caches):
        def __init__(self, members: Any) -> None:
            super().__init__(members)
            self.each = [self.each[0]] * len(self.each)

    monkeypatch.setattr(averaged, "Caches", Mixed)
    with pytest.raises((AssertionError, RuntimeError)):
        check_cache(AveragedModels([llm("llama", 0), llm("llama", 1)]))


def test_minus_infinity_stays_and_is_not_nan() -> None:
    logs = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, 0.0, -math.inf]])
    found = mean_of([logs[0], logs[1]], torch.tensor([1.0, 1.0]))
    assert found.tolist() == pytest.approx([0.0, math.log(0.5), -math.inf])


# ---- several vocabularies --------------------------------------------------------------------------------------


def alone(model: Any, size: int, prompt: str) -> str:
    ids = tokenizer(size)(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0)
    return str(tokenizer(size).decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_union_of_identical_models_writes_the_single_models_text(kind: str) -> None:
    both = UnionOfModels(members((kind, 0, 40), (kind, 0, 40)))
    for prompt in ("the cat", "the man in the"):
        assert both.generate(prompt, max_new_tokens=8) == alone(llm(kind, 0), 40, prompt)


@torch.no_grad()
def check_union(chosen: list[Member], k: int) -> None:
    """Strings and probabilities against a plain reading of the paper."""
    readers = [_Reader(member, member.prompt(TEXT)) for member in chosen]
    pieces, probabilities = UnionOfModels(chosen, k).next(readers)
    logits = [m.model(torch.tensor([m.tokenizer(TEXT)["input_ids"]])).logits[0, -1].double() for m in chosen]
    expected: dict[bytes, float] = {}
    for member, row in zip(chosen, logits, strict=True):
        for i in row.topk(k).indices.tolist():
            expected[END if i == 0 else member.tokenizer.decode([i]).encode()] = 0.0
    weight = sum(member.weight for member in chosen)
    for text in expected:
        for member, row in zip(chosen, logits, strict=True):
            vocabulary = {member.tokenizer.decode([i]).encode(): i for i in range(1, len(row))} | {END: 0}
            longest = next(text[:n] for n in range(len(text), -1, -1) if text[:n] in vocabulary)
            expected[text] += member.weight / weight * float(row.softmax(-1)[vocabulary[longest]])
    assert set(pieces) == set(expected)
    total = sum(expected.values())
    for piece, value in zip(pieces, probabilities.tolist(), strict=True):
        assert value == pytest.approx(expected[piece] / total, abs=1e-6)


def different() -> list[Member]:
    first, second = members(("llama", 0, 40), ("gpt2", 1, 60))
    second.weight = 2.0
    assert first.tokenizer.get_vocab() != second.tokenizer.get_vocab()
    return [first, second]


def test_the_united_tokens_and_their_probabilities() -> None:
    check_union(different(), 5)


def test_a_missing_token_counted_as_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(self: _Reader, piece: bytes) -> float:
        number = self.member.speller.ids.get(piece)
        return 0.0 if number is None else float(self.probs[number])

    monkeypatch.setattr(union._Reader, "probability", known)
    with pytest.raises(AssertionError):
        check_union(different(), 5)


def test_members_read_the_same_text_and_sampling_is_seeded() -> None:
    both = UnionOfModels(different())
    said = [both.generate(TEXT, max_new_tokens=12, temperature=1.5, seed=seed) for seed in (0, 0, 1)]
    assert said[0] == said[1]
    assert len(set(said)) == 2
    readers = [_Reader(member, member.prompt(TEXT)) for member in both.members]
    for piece in (b" dog", b"t"):
        for reader in readers:
            reader.append(piece)
    for reader in readers:  # the cache holds what a fresh reading of the same ids gives
        ids = reader.member.prompt(TEXT)
        for piece in (b" dog", b"t"):
            ids += reader.member.speller.spell(piece) or []
        assert torch.allclose(_Reader(reader.member, ids).probs, reader.probs, atol=1e-5)


# ---- likelihood ------------------------------------------------------------------------------------------------


def test_bits_per_byte_of_one_vocabulary_are_the_models_own() -> None:
    first, twin = members(("llama", 0, 40), ("llama", 0, 40))
    own, mean = bits_per_byte([first, twin], TEXT)
    assert own[0] == own[1] == pytest.approx(mean, abs=1e-9)
    ids = first.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    logits = first.model(ids).logits[0, :-1].double().log_softmax(-1)
    nats = -float(logits.gather(-1, ids[0, 1:, None]).detach().sum())
    begin = len(first.tokenizer.decode(ids[0, :1]))
    assert own[0] == pytest.approx(nats / math.log(2) / len(TEXT[begin:]), abs=1e-5)


def test_the_mean_is_never_worse_than_the_mean_of_the_losses() -> None:
    pair = different()
    pair[1].weight = 1.0
    own, mean = bits_per_byte(pair, TEXT)
    assert mean <= sum(own) / 2 + 1e-9
    assert own[0] != own[1]
    with pytest.raises(InputError, match="boundary"):
        bits_per_byte(pair, "t")


# ---- opened by name --------------------------------------------------------------------------------------------


def test_the_command_line_answers_as_the_single_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["model-fusion", *words])
        main()
        return capsys.readouterr().out

    question = "What is the capital of France?"
    monkeypatch.setattr("sys.stdin", io.StringIO(question + "\n"))
    asked = ["--max-new-tokens", "12"]
    single = run("chat", resolve_llm("smollm2").path, *asked)
    assert run("ensemble", "smollm2", "smollm2", "--chat", "--prompt", question, *asked) == single
    assert "Paris" in single
    for words_, message in {
        ("--weight", "1"): "2 models but 1 weights",
        ("--weight", "1", "--weight", "0"): "above 0",
        ("--top-k", "0"): "top_k must be at least 1",
    }.items():
        with pytest.raises(SystemExit) as stop:
            run("ensemble", "smollm2", "smollm2", "--prompt", "a", *words_)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_one_vocabulary_is_averaged_and_several_are_united() -> None:
    same = Ensemble(members(("llama", 0, 40), ("gpt2", 1, 40)))
    assert same.averaged is not None
    assert Ensemble(different()).averaged is None
    assert isinstance(Ensemble(different()).generate("the cat", max_new_tokens=4), str)
    with pytest.raises(InputError, match="at least one model"):
        ensemble([])
    model, own = load_llm(resolve_llm("smollm2"))
    opened = Ensemble([Member(model, own), Member(model, own)])
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert opened.generate(chat, max_new_tokens=8) == opened.union.generate(chat, max_new_tokens=8)


def adapted_logits(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `base+adapter` opened by an ensemble, and of peft's own merge."""
    base = mix_fixtures.model("llama", 0)
    base.save_pretrained(folder / "base")
    mix_fixtures.bytes_tokenizer(folder / "base")
    merged = lora_fixtures.adapter(base, folder / "lora", target_modules=["q_proj", "down_proj"], r=2)
    opened = ensemble([f"{folder / 'base'}+{folder / 'lora'}", folder / "base"], dtype=torch.float32)
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        return opened.members[0].model(ids).logits, merged(ids).logits


def test_an_adapter_on_its_base_is_a_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(*adapted_logits(tmp_path / "a"), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(opening, "adapt", lambda weights, checkpoint: {})
    got, want = adapted_logits(tmp_path / "b")
    assert not torch.allclose(got, want, atol=1e-2)
