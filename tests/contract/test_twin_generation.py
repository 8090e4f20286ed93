"""A twin is a causal LM of transformers: batches, padding, caches, beams, saving; on Llama and on GPT-2 (Conv1D)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from model_fusion.dynamic.causal_lm import TwinForCausalLM
from model_fusion.dynamic.parts import exclusive
from model_fusion.dynamic.router import Router
from model_fusion.dynamic.twin import TwinModel
from model_fusion.errors import InputError, IntegrityError

KINDS = ("llama", "gpt2")
IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def model(kind: str, seed: int) -> Any:
    """Random, every bias and norm away from its first value; GPT-2's head is tied, Llama's not."""
    torch.manual_seed(seed)
    made: Any
    if kind == "llama":
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
        made = LlamaForCausalLM(
            LlamaConfig(vocab_size=64, num_key_value_heads=2, attention_bias=True, initializer_range=0.3, **sizes)
        )
    else:
        made = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=4, initializer_range=0.3))
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            if tensor.dim() == 1:
                tensor.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.3)
    return made.eval()


def twin(kind: str) -> TwinForCausalLM:
    shared, experts = model(kind, 0), [model(kind, seed) for seed in (1, 2)]
    parts = exclusive(shared.state_dict(), [e.state_dict() for e in experts], 0.3)
    torch.manual_seed(5)
    router = Router(24, 2)
    router.settle(torch.randn(50, 24) * 3)
    return TwinForCausalLM(shared, parts, router, ["one", "two"]).eval()


def apart(kind: str) -> float:
    """Largest difference of logits between a batch and each row's own merged model, weights from the router."""
    made = twin(kind).double()  # so that only a wrong formula can differ
    got = made(IDS)
    assert got.expert_weights is not None
    assert float(got.expert_weights.std(0).min()) > 1e-3  # the rows are routed differently
    plain, worst = model(kind, 9).double(), 0.0
    for row, weights in enumerate(got.expert_weights):
        plain.load_state_dict(made.merged(weights))
        worst = max(worst, float((plain(IDS[row : row + 1]).logits[0] - got.logits[row]).abs().max()))
    return worst


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_batch_equals_each_rows_merged_model(kind: str) -> None:
    assert apart(kind) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_rows_weights_for_all_are_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TwinModel.weighted
    first = lambda self, w: right(self, w if w is None else w[:1].expand_as(w))  # noqa: E731
    monkeypatch.setattr(TwinModel, "weighted", first)
    assert apart(kind) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_vectors_are_part_of_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = twin(kind)
    whole = made(IDS).logits
    for name in [n for n, part in made.twin.parts.items() if part.up is None]:
        made.twin._factors[name.replace(".", "/") + ":down"].zero_()
    assert float((made(IDS).logits - whole).abs().max()) > 1e-2


def padded(ids: Tensor) -> dict[str, Tensor]:
    """Rows of 7, 5 and 4 tokens, padded on the left."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, cut in enumerate((0, 2, 3)):
        ids[row, :cut], mask[row, :cut] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_the_merged_model_of_the_prompt(kind: str) -> None:
    made, batch = twin(kind), padded(IDS)
    together = made.generate(**batch, **GREEDY)
    torch.testing.assert_close(made.generate(**batch, **GREEDY, use_cache=False), together)
    weights = made.route(**batch)
    for row, cut in enumerate((0, 2, 3)):
        alone = IDS[row : row + 1, cut:]
        torch.testing.assert_close(made.route(alone)[0], weights[row], atol=1e-5, rtol=1e-4)
        plain = model(kind, 9)
        plain.load_state_dict(made.merged(weights[row]))
        for search in ({}, {"num_beams": 3}):
            expected = plain.generate(alone, attention_mask=torch.ones_like(alone), **GREEDY, **search)[0, -6:]
            got = made.generate(**batch, **GREEDY, **search)[row, -6:]
            assert got.tolist() == expected.tolist()


def test_weights_follow_the_cache_and_the_prompt_alone() -> None:
    made = twin("llama")
    prefill = made(IDS, use_cache=True)
    step = torch.full((3, 1), 5)
    one = made(step, past_key_values=prefill.past_key_values)
    assert torch.equal(one.expert_weights, prefill.expert_weights)
    whole = made(torch.cat([IDS, step], 1), expert_weights=prefill.expert_weights)
    torch.testing.assert_close(one.logits[:, -1], whole.logits[:, -1], atol=1e-4, rtol=1e-4)
    foreign = made.shared(IDS, use_cache=True).past_key_values
    with pytest.raises(InputError, match="not filled by a twin"):
        made(step, past_key_values=foreign)
    with pytest.raises(InputError, match="reads input_ids"):
        made(inputs_embeds=torch.zeros(1, 2, 24))


def test_padding_holds_anything() -> None:
    made, batch = twin("llama"), padded(IDS)
    expected = made.route(**batch)
    batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 63, batch["input_ids"])
    torch.testing.assert_close(made.route(**batch), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(kind: str, tmp_path: Path) -> None:
    made, folder = twin(kind), tmp_path / "out"
    made.save_pretrained(folder)
    made.save_pretrained(folder)  # replaces its own
    for again in (TwinForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert isinstance(again, TwinForCausalLM)
        assert torch.equal(again(IDS).logits, made(IDS).logits)
        assert again.config.experts == ["one", "two"]
        assert again.bytes() == made.bytes()
    half = TwinForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half(IDS).logits.dtype == torch.bfloat16
    stock = AutoModelForCausalLM.from_pretrained(folder / "shared")
    assert torch.equal(stock(IDS).logits, made.shared(IDS).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_changed_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    made, folder = twin("llama"), tmp_path / "out"
    made.save_pretrained(folder)
    data = bytearray((folder / "router.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "router.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match="safetensors is not the file"):
        TwinForCausalLM.from_pretrained(folder)
    (folder / "router.safetensors").unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        TwinForCausalLM.from_pretrained(folder)
    with pytest.raises(InputError, match="no twin here"):
        TwinForCausalLM.from_pretrained(folder / "shared")
    with pytest.raises(InputError, match="already exists"):
        made.save_pretrained(folder / "shared")


def test_an_error_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, folder = twin("llama"), tmp_path / "out"
    made.save_pretrained(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(type(made.generation_config), "save_pretrained", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.save_pretrained(folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
