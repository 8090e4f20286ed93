"""The objective `align`, on a tiny random Llama with a real tokenizer: no labels, and the LLM stays frozen."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from model_fusion.checkpoint.llm import resolve_llm
from model_fusion.errors import InputError
from model_fusion.fuse import align as aligning
from model_fusion.fuse import teacher as teaching
from model_fusion.fuse.align import AlignStep, read, spell
from model_fusion.fuse.bridges import Gated, Lora, Prefix
from model_fusion.fuse.experts import Expert, Field, InputSchema
from model_fusion.fuse.fit import Example
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.teacher import Teacher, kl, summary, told

CLASSES = ("red", "green", "blue")
PROMPTS = (
    "See <|light|>",
    "The light is <|light|> today.",
    "Go: <|light|>",
    [{"role": "user", "content": "<|light|>?"}],
)


def probabilities(items: list[int]) -> np.ndarray:
    return np.eye(3)[np.asarray(items)] * 0.9 + 0.1 / 3


def build(bridge: Any) -> FusedModel:
    tokenizer = AutoTokenizer.from_pretrained(resolve_llm("smollm2").path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    expert = Expert.from_callable(probabilities, InputSchema((Field("x", "int", 0, 2),)), classes=CLASSES)
    return FusedModel.build(
        LlamaForCausalLM(config).eval(), tokenizer=tokenizer, experts={"light": expert}, bridge=bridge
    )


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligning, "generic_prompts", lambda experts: list(PROMPTS))


ITEMS = [0, 1, 2] * 5
SETTINGS: dict[str, Any] = {"steps": 30, "learning_rate": 1e-2, "validate_every": 10, "tokens": 4, "progress": False}


@pytest.mark.parametrize(
    "bridge", [Prefix(tokens=2), Prefix(tokens=1, codes=4), Lora(tokens=2, rank=2), Gated(layers=(1,))]
)
def test_divergence_falls_and_the_base_stays(bridge: Any) -> None:
    fused = build(bridge)
    before = {k: v.clone() for k, v in fused.base.state_dict().items() if "lora" not in k}
    history = fused.align(ITEMS, start_at_words=False, **SETTINGS)
    assert np.mean(history.losses[-5:]) < 0.8 * np.mean(history.losses[:3])
    assert all(torch.equal(fused.base.state_dict()[k], v) for k, v in before.items())


def test_words_are_a_good_start_and_a_worse_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = build(Prefix(tokens=1, codes=4))
    fused.normalisers["light"].fit(fused.experts["light"].encode(ITEMS))
    items = read(fused, ITEMS)
    assert spell(fused, items) < 0.01
    step = AlignStep(fused, Teacher(fused, tokens=4), PROMPTS, items)
    assert step.measure().loss < 0.05
    assert step.measure().score > 0.7  # a prompt without a space before the word spells it in other tokens
    # An untrained end is thrown away: with a ruinous rate the start is what stays.
    again = build(Prefix(tokens=1, codes=4))
    history = again.align(ITEMS, **{**SETTINGS, "learning_rate": 5.0, "steps": 3, "target": None})
    assert history.best_step == 0
    again_step = AlignStep(again, Teacher(again, tokens=4), PROMPTS, read(again, ITEMS))
    assert again_step.measure().loss < 0.05
    # The same check is red without the words.
    monkeypatch.setattr(aligning, "spell", lambda *_: 0.0)
    random = build(Prefix(tokens=1, codes=4))
    random.align(ITEMS, **{**SETTINGS, "learning_rate": 1e-9, "steps": 3, "target": None})
    assert AlignStep(random, Teacher(random, tokens=4), PROMPTS, read(random, ITEMS)).measure().loss > 0.05


def test_keep_language_pulls_answers_training_towards_the_oracle() -> None:
    examples = [Example("Say <|light|>", {"light": x}, "yes" if x else "no") for x in ITEMS]
    divergence = {}
    for weight in (0.0, 10.0):
        fused = build(Prefix(tokens=2))
        options: dict[str, Any] = {"steps": 20, "learning_rate": 1e-2, "progress": False, "target": None}
        fused.fit(examples, keep_language=weight, **options)
        divergence[weight] = AlignStep(fused, Teacher(fused), PROMPTS, read(fused, ITEMS)).measure().loss
    assert divergence[10.0] < divergence[0.0]
    with pytest.raises(InputError, match="keep_language"):
        fused.fit(examples, keep_language=-1.0)


def fresh(fused: FusedModel, prompt: Any, word: str, ids: list[int]) -> torch.Tensor:
    """The oracle's next-token logits along `ids`, from one plain forward pass."""
    row = fused.processor.encode([told(prompt, {"light": word})])[0].ids
    with torch.no_grad(), fused.bridge_off():
        return fused.base(input_ids=torch.tensor([row + ids])).logits[0, len(row) - 1 : -1]


