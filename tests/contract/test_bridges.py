"""What every bridge promises on every architecture: the base untouched when off, the right features at the right
place, rows that do not disturb each other. Each check has a mutation beside it that turns it red."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_fixtures as fx
from model_fusion.errors import InputError
from model_fusion.fuse import model as model_module
from model_fusion.fuse.bridges.gated import GatedBridge
from model_fusion.fuse.bridges.lora import LoraBridge
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.normalise import Normaliser
from model_fusion.fuse.wire import started

every_architecture = pytest.mark.parametrize("architecture", fx.ARCHITECTURES)
every_bridge = pytest.mark.parametrize("bridge", list(fx.TRAINED))


def batch_of(fused: FusedModel, rows: tuple[int, ...] = (0, 1, 2)) -> dict[str, Tensor]:
    return fused.processor([fx.PROMPTS[row] for row in rows], [fx.INPUTS[row] for row in rows])


def ordinary(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@torch.no_grad()
def check_off(fused: FusedModel, architecture: str) -> None:
    batch = batch_of(fused)
    with fused.bridge_off():
        off = fused(**batch).logits
    assert torch.equal(off, fx.plain(architecture)(**ordinary(batch)).logits)


@every_architecture
@every_bridge
def test_bridge_off_is_the_plain_base(architecture: str, bridge: str) -> None:
    check_off(fx.fused(architecture, bridge), architecture)


@every_architecture
def test_adapter_left_on_is_seen(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraBridge, "set_enabled", lambda *args: None)
    monkeypatch.setattr(LoraBridge, "_from_the_placeholder", lambda self, module, args, output: output)
    fused = fx.build(architecture, fx.TRAINED["lora"])
    with pytest.raises(AssertionError):
        check_off(fused, architecture)


@torch.no_grad()
def check_without_an_expert(fused: FusedModel, architecture: str) -> None:
    batch = fused.processor(["no cards here", "what to do now, please?"])
    assert torch.equal(fused(**batch).logits, fx.plain(architecture)(**batch).logits)


@every_architecture
@pytest.mark.parametrize("bridge", ["prefix", "gated", "cross_attention", "lora", "logit", "tool"])
def test_without_an_expert_it_is_the_plain_base(architecture: str, bridge: str) -> None:
    check_without_an_expert(fx.fused(architecture, bridge), architecture)


@every_architecture
def test_adapter_without_an_expert_is_seen(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraBridge, "_from_the_placeholder", lambda self, module, args, output: output)
    fused = fx.build(architecture, fx.TRAINED["lora"])
    with pytest.raises(AssertionError):
        check_without_an_expert(fused, architecture)


def with_rows(fused: FusedModel, architecture: str, batch: dict[str, Tensor], rows: Callable[..., Tensor]) -> Tensor:
    """The plain base's embeddings of a batch, with `rows(expert, item)` written at each placeholder in turn: the
    reference, independent of hooks."""
    embedded = fx.plain(architecture).get_input_embeddings()(batch["input_ids"]).clone()
    for row, given in enumerate(fx.INPUTS[: len(embedded)]):
        for name, item in given.items():
            slots = fused.bridge.slots(name)
            places = (batch["input_ids"][row] == fused.reserved[name]).nonzero().flatten().split(slots)
            items = item if isinstance(item, list) else [item]
            assert len(places) == len(items)
            for place, x in zip(places, items, strict=True):
                embedded[row, place] = rows(name, x)
    return embedded


@every_architecture
@torch.no_grad()
def test_cross_attention_starts_as_the_identity(architecture: str) -> None:
    fused = fx.build(architecture, fx.TRAINED["cross_attention"], awake=False)
    batch = batch_of(fused)
    embedded = with_rows(fused, architecture, batch, lambda name, x: fused.bridge.neutral)
    base = fx.plain(architecture)(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
    assert torch.equal(fused(**batch).logits, base)
    fx.wake(fused)
    assert not torch.equal(fused(**batch).logits, base)


@torch.no_grad()
def check_rows(fused: FusedModel, architecture: str) -> None:
    """The embedding's output is, at each placeholder, the soft tokens of that occurrence's own features."""
    batch = batch_of(fused)

    def soft(name: str, x: float) -> Tensor:
        normaliser = fused.normalisers[name]
        values = (fused.experts[name].encode([x]).values - normaliser.mean) / normaliser.std
        out: Tensor = fused.bridge.soft[name](values.flatten(1))[0]
        return out

    found: list[Tensor] = []
    handle = fused.base.get_input_embeddings().register_forward_hook(lambda m, a, out: found.append(out))
    try:
        logits = fused(**batch).logits
    finally:
        handle.remove()
    expected = with_rows(fused, architecture, batch, soft)
    assert torch.allclose(found[0], expected, atol=1e-5)
    if fused.bridge.kind == "prefix":
        base = fx.plain(architecture)(inputs_embeds=expected, attention_mask=batch["attention_mask"]).logits
        real = batch["attention_mask"].bool()
        assert torch.allclose(logits[real], base[real], atol=1e-3)


@every_architecture
@pytest.mark.parametrize("bridge", ["prefix", "lora"])
def test_soft_tokens_stand_where_their_placeholder_stood(
    architecture: str, bridge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = fx.fused(architecture, bridge)
    check_rows(fused, architecture)
    right = fused.bridge.embed
    with monkeypatch.context() as wrong:  # rows written in the wrong order
        wrong.setattr(fused.bridge, "embed", lambda *args: right(*args).flip(0))
        with pytest.raises(AssertionError):
            check_rows(fused, architecture)
    with monkeypatch.context() as wrong:
        wrong.setattr(Normaliser, "forward", lambda self, values: values.float())
        with pytest.raises(AssertionError):
            check_rows(fused, architecture)


@torch.no_grad()
def check_occurrences(fused: FusedModel) -> None:
    """One expert twice: the second input acts from the second placeholder on, the first from the first."""
    prompt = "hit <|sign|> or stick <|sign|> now? "

    def logits(first: float, second: float) -> tuple[Tensor, Tensor]:
        batch = fused.processor([prompt], [{"sign": [first, second]}])
        return fused(**batch).logits[0], (batch["input_ids"][0] == fused.reserved["sign"]).nonzero().flatten()

    base, places = logits(0.2, 0.6)
    begins = (int(places[0]), int(places[fused.bridge.slots("sign")]))
    for begin, changed in ((begins[0], logits(-0.8, 0.6)[0]), (begins[1], logits(0.2, -0.8)[0])):
        assert torch.equal(base[:begin], changed[:begin])
        assert ((base[begin:] - changed[begin:]).abs().amax(dim=1) > 1e-4).all()


@every_architecture
@every_bridge
def test_an_experts_signal_acts_from_its_placeholder_on(
    architecture: str, bridge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = fx.fused(architecture, bridge)
    check_occurrences(fused)
    with monkeypatch.context() as wrong:
        if bridge in ("prefix", "lora"):
            right = fused.bridge.embed
            wrong.setattr(fused.bridge, "embed", lambda *args: right(*args).flip(0))
        else:
            wrong.setattr(model_module, "started", shifted)
        with pytest.raises(AssertionError):
            check_occurrences(fused)


def shifted(*args: Any) -> Tensor:
    """The gate's mask, one position late."""
    late = started(*args).roll(1, dims=1)
    late[:, 0] = False
    return late


