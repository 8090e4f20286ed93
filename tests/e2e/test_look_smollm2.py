"""A LoRA on SmolLM2: seen by `inspect`, taken out again by `lora extract`, and the same words from peft."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from model_fusion.checkpoint.reader import open_checkpoint
from model_fusion.checkpoint.sources import resolve
from model_fusion.checkpoint.verify import verify
from model_fusion.merge.inspect import inspect
from model_fusion.merge.lora.extract import extract
from model_fusion.merge.lora.factors import Wanted

MODULES = ["model.layers.3.self_attn.q_proj", "model.layers.20.mlp.down_proj"]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base, generator = open_checkpoint(resolve("smollm2")), torch.Generator().manual_seed(0)
    state = {}
    for module in MODULES:
        rows, columns = base.spec(f"{module}.weight").shape
        state[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        state[f"base_model.model.{module}.lora_B.weight"] = 0.02 * torch.randn(rows, 4, generator=generator)
    (tmp_path / "lora").mkdir()
    save_file(state, tmp_path / "lora/adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": MODULES}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "lora"


@pytest.mark.slow
def test_a_lora_is_seen_and_taken_out_again(adapter: Path, tmp_path: Path) -> None:
    tuned = f"smollm2+{adapter}"
    found = inspect([tuned], "smollm2")
    changed = {n for n, tensor in found.tensors.items() if tensor["models"][tuned]["delta to base"] > 0}
    assert changed == {f"{module}.weight" for module in MODULES}
    assert {found.tensors[name]["models"][tuned]["rank"] for name in changed} == {4}
    assert any("have rank 4" in warning for warning in found.warnings)

    made = extract(tuned, "smollm2", tmp_path / "out", Wanted(4))
    assert {kept.name for kept in made.kept} == changed
    assert made.share == pytest.approx(1.0, abs=1e-5)
    assert made.left == []
    assert verify(tmp_path / "out").inputs == [tuned, "smollm2"]

    model = AutoModelForCausalLM.from_pretrained(resolve("smollm2").folder, dtype=torch.float32).eval()
    ids = torch.arange(100, 110)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # peft still uses a name that transformers deprecates
        plain = model(ids).logits
        both = peft.PeftModel.from_pretrained(model, str(adapter), adapter_name="given")
        given = both(ids).logits
        both.load_adapter(str(tmp_path / "out"), adapter_name="extracted")
        both.set_adapter("extracted")
        extracted = both(ids).logits
    assert not torch.allclose(given, plain, atol=0.1)
    assert torch.allclose(given, extracted, atol=2e-3, rtol=1e-3)
