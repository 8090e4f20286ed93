"""Gate prefix: a stock class whose routers read a running mean of the text so far, and is otherwise the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from mix_fixtures import KINDS, model, write
from model_fusion.errors import InputError
from model_fusion.mix import calibrate, room
from model_fusion.mix.build import build
from model_fusion.mix.calibrate import tokenizer_of
from model_fusion.mix.domains import gather, prepare
from model_fusion.mix.load import load_mixed
from model_fusion.mix.routing import fixed, moe_layers, replaced, watched
from model_fusion.mix.train import RouterSettings, train_router
from model_fusion.recipe.mix import parse

LETTERS = {"early": "abcdefgh ", "late": "efghijkl "}  # half of each alphabet is the other's too
WIDENED = ("llama", "mistral", "qwen3")
IDS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, list[str]]:
    """Five files a domain, random letters of its own."""
    logging.disable_progress_bar()
    generator, found = torch.Generator().manual_seed(5), {}
    for name, letters in LETTERS.items():
        folder = tmp_path / "texts" / name
        folder.mkdir(parents=True)
        for n in range(5):
            picks = torch.randint(len(letters), (900,), generator=generator)
            (folder / f"{n}.txt").write_text("".join(letters[p] for p in picks))
        found[name] = [str(folder)]
    return found


def recipe(folders: list[Path], texts: dict[str, list[str]], **settings: Any) -> dict[str, Any]:
    entries = [{"model": str(f), "name": n, "texts": t} for f, (n, t) in zip(folders, texts.items(), strict=True)]
    return {"base_model": str(folders[0]), "experts": entries, "gate": "prefix", **settings}


@torch.no_grad()
def check_widening_changes_nothing(kind: str, tmp_path: Path, texts: dict[str, list[str]], **sizes: int) -> None:
    """Copies: any routing is the dense model. One trunk: forcing an expert is that expert."""
    dense = write(tmp_path / "dense", kind, 0, **sizes)
    other = write(tmp_path / "other", kind, 1, trunk=model(kind, 0, **sizes), **sizes)
    expected = AutoModelForCausalLM.from_pretrained(dense)(IDS).logits
    copies = build(recipe([dense, dense], texts, seed=1), tmp_path / "copies").folder
    assert (AutoModelForCausalLM.from_pretrained(copies)(IDS).logits - expected).abs().max() <= 1e-5
    mixed = load_mixed(build(recipe([dense, other], texts), tmp_path / "mixed").folder)
    with replaced(moe_layers(mixed), fixed([0.0, 1.0])):
        found = mixed(IDS).logits
    assert (found - AutoModelForCausalLM.from_pretrained(other)(IDS).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", WIDENED)
def test_widening_changes_nothing(kind: str, tmp_path: Path, texts: dict[str, list[str]]) -> None:
    check_widening_changes_nothing(kind, tmp_path, texts)


def test_heads_that_do_not_divide_the_width(tmp_path: Path, texts: dict[str, list[str]]) -> None:
    """Nine heads after widening: the config class wants a residual stream that is a multiple of it."""
    check_widening_changes_nothing("llama", tmp_path, texts, num_attention_heads=8, num_key_value_heads=8)


@pytest.mark.parametrize("settings", [{"trunk": "average"}, {"dtype": "bfloat16"}, {"layers": [1]}])
@torch.no_grad()
def test_it_is_the_mixture_that_random_gates_make(
    settings: dict[str, Any], tmp_path: Path, texts: dict[str, list[str]]
) -> None:
    """Other trunks, other dtypes, chosen layers: an expert forced in both answers alike."""
    folders, found = [write(tmp_path / f"m{i}", "qwen3", i) for i in range(2)], []
    folders[1] = write(tmp_path / "m1", "qwen3", 1, trunk=None if "trunk" in settings else model("qwen3", 0))
    for gate in ("random", "prefix"):
        mixed = load_mixed(build(recipe(folders, texts, **{"gate": gate, **settings}), tmp_path / gate).folder)
        with replaced(moe_layers(mixed), fixed([0.0, 1.0])):
            found.append(mixed(IDS).logits)
    bar = 0.02 * float(found[0].abs().max()) if "dtype" in settings else 1e-5  # norms' weights are rounded once more
    assert (found[0] - found[1]).abs().max() <= bar


@pytest.mark.parametrize("wrong", ["shrink", "small", "eps"])
def test_wrong_widening_is_seen(
    wrong: str, tmp_path: Path, texts: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "shrink":
        monkeypatch.setattr(room.Room, "shrink", 1.0)
    elif wrong == "small":
        monkeypatch.setattr(room, "_SMALL", 0.1)
    else:
        right = room.Room.config
        monkeypatch.setattr(room.Room, "config", lambda self: {**right(self), "rms_norm_eps": 0.1})
    with pytest.raises(AssertionError):
        check_widening_changes_nothing("llama", tmp_path, texts)


@torch.no_grad()
def check_the_router_reads_the_text_so_far(tmp_path: Path, texts: dict[str, list[str]]) -> None:
    """Differences of router logits are proportional to the running mean of log counts, counted here once more."""
    dense, other = write(tmp_path / "a", "llama", 0), write(tmp_path / "b", "llama", 1, trunk=model("llama", 0))
    out = build(recipe([dense, other], texts), tmp_path / "out").folder
    mixed, tokenizer = load_mixed(out), tokenizer_of(out)
    counts = torch.full((256, 2), 0.5, dtype=torch.float64)
    for d, name in enumerate(LETTERS):
        kept = "".join((tmp_path / "texts" / name / f"{n}.txt").read_text() for n in range(4))
        ids = torch.tensor(tokenizer(kept)["input_ids"])[: 3600 // 256 * 256].view(-1, 256)
        ids = torch.cat([w for n, w in enumerate(ids) if n % 8 != 7])  # every eighth window is a probe
        counts[:, d] += torch.bincount(ids, minlength=256)
    evidence = (counts[:, 0] / counts[:, 1]).log()
    ids = torch.tensor(tokenizer("abcefgijkl efgh abij")["input_ids"])[None]
    mean = evidence[ids[0]].cumsum(0) / torch.arange(1, ids.shape[1] + 1)
    seen: list[torch.Tensor] = []
    with watched(moe_layers(mixed), lambda i, x, logits, chosen: seen.append(logits[:, 0] - logits[:, 1])):
        mixed(ids)
    assert torch.equal(seen[0] > 0, mean > 0)
    router = moe_layers(mixed)[0].router.weight
    stream = mixed.model.layers[0].post_attention_layernorm.weight[-14] * router[0, -14]
    hidden: list[torch.Tensor] = []
    handle = mixed.model.layers[0].post_attention_layernorm.register_forward_pre_hook(
        lambda module, args: hidden.append(args[0][0])
    )
    mixed(ids)
    handle.remove()
    scale = (hidden[0].square().mean(-1) + mixed.config.rms_norm_eps).sqrt() / stream
    size = mixed.model.embed_tokens.weight[:, :32].square().mean().sqrt() * 2.0**-16
    assert (seen[0] * scale / size - mean.float()).abs().max() <= 1e-3


def test_the_router_reads_the_text_so_far(tmp_path: Path, texts: dict[str, list[str]]) -> None:
    check_the_router_reads_the_text_so_far(tmp_path, texts)


def test_another_mean_is_seen(tmp_path: Path, texts: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting the probes too is another table."""
    monkeypatch.setattr(calibrate, "probing", lambda ids: ([0], list(range(len(ids)))))
    with pytest.raises(AssertionError):
        check_the_router_reads_the_text_so_far(tmp_path, texts)


