"""Training with anyone's loop: Trainer steps move the bridge and nothing else, checkpointing changes no gradient,
dropout is off, what is computed once equals what is computed each time, saving keeps every bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import fused_fixtures as fx
from model_fusion.errors import InputError, IntegrityError
from model_fusion.fuse.fit import AnswerStep
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.processor import Encoded
from model_fusion.fuse.shortcut import Shortcut

every_architecture = pytest.mark.parametrize("architecture", fx.ARCHITECTURES)
every_bridge = pytest.mark.parametrize("bridge", list(fx.TRAINED))


def encoded(fused: FusedModel) -> list[Encoded]:
    prompts = [f"should i hit or stick with this hand? {p}" for p in fx.PROMPTS]
    return fused.processor.encode(prompts, fx.INPUTS, ["yes", "no, stick", "what"])


def train_batch(fused: FusedModel) -> dict[str, Tensor]:
    return fused.processor.collate(encoded(fused), labels=True)


def gradients(fused: FusedModel) -> list[Tensor]:
    fused.zero_grad()
    fused(**train_batch(fused)).loss.backward()
    return [p.grad.clone() for p in fused.trainable_parameters() if p.grad is not None]


def base_weights(fused: FusedModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in fused.base.state_dict().items() if "lora_" not in key}


@every_architecture
@every_bridge
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_trainer_step_moves_the_bridge_only(
    architecture: str, bridge: str, checkpointing: bool, tmp_path: Path
) -> None:
    fused = fx.build(architecture, fx.TRAINED[bridge])
    before, bridge_before = base_weights(fused), [p.detach().clone() for p in fused.trainable_parameters()]
    given: dict[str, Any] = {"activation_checkpointing": True} if checkpointing else {}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        remove_unused_columns=False,
        **given,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows: Any = encoded(fused)
    trainer = Trainer(
        fused, arguments, train_dataset=rows, data_collator=lambda rows: fused.processor.collate(rows, labels=True)
    )
    trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in base_weights(fused).items())
    moved = [not torch.equal(p, old) for p, old in zip(fused.trainable_parameters(), bridge_before, strict=True)]
    assert all(moved)


@every_architecture
@every_bridge
def test_checkpointing_gives_the_same_gradients_and_recomputes(architecture: str, bridge: str) -> None:
    fused = fx.build(architecture, fx.TRAINED[bridge]).train()
    runs = 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal runs
        runs += 1

    last = next(m for name, m in fused.wire.layers[-1].named_modules() if name in ("mlp", "ffn"))
    last.register_forward_pre_hook(count)
    plain = gradients(fused)
    assert runs == 1
    fused.gradient_checkpointing_enable()
    assert fused.is_activation_checkpointing
    again = gradients(fused)
    assert runs == 3  # once more in the backward pass
    assert len(plain) == len(again) > 2
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert any(bool(g.abs().sum() > 0) for g in plain)
    fused.gradient_checkpointing_disable()
    gradients(fused)
    assert runs == 4
    assert not fused.is_activation_checkpointing


def test_checkpointing_refuses_what_it_cannot_do() -> None:
    fused = fx.build("llama", fx.TRAINED["gated"])
    with pytest.raises(InputError, match="use_reentrant=False"):
        fused.gradient_checkpointing_enable({"use_reentrant": True})
    fused.gradient_checkpointing_enable()
    batch = train_batch(fused)
    with torch.no_grad():
        past = fused(**batch, use_cache=True).past_key_values
    with pytest.raises(InputError, match="KV cache"):
        fused(**batch, past_key_values=past)


def test_dropout_is_off_while_training() -> None:
    fused = fx.build("gpt2", fx.TRAINED["prefix"]).train()
    assert fused.bridge.training
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in fused.base.modules())

    def check() -> None:
        batch = train_batch(fused)
        assert torch.equal(fused(**batch).loss, fused(**batch).loss)

    check()
    fused.gradient_checkpointing_enable()
    check()
    fused.base.train()
    with pytest.raises(AssertionError):
        check()


def check_shortcut(fused: FusedModel, step: AnswerStep) -> None:
    """Loss and gradients with the shared part computed once equal those of the plain forward pass."""
    expected = gradients(fused)
    loss = fused(**train_batch(fused)).loss
    fused.zero_grad()
    fast = step(torch.arange(3))
    fast.backward()
    found = [p.grad for p in fused.trainable_parameters() if p.grad is not None]
    assert torch.allclose(fast, loss, atol=1e-4)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-3)


@every_architecture
@every_bridge
@pytest.mark.parametrize("checkpointing", [False, True])
def test_computing_once_changes_no_gradient(
    architecture: str, bridge: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = fx.build(architecture, fx.TRAINED[bridge]).train()
    if checkpointing:
        fused.gradient_checkpointing_enable()
    check_shortcut(fused, AnswerStep(fused, encoded(fused)))
    if bridge == "lora" or checkpointing:
        return
    step = AnswerStep(fused, encoded(fused))
    assert step.shortcut.shared > 5
    for layer in step.shortcut._cache.layers:
        layer.values = layer.values.roll(1, dims=2)
    with pytest.raises(AssertionError):
        check_shortcut(fused, step)
    if bridge == "prefix":
        return
    right = Shortcut._compute
    monkeypatch.setattr(Shortcut, "_compute", lambda self, row: right(self, row).roll(1, 0))
    with pytest.raises(AssertionError):
        check_shortcut(fused, AnswerStep(fused, encoded(fused)))


@every_architecture
@every_bridge
@torch.no_grad()
def test_the_backbone_carries_the_signal_to_the_head(architecture: str, bridge: str) -> None:
    """As TRL trains: the hidden states of `base_model`, put through the head by the trainer."""
    fused = fx.build(architecture, fx.TRAINED[bridge])
    batch = {key: value for key, value in train_batch(fused).items() if key != "labels"}
    logits = fused(**batch).logits

    def by_hand() -> Tensor:
        out: Tensor = fused.get_output_embeddings()(fused.base_model(**batch).last_hidden_state)
        return out

    assert torch.equal(by_hand(), logits)
    with fused.bridge_off():
        assert not torch.allclose(by_hand(), logits, atol=1e-3)


@every_architecture
@every_bridge
@torch.no_grad()
def test_saving_keeps_every_bit(architecture: str, bridge: str, tmp_path: Path) -> None:
    fused = fx.build(architecture, fx.TRAINED[bridge])
    batch = train_batch(fused)
    before = fused(**batch).logits
    fused.save_pretrained(tmp_path / "out")
    given = {"sign": fx.chances, "series": fx.waves}

    def load(base: Any) -> FusedModel:
        return FusedModel.from_pretrained(tmp_path / "out", base=base, tokenizer=fx.tokenizer(), given=given)

    loaded = load(copy.deepcopy(fx.plain(architecture)))
    assert torch.equal(loaded(**batch).logits, before)
    assert not loaded.training
    other = copy.deepcopy(fx.plain(architecture))
    next(other.parameters()).mul_(1.01)
    with pytest.raises(IntegrityError, match="has changed since this bridge was trained"):
        load(other)


@torch.no_grad()
def test_device_map_is_accepted() -> None:
    options: dict[str, Any] = {"experts": {"sign": fx.experts()["sign"]}, "bridge": "gated", "dtype": torch.bfloat16}
    plain = FusedModel.build("smollm2", **options)
    batch = plain.processor([fx.PROMPTS[0]], [fx.INPUTS[0]])
    expected = plain(**batch).logits
    for device_map in ("cpu", "auto"):
        assert torch.equal(FusedModel.build("smollm2", device_map=device_map, **options)(**batch).logits, expected)