@torch.no_grad()
def check_gated(fused: FusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """While generating from a left-padded batch, the gate changes exactly the placeholder onward, new tokens too."""
    batch, seen = batch_of(fused), []
    right = GatedBridge.after_layer

    def watch(self: GatedBridge, layer: int, hidden: Tensor, signal: Any) -> Tensor:
        out = right(self, layer, hidden, signal)
        if layer == 0:
            seen.append((out != hidden).any(dim=-1))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(GatedBridge, "after_layer", watch)
        fused.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    changed = torch.cat(seen, dim=1)
    length = batch["input_ids"].shape[1]
    assert changed.shape == (3, length + 3)
    first = [int((batch["input_ids"][row] == fused.reserved["sign"]).nonzero()[0]) for row in (0, 1)]
    for row, begin in enumerate([*first, changed.shape[1]]):
        assert changed[row].tolist() == [False] * begin + [True] * (changed.shape[1] - begin)


@every_architecture
def test_gated_positions_are_the_placeholder_onward(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fx.fused(architecture, "gated")
    check_gated(fused, monkeypatch)
    monkeypatch.setattr(model_module, "started", shifted)
    with pytest.raises(AssertionError):
        check_gated(fused, monkeypatch)


@every_architecture
@pytest.mark.parametrize("bridge", ["gated", "cross_attention"])
@torch.no_grad()
def test_skipped_normaliser_is_seen(architecture: str, bridge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fx.fused(architecture, bridge)
    batch = batch_of(fused)

    def check() -> None:
        """Features normalised by hand before an identity normaliser give the same answer."""
        by_hand = batch["expert_features"].clone()
        for number, name in enumerate(fused.experts):
            d, mine = fused.experts[name].feature_shape[1], batch["expert_index"] == number
            normaliser = fused.normalisers[name]
            by_hand[mine] = torch.nn.functional.pad(
                (batch["expert_features"][mine][..., :d] - normaliser.mean) / normaliser.std, (0, by_hand.shape[-1] - d)
            )
        logits = fused(**batch).logits
        with monkeypatch.context() as identity:
            identity.setattr(Normaliser, "forward", lambda self, values: values.float())
            assert torch.allclose(fused(**{**batch, "expert_features": by_hand}).logits, logits, atol=1e-4)

    check()
    monkeypatch.setattr(Normaliser, "forward", lambda self, values: values.float())
    with pytest.raises(AssertionError):
        check()


@torch.no_grad()
def check_rows_alone(fused: FusedModel) -> None:
    """Next-token logits of a left-padded batch equal those of each row alone."""
    together = fused.generate(**batch_of(fused), **ONE_STEP).logits[0]
    for row in range(3):
        alone = fused.generate(**batch_of(fused, (row,)), **ONE_STEP).logits[0]
        assert torch.allclose(together[row], alone[0], atol=1e-3)


ONE_STEP = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@every_architecture
@every_bridge
def test_rows_of_a_padded_batch_equal_rows_alone(architecture: str, bridge: str) -> None:
    check_rows_alone(fx.fused(architecture, bridge))


def test_positions_counted_over_pads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 knows absolute positions: counting them from the first pad shifts a padded row."""
    fused = fx.fused("gpt2", "prefix")
    monkeypatch.setattr(
        fused,
        "_prepare_position_ids_for_generation",
        lambda inputs, kwargs: torch.arange(inputs.shape[1]).expand(len(inputs), -1),
    )
    with pytest.raises(AssertionError):
        check_rows_alone(fused)


@torch.no_grad()
def check_absent(fused: FusedModel) -> None:
    """What stands where no value is present changes nothing, not even NaN."""
    batch = batch_of(fused)
    batch["expert_mask"][1, 1, 2] = False  # the series' third value is missing
    assert (~batch["expert_mask"]).sum() > 6
    clean = fused(**batch).logits
    broken = torch.where(batch["expert_mask"][..., None], batch["expert_features"], float("nan"))
    assert torch.equal(fused(**{**batch, "expert_features": broken}).logits, clean)


@every_architecture
@every_bridge
def test_nan_where_no_value_is_present_changes_nothing(
    architecture: str, bridge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = fx.fused(architecture, bridge)
    check_absent(fused)
    if bridge == "gated" and architecture == "llama":  # 0 * NaN is NaN: a product instead of `where` is seen
        with monkeypatch.context() as wrong:
            wrong.setattr(model_module.torch, "where", lambda mine, a, b: mine * a + ~mine * b)
            with pytest.raises(AssertionError):
                check_absent(fused)


@every_bridge
@torch.no_grad()
def test_every_present_value_of_an_expert_is_read(bridge: str) -> None:
    fused = fx.fused("llama", bridge)
    batch = batch_of(fused)
    clean = fused(**batch).logits[1, -1]
    for value in range(3):
        changed = batch["expert_features"].clone()
        changed[1, 1, value] += 0.5
        assert not torch.allclose(fused(**{**batch, "expert_features": changed}).logits[1, -1], clean, atol=1e-5)


def test_ids_and_features_that_do_not_match_are_refused() -> None:
    fused = fx.fused("llama", "prefix")
    batch = batch_of(fused)
    batch["expert_index"][0, 0] = -1
    with pytest.raises(InputError, match="row 0 has 2 reserved ids for expert 'sign' but features for 0"):
        fused(**batch)


@every_bridge
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_bases(bridge: str, dtype: torch.dtype) -> None:
    fused = fx.build("llama", fx.TRAINED[bridge], dtype=dtype)
    logits = fused(**batch_of(fused)).logits
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()
    assert all(p.dtype == torch.float32 for p in fused.trainable_parameters())


@torch.no_grad()
def test_gemma_soft_tokens_have_the_size_of_scaled_embeddings() -> None:
    fused = fx.fused("gemma3", "prefix")
    ids = torch.arange(2, len(fx.tokenizer()))[None]
    rms = float(fx.plain("gemma3").get_input_embeddings()(ids).pow(2).mean().sqrt())
    assert fused.bridge.soft["sign"].scale == pytest.approx(rms, rel=0.02)