def test_a_cache_gives_the_same_words(tmp_path: Path, texts: dict[str, list[str]]) -> None:
    """The running mean lives in the attention cache: decoding token by token sees what one pass sees."""
    folders = [write(tmp_path / "a", "llama", 0), write(tmp_path / "b", "llama", 1, trunk=model("llama", 0))]
    out = build(recipe(folders, texts, experts_per_token=1), tmp_path / "out").folder
    loaded = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("abcdefgh jkl", return_tensors="pt")
    made = loaded.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, output_logits=True,
                           return_dict_in_generate=True)  # fmt: skip
    with torch.no_grad():
        whole = loaded(made.sequences).logits[0, inputs["input_ids"].shape[1] - 1 : -1]
    assert (torch.cat(made.logits) - whole).abs().max() <= 1e-4


def test_its_accuracy_is_reported(tmp_path: Path, texts: dict[str, list[str]]) -> None:
    folders = [write(tmp_path / "a", "llama", 0), write(tmp_path / "b", "llama", 1, trunk=model("llama", 0))]
    assert min(build(recipe(folders, texts), tmp_path / "out").gate_accuracy) > 0.95


def test_equal_texts_say_nothing(tmp_path: Path, texts: dict[str, list[str]]) -> None:
    folder = write(tmp_path / "a", "llama", 0)
    out = build(recipe([folder, folder], {**texts, "late": texts["early"]}), tmp_path / "out").folder
    state = load_file(out / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    assert state["model.embed_tokens.weight"][:, 32:].abs().max() < 1e-8


@torch.no_grad()
def test_bfloat16_holds_the_small_numbers(tmp_path: Path, texts: dict[str, list[str]]) -> None:
    folders = [write(tmp_path / "a", "llama", 0), write(tmp_path / "b", "llama", 1, trunk=model("llama", 0))]
    out = build(recipe(folders, texts, dtype="bfloat16"), tmp_path / "out").folder
    ids = torch.tensor(AutoTokenizer.from_pretrained(out)("abcdefgh ijkl efgh ab lkji")["input_ids"])[None]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        loaded, seen = AutoModelForCausalLM.from_pretrained(out, dtype=dtype), list[torch.Tensor]()
        with watched(moe_layers(loaded), lambda i, x, logits, chosen, seen=seen: seen.append(logits.float())):
            loaded(ids)
        found.append(torch.stack(seen))
    assert (found[0] - found[1]).abs().max() <= 0.05 * found[0].abs().max()


def test_training_changes_the_routers_alone(tmp_path: Path, texts: dict[str, list[str]]) -> None:
    folders = [write(tmp_path / "a", "llama", 0), write(tmp_path / "b", "llama", 1, trunk=model("llama", 0))]
    out = build(recipe(folders, texts), tmp_path / "out").folder
    before = load_file(out / "model.safetensors")
    settings = RouterSettings(window=16, steps=12, batch_size=4, validate_every=4, learning_rate=5e-2)
    done = train_router(out, settings=settings, progress=False)
    after = load_file(out / "model.safetensors")
    assert done.kept
    assert done.parameters == 2 * 2 * (32 + 16)  # layers × experts × width
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{n}.block_sparse_moe.gate.weight" for n in (0, 1)}
    assert prepare(gather(out, None), tokenizer_of(out), 16, None).sizes.keys() == texts.keys()


def test_what_has_no_room_is_refused(tmp_path: Path, texts: dict[str, list[str]]) -> None:
    for kind in sorted(KINDS.keys() - set(WIDENED)):
        folder = write(tmp_path / kind, kind, 0)
        with pytest.raises(InputError, match="gate prefix"):
            build(recipe([folder, folder], texts), tmp_path / "out")
    folder = tmp_path / "llama"
    write(folder, "llama", 0)
    with pytest.raises(InputError, match="float16"):
        build(recipe([folder, folder], texts, dtype="float16"), tmp_path / "out")
    with pytest.raises(InputError, match="keeps no statistics"):
        parse(recipe([folder, folder], texts, statistics="kept"))
    with pytest.raises(InputError, match="needs texts or prompts for expert 'late'"):
        parse(recipe([folder, folder], {**texts, "late": []}))
    assert not (tmp_path / "out").exists()
