"""A base whose linear layers hold 8-bit integers, as quantisers leave it: bridges train beside it and are saved."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_fixtures import TRAINED, experts, plain, tokenizer
from model_fusion.errors import IntegrityError
from model_fusion.fuse.fit import Example
from model_fusion.fuse.model import FusedModel

PROMPT = "hit or stick? <|sign|>"
READING = [bridge for bridge in TRAINED if bridge != "lora"]  # peft adapts only the quantisers that it knows


class Int8(nn.Module):
    """A linear layer without bias, its weight [out, in] as int8 with one float32 scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("weight", torch.round(weight / self.scale).to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale).T


def quantised() -> Any:
    base = copy.deepcopy(plain("llama"))
    for layer in base.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, Int8(child))
    base.hf_quantizer = object()  # how transformers marks what it loaded quantised
    return base


def build(bridge: str) -> FusedModel:
    expert = {"sign": experts()["sign"]}
    return FusedModel.build(quantised(), tokenizer=tokenizer(), experts=expert, bridge=TRAINED[bridge])


@pytest.mark.parametrize("bridge", READING)
def test_a_bridge_trains_beside_integer_weights(bridge: str, tmp_path: Path) -> None:
    fused = build(bridge)
    before = {key: value.clone() for key, value in fused.base.state_dict().items()}
    rows = [Example(PROMPT, {"sign": i / 4 - 1}, "yes" if i > 4 else "no") for i in range(8)]
    history = fused.fit(rows, steps=12, batch_size=8, validate_every=4, learning_rate=0.02, progress=False)
    assert history.losses[-1] < history.losses[0]
    assert all(torch.equal(value, before[key]) for key, value in fused.base.state_dict().items())
    said = fused.answer(PROMPT, {"sign": 0.8})
    fused.save_pretrained(tmp_path / "out")
    options = {"tokenizer": tokenizer(), "given": {"sign": experts()["sign"].function}}  # type: ignore[attr-defined]
    again = FusedModel.from_pretrained(tmp_path / "out", base=quantised(), **options)
    assert again.answer(PROMPT, {"sign": 0.8}) == said
    # Its bytes are a quantiser's own; other bytes are refused where nothing says that they are.
    unmarked = quantised()
    del unmarked.hf_quantizer
    with torch.no_grad():
        unmarked.model.layers[0].mlp.up_proj.scale.mul_(1.5)
    with pytest.raises(IntegrityError, match="has changed"):
        FusedModel.from_pretrained(tmp_path / "out", base=unmarked, **options)


def test_the_signal_passes_through_integer_layers() -> None:
    fused = build("prefix")
    batch = fused.processor([PROMPT, PROMPT], [{"sign": 0.8}, {"sign": -0.8}])
    logits = fused(**batch).logits[:, -1]
    assert not torch.allclose(logits[0], logits[1])
    fused(**batch).logits[:, -1].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fused.trainable_parameters())
