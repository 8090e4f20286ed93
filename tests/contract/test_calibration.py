"""What is measured through hooks equals a naive loop, on any module; each check has been seen to fail."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import model_fusion as mf
from calibration_fixtures import Batches, llama, mlp, tokens, vectors
from model_fusion.errors import InputError
from model_fusion.merge.calibration import collect, layers

Patch = pytest.MonkeyPatch


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=11, n_positions=16, n_inner=40))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 5, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.grouped = nn.Conv2d(5, 5, 3, groups=5)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(self.norm(self.first(x)).relu()).flatten(1))


def images() -> Batches:
    return list(torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(1)).split(2))


# --- Gram matrices ---


def naive_grams(module: nn.Module, batches: Batches, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Every layer's `forward` replaced by one that remembers, then a loop over rows in float64."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def remember(name: str, part: nn.Module, real: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            wide = x.detach().double()
            if isinstance(part, nn.Conv2d):  # each patch cut out by hand
                wide = F.pad(wide, [int(part.padding[0])] * 4)
                size, stride = part.kernel_size[0], part.stride[0]
                steps = range(0, wide.shape[-1] - size + 1, stride)
                patches = [wide[:, :, i : i + size, j : j + size].flatten(1) for i in steps for j in steps]
                wide = torch.cat(patches)
            seen[name] += list(wide.reshape(-1, wide.shape[-1]).numpy())
            return real(x)

        return forward

    module.eval()
    parts = [(name, module.get_submodule(name.removesuffix(".weight"))) for name in names]
    for name, part in parts:
        part.forward = remember(name, part, part.forward)  # type: ignore[method-assign]
    with torch.no_grad():
        for batch in batches:
            module(**batch) if isinstance(batch, dict) else module(batch)
    for _, part in parts:
        del part.forward
    return {name: sum(np.outer(x, x) for x in rows) / len(rows) for name, rows in seen.items()}


LLAMA_PARTS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batches], set[str]]] = {
    "llama": (llama, tokens, {f"model.layers.{n}.{part}.weight" for n in range(3) for part in LLAMA_PARTS}),
    "gpt2": (
        gpt2,
        tokens,
        {
            f"transformer.h.{n}.{part}.weight"
            for n in range(2)
            for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        },
    ),
    "mlp": (mlp, vectors, {"0.weight", "2.weight", "4.weight"}),
    "cnn": (Cnn, images, {"first.weight", "head.weight"}),
}


def grams_agree(name: str) -> bool:
    make, batches, names = CASES[name]
    module = make()
    found = mf.collect_statistics(module, batches())
    want = naive_grams(module, batches(), sorted(names))
    assert set(found) == names
    return all(np.allclose(found[n].numpy(), want[n], rtol=1e-5, atol=1e-5 * np.abs(want[n]).max()) for n in names)


@pytest.mark.parametrize("name", CASES)
def test_grams_equal_a_loop(name: str) -> None:
    assert grams_agree(name)


def test_the_gram_check_goes_red(monkeypatch: Patch) -> None:
    real = layers.Grams._add
    monkeypatch.setattr(layers.Grams, "_add", lambda self, layer, part, x: real(self, layer, part, x[:, :-1]))
    assert not any(grams_agree(name) for name in ("llama", "gpt2"))


def test_conv1d_is_marked_and_padding_is_no_data() -> None:
    module = gpt2()
    batch = tokens(2)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 5:] = 0
    found = mf.collect_statistics(module, [{**batch, "attention_mask": mask}])
    assert found.inputs_first == set(found) == CASES["gpt2"][2]
    assert found.count == 13
    short = [{"input_ids": batch["input_ids"][:1]}, {"input_ids": batch["input_ids"][1:, :5]}]
    want = mf.collect_statistics(module, short)
    assert all(torch.allclose(found[name], want[name], atol=1e-5) for name in found)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.idle = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.head(self.two(self.one(self.attention(x, x, x)[0]).tanh()))


def test_shared_weights_and_layers_that_are_not_seen() -> None:
    module, ids = Shared(), torch.arange(6).view(2, 3)
    found = mf.collect_statistics(module, [ids])
    assert set(found) == {"one.weight"}
    assert set(found.unseen) == {"attention.out_proj.weight", "idle.weight"}
    with torch.no_grad():
        x = module.words(ids)
        first = module.attention(x, x, x)[0]
        both = torch.cat([first, module.one(first).tanh()]).view(-1, 4)
    assert torch.allclose(found["one.weight"], both.T @ both / 12, atol=1e-6)


def test_the_module_is_left_as_it_was() -> None:
    module = Cnn().train()
    module.first.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for kind in ("gram", "fisher"):
        mf.collect_statistics(module, images(), kind)
        assert module.training
        assert [p.requires_grad for p in module.first.parameters()] == [False, False]
        assert module.head.weight.requires_grad
        assert all(p.grad is None for p in module.parameters())
        assert all(not part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


# --- Fisher ---


def naive_fisher(module: nn.Module, rows: list[tuple[Any, Tensor]]) -> dict[str, Tensor]:
    """One sample at a time, through the loss that everyone trains with; float64."""
    module.eval()
    total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for inputs, labels in rows:
        module.zero_grad()
        answer = module(**inputs).logits[:, :-1] if isinstance(inputs, dict) else module(inputs)
        F.cross_entropy(answer.flatten(0, -2), labels.flatten(), reduction="sum").backward()
        for name, parameter in module.named_parameters():
            total[name] += parameter.grad.square() / len(rows)
    module.zero_grad()
    return total


def fisher_agrees(of_text: bool) -> bool:
    if of_text:
        module = llama().double()
        rows = [
            {"input_ids": batch["input_ids"][i : i + 1]} for batch in tokens() for i in range(len(batch["input_ids"]))
        ]
        want = naive_fisher(module, [(row, row["input_ids"][:, 1:]) for row in rows])
        found = mf.collect_statistics(module, tokens(), "fisher", labels="next")
    else:
        module, batches = mlp(dtype=torch.float64), vectors(dtype=torch.float64)
        labels = [torch.arange(len(batch)) % 4 for batch in batches]
        pairs = list(zip(batches, labels, strict=True))
        want = naive_fisher(module, [(x[i : i + 1], y[i : i + 1]) for x, y in pairs for i in range(len(x))])
        found = mf.collect_statistics(module, pairs, "fisher", labels="given")
    assert set(found) == set(want)
    return all(torch.allclose(found[name], want[name], rtol=1e-5, atol=1e-12) for name in want)


@pytest.mark.parametrize("of_text", [False, True])
def test_fisher_equals_a_loop(of_text: bool) -> None:
    assert fisher_agrees(of_text)


@pytest.mark.parametrize("of_text", [False, True])
def test_the_fisher_check_goes_red_where_samples_are_pooled(of_text: bool, monkeypatch: Patch) -> None:
    monkeypatch.setattr(collect, "samples", lambda batch: iter([batch]))
    assert not fisher_agrees(of_text)


def test_own_labels_are_drawn_from_the_model() -> None:
    """Many draws approach the expectation over labels; a fixed label does not."""
    module, x = mlp(dtype=torch.float64), vectors(dtype=torch.float64)[0][:1]
    shares = module(x).softmax(-1).detach()[0]
    each = [naive_fisher(module, [(x, torch.tensor([label]))])["4.weight"] for label in range(4)]
    want = sum(p * one for p, one in zip(shares, each, strict=True))
    found = mf.collect_statistics(module, [x.expand(3000, -1)], "fisher", seed=3)["4.weight"]
    assert torch.allclose(found, want, rtol=0.1)
    assert not any(torch.allclose(one, want, rtol=0.1) for one in each)
    again = mf.collect_statistics(module, [x.expand(3000, -1)], "fisher", seed=3)["4.weight"]
    assert torch.equal(found, again)


# --- what cannot be ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mf.collect_statistics(mlp(), [], "gram"), "no batch"),
        (lambda: mf.collect_statistics(mlp(), vectors(), "gramm"), "unknown kind"),
        (lambda: mf.collect_statistics(mlp(), vectors(), "fisher", labels="mine"), "unknown labels"),
        (lambda: mf.collect_statistics(mlp(), vectors(), "fisher", labels="given"), "pairs"),
        (lambda: mf.collect_statistics(mlp(), [torch.full((2, 6), float("nan"))]), "NaN"),
        (lambda: mf.collect_statistics(mlp(), [torch.full((2, 6), float("nan"))], "fisher", labels="own"), "NaN"),
        (lambda: mf.collect_statistics(nn.Tanh(), vectors()), "no linear layer"),
        (lambda: mf.collect_merged_statistics([mlp()], []), "1 models but batches for 0"),
        (lambda: mf.collect_merged_statistics([mlp()], [vectors()], forward=[]), "0 forwards"),
        (lambda: mf.adamerging(mlp(), [mlp(1)], [[]]), "batches of every task"),
        (lambda: mf.adamerging(mlp(), [{}], [vectors()]), "no tensor '0.weight'"),
    ],
)
def test_faults_are_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