def differs(fused: FusedModel, teacher: Teacher) -> float:
    """Largest difference between cached and fresh log-probabilities, over prompts and words."""
    worst = 0.0
    for prompt in PROMPTS:
        for word in CLASSES:
            said = teacher.continuations(prompt, [{"light": word}])[0]
            top, log_probs = summary(fresh(fused, prompt, word, said.ids), teacher.top_k)
            assert said.ids == top[:, 0].tolist()
            worst = max(worst, float((said.log_probs - log_probs).abs().max()))
    return worst


def test_cached_teacher_equals_a_fresh_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = build(Lora(tokens=1))
    for parameter in fused.trainable_parameters():
        torch.nn.init.normal_(parameter)  # an adapter that would show if the oracle heard it
    teacher = Teacher(fused, tokens=4, top_k=8)
    words = [{"light": w} for w in CLASSES]
    for prompt in PROMPTS:
        teacher.continuations(prompt, words)
    assert differs(fused, teacher) < 1e-4
    calls = []
    monkeypatch.setattr(fused, "generate", lambda **_: calls.append(1))
    teacher.continuations(PROMPTS[0], words)
    assert not calls
    # The same check is red when the cache answers for another word.
    keys = list(teacher._known)
    teacher._known = dict(zip(keys, [teacher._known[k] for k in keys[1:] + keys[:1]], strict=True))
    with pytest.raises((AssertionError, RuntimeError)):
        assert differs(fused, teacher) < 1e-4


def test_lumped_divergence_is_exact_for_all_tokens_and_never_above() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 50), torch.randn(5, 50)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    full = (p.exp() * (p - q)).sum(-1)
    whole = kl(*summary(teacher, 50), student)
    assert torch.allclose(whole, full, atol=1e-4)
    assert (kl(*summary(teacher, 10), student) <= full + 1e-5).all()
    assert (kl(*summary(teacher, 10), teacher).abs() < 1e-5).all()
    # Red when the student is shifted by one position.
    assert not torch.allclose(kl(*summary(teacher, 50), student.roll(1, 0)), full, atol=1e-4)


def test_a_space_before_soft_words_is_theirs() -> None:
    rows = {
        codes: build(Prefix(tokens=1, codes=codes)).processor.encode(["Go: <|light|> now"], [{"light": 0}])
        for codes in (0, 3)
    }
    assert len(rows[0][0].ids) == len(rows[3][0].ids) + 1


def test_prompts_and_items_are_checked() -> None:
    fused = build(Prefix(tokens=1))
    with pytest.raises(InputError, match="exactly one placeholder"):
        fused.align(ITEMS, prompts=["no placeholder"] * 9, **SETTINGS)
    with pytest.raises(InputError, match="no item has an input for expert 'light'"):
        fused.align([], validation=[0], **SETTINGS)
    with pytest.raises(InputError, match="unknown training setting 'stepz'"):
        fused.align(ITEMS, stepz=3)
    assert teaching.told("a <|light|>", {"light": "red"}) == "a red"
