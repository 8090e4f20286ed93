"""LoRA extraction and merging, through files, against peft and against arithmetic written out here."""

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lora_fixtures import GPT2, LLAMA, adapter, gpt2, llama
from model_fusion.checkpoint.reader import open_checkpoint
from model_fusion.checkpoint.sources import resolve
from model_fusion.checkpoint.verify import verify
from model_fusion.cli.main import main
from model_fusion.merge.lora import extract as module
from model_fusion.merge.lora.combine import combine
from model_fusion.merge.lora.extract import extract
from model_fusion.merge.lora.factors import Factors, Wanted, truncate

IDS = torch.arange(8)[None]


def logits(model: PreTrainedModel, folder: Path | None = None) -> Tensor:
    """Of a model, with the adapter in `folder` loaded by peft on top."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # peft still uses a name that transformers deprecates
        loaded = peft.PeftModel.from_pretrained(model, str(folder)) if folder else model
        result: Tensor = loaded(IDS).logits
    return result


def tuned(model: PreTrainedModel, *, rank: int | None, embedding: bool = False, norms: bool = False) -> None:
    """Changes `model` in place: every 2-D weight by a random matrix of that rank, None: not at all."""
    torch.manual_seed(5)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            table = "embed" in name or "wte" in name or "wpe" in name
            if parameter.ndim == 2 and not table and parameter is not head and rank:
                rows, columns = parameter.shape
                parameter.add_(torch.randn(rows, rank) @ torch.randn(rank, columns) * 0.05)
            elif (parameter.ndim == 1 and norms) or (table and embedding):
                parameter.add_(torch.randn_like(parameter) * 0.1)


def saved(folder: Path, make: Any, **change: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    base, model = make(), make()
    base.save_pretrained(folder / "base")
    tuned(model, **change)
    model.save_pretrained(folder / "tuned")
    return base, model


def get(folder: Path, wanted: Wanted, name: str = "lora", **options: Any) -> module.Extracted:
    return extract(str(folder / "tuned"), str(folder / "base"), folder / name, wanted, **options)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("exact", [True, False])
def test_a_low_rank_fine_tune_is_extracted_whole_and_peft_loads_it(tmp_path: Path, make: Any, exact: bool) -> None:
    base, model = saved(tmp_path, make, rank=3)
    before = logits(base)
    made = get(tmp_path, Wanted(3, exact=exact))
    assert made.share == pytest.approx(1.0, abs=1e-6)
    assert {kept.rank for kept in made.kept} == {3}
    assert made.left == []
    assert not torch.allclose(before, logits(model), atol=1e-2)
    assert torch.allclose(logits(base, tmp_path / "lora"), logits(model), atol=1e-4, rtol=1e-4)
    assert verify(tmp_path / "lora").inputs == [str(tmp_path / "tuned"), str(tmp_path / "base")]
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (make is gpt2)
    assert len(config["target_modules"]) < 8  # by name endings, not 2 layers × 7 names
    # and this project's own reader agrees
    read = open_checkpoint(resolve(f"{tmp_path}/base+{tmp_path}/lora"))
    for name in read.names:
        assert torch.allclose(read.read(name).float(), model.state_dict()[name], atol=1e-5), name


def test_wrong_factors_turn_the_check_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = saved(tmp_path, llama, rank=3)

    def dropped(delta: Tensor, wanted: Wanted, seed: int) -> Factors:
        made = truncate(delta, wanted, seed)
        return Factors(made.a, made.b * 1.05, made.kept, made.total)

    monkeypatch.setattr(module, "truncate", dropped)
    made = get(tmp_path, Wanted(3))
    assert made.share < 0.999  # the share is measured on what is written, so it tells
    assert not torch.allclose(logits(base, tmp_path / "lora"), logits(model), atol=1e-4, rtol=1e-4)


def test_energy_chooses_the_smallest_ranks(tmp_path: Path) -> None:
    saved(tmp_path, llama, rank=20)
    made = get(tmp_path, Wanted(energy=0.9))
    base, model = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    for kept in made.kept:
        values = torch.linalg.svdvals((model[kept.name] - base[kept.name]).double()).square()
        share = values.cumsum(0) / values.sum()
        assert kept.rank == int((share < 0.9).sum()) + 1, kept.name
        assert kept.share == pytest.approx(float(share[kept.rank - 1]), abs=1e-5)
    assert len({kept.rank for kept in made.kept}) > 1
    logits(llama(), tmp_path / "lora")  # rank_pattern as peft reads it
    both = get(tmp_path, Wanted(2, energy=0.9), "two")
    assert {kept.rank for kept in both.kept} == {2}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_and_norms_are_told_or_saved_whole(tmp_path: Path, tie: bool) -> None:
    base, model = saved(tmp_path, lambda: llama(tie_word_embeddings=tie), rank=2, embedding=True, norms=True)
    told = get(tmp_path, Wanted(2))
    names = {left.name for left in told.left}
    assert names == {"model.embed_tokens.weight", "model.norm.weight"} | {
        f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm")
    }
    assert "Not held: `model.norm.weight`" in (tmp_path / "lora/README.md").read_text()
    whole = get(tmp_path, Wanted(2), "whole", save_rest=True)
    assert whole.left == []
    assert ("lm_head" in whole.saved) == tie
    read = open_checkpoint(resolve(f"{tmp_path}/base+{tmp_path}/whole"))
    for name in read.names:
        assert torch.allclose(read.read(name).float(), model.state_dict()[name], atol=1e-5), name
    assert torch.allclose(logits(base, tmp_path / "whole"), logits(model), atol=1e-4, rtol=1e-4)


def test_only_what_changed_is_a_target(tmp_path: Path) -> None:
    base, model = llama(), llama()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "tuned")
    made = get(tmp_path, Wanted(16))
    assert [(kept.name, kept.rank) for kept in made.kept] == [("model.layers.1.mlp.up_proj.weight", 1)]
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj"]
    assert torch.allclose(logits(base, tmp_path / "lora"), logits(model), atol=1e-4)


def test_threads_do_not_change_a_byte(tmp_path: Path) -> None:
    saved(tmp_path, llama, rank=20)
    for threads in (1, 3):
        get(tmp_path, Wanted(4, exact=False), f"t{threads}", threads=threads)
    one, three = (sorted((tmp_path / name).iterdir()) for name in ("t1", "t3"))
    assert [f.read_bytes() for f in one] == [f.read_bytes() for f in three]


def adapters(folder: Path, *ranks: int, targets: Any = LLAMA, make: Any = llama) -> list[str]:
    make().save_pretrained(folder / "base")
    for i, rank in enumerate(ranks):
        model = make()
        own = targets if i == 0 else targets[:2]
        adapter(
            model,
            folder / f"lora{i}",
            seed=i,
            r=rank,
            lora_alpha=2 * rank,
            target_modules=own,
            fan_in_fan_out=make is gpt2,
        )
    return [str(folder / f"lora{i}") for i in range(len(ranks))]


def exact_sum(folder: Path, names: list[str], weights: list[float]) -> dict[str, Tensor]:
    base = open_checkpoint(resolve(str(folder / "base")))
    total = {name: base.read(name).double() for name in base.names}
    for text, weight in zip(names, weights, strict=True):
        model = open_checkpoint(resolve(f"{folder}/base+{text}"))
        for name in total:
            total[name] = total[name] + weight * (model.read(name).double() - base.read(name).double())
    return total


def applied(folder: Path, name: str) -> dict[str, Tensor]:
    model = open_checkpoint(resolve(f"{folder}/base+{folder / name}"))
    return {tensor: model.read(tensor).double() for tensor in model.names}


def close(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.parametrize(("make", "targets"), [(llama, LLAMA), (gpt2, GPT2)])
def test_cat_is_the_exact_weighted_sum(tmp_path: Path, make: Any, targets: list[str]) -> None:
    names = adapters(tmp_path, 3, 2, targets=targets, make=make)
    made = combine(names, tmp_path / "out", [0.75, -0.5])
    assert set(made.ranks.values()) <= {3, 5}
    expected = exact_sum(tmp_path, names, [0.75, -0.5])
    assert close(applied(tmp_path, "out"), expected)
    combine(names, tmp_path / "wrong", [0.75, -0.4])
    assert not close(applied(tmp_path, "wrong"), expected)
    combine(names, tmp_path / "mean")
    assert close(applied(tmp_path, "mean"), exact_sum(tmp_path, names, [0.5, 0.5]))
    assert verify(tmp_path / "out").inputs == names
    logits(make(), tmp_path / "out")


def test_a_pickled_adapter_is_merged_and_verified(tmp_path: Path) -> None:
    names = adapters(tmp_path, 3, 2)
    file = Path(names[1], "adapter_model.safetensors")
    combine(names, tmp_path / "plain", [0.5, 0.5], "cat")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    combine(names, tmp_path / "out", [0.5, 0.5], "cat")
    assert close(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "out")))
    assert len(verify(tmp_path / "out").inputs) == 2


def test_svd_is_the_best_cut_of_the_sum(tmp_path: Path) -> None:
    names = adapters(tmp_path, 4, 4)
    made = combine(names, tmp_path / "out", [1.0, 1.0], "svd", rank=3)
    assert set(made.ranks.values()) == {3}
    exact, base = exact_sum(tmp_path, names, [1.0, 1.0]), open_checkpoint(resolve(str(tmp_path / "base")))
    got = applied(tmp_path, "out")
    for module_name, share in made.shares.items():
        name = module_name + ".weight"
        delta = exact[name] - base.read(name).double()
        values = torch.linalg.svdvals(delta).square()
        lost = float((got[name] - exact[name]).square().sum())
        assert lost == pytest.approx(float(values[3:].sum()), rel=1e-3)
        assert share == pytest.approx(float(values[:3].sum() / values.sum()), abs=1e-5)
    full = combine(names, tmp_path / "full", [1.0, 1.0], "svd", energy=1.0)
    assert max(full.ranks.values()) == 8
    assert close(applied(tmp_path, "full"), exact)


def test_linear_is_what_peft_calls_linear(tmp_path: Path) -> None:
    adapters(tmp_path, 3, 3, targets=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "lora0"), adapter_name="x")
        model.load_adapter(str(tmp_path / "lora1"), adapter_name="y")
        model.add_weighted_adapter(["x", "y"], [0.7, -0.4], "both", combination_type="linear")
        model.set_adapter("both")
        expected = model.merge_and_unload().state_dict()
    made = combine([str(tmp_path / f"lora{i}") for i in (0, 1)], tmp_path / "out", [0.7, -0.4], "linear")
    got = applied(tmp_path, "out")
    assert all(torch.allclose(got[name], expected[name].double(), atol=1e-5) for name in got)
    assert min(made.shares.values()) < 0.9  # the cross terms are told
    names = [str(tmp_path / f"lora{i}") for i in (0, 1)]
    assert not close(got, exact_sum(tmp_path, names, [0.7, -0.4]))


BROKEN: dict[str, tuple[list[str], str]] = {
    "no such base": (["extract", "tuned", "--base", "./nope"], "no such folder"),
    "rank 0": (["extract", "tuned", "--base", "base", "--rank", "0"], "rank 0: give 1 or more"),
    "energy 2": (["extract", "tuned", "--base", "base", "--energy", "2"], "energy 2: give a share"),
    "svd typo": (["extract", "tuned", "--base", "base", "--svd", "fast"], "give auto, exact or randomized"),
    "dtype typo": (["extract", "tuned", "--base", "base", "--dtype", "int8"], "give float32, float16 or bfloat16"),
    "equal": (["extract", "base", "--base", "base"], "differ in nothing"),
    "exclude nothing": (["extract", "tuned", "--base", "base", "--exclude", "qproj"], "'qproj' matches no tensor"),
    "another family": (["extract", "gpt2", "--base", "base"], "different architectures"),
    "another width": (["extract", "narrow", "--base", "base"], "does not fit its base: 'lm_head.weight' is"),
    "NaN": (["extract", "nan", "--base", "base"], "nan/model.safetensors: NaN or Inf in 'model.layers.0.mlp"),
    "existing output": (["extract", "tuned", "--base", "base", "-o", "lora0"], "already exists"),
    "output is the input": (["extract", "tuned", "--base", "base", "-o", "base", "--overwrite"], "choose another"),
    "one adapter": (["merge", "lora0"], "two or more"),
    "the same twice": (["merge", "lora0", "lora0"], "two or more different"),
    "weights too few": (["merge", "lora0", "lora1", "--weights", "1"], "2 adapters but weights 1"),
    "weights of words": (["merge", "lora0", "lora1", "--weights", "a,b"], "give numbers such as"),
    "weights NaN": (["merge", "lora0", "lora1", "--weights", "nan,1"], "2 adapters but weights nan"),
    "mode typo": (["merge", "lora0", "lora1", "--mode", "ties"], "give cat, svd or linear"),
    "rank for cat": (["merge", "lora0", "lora1", "--rank", "2"], "belong to mode svd"),
    "linear of unequal ranks": (["merge", "lora0", "lora1", "--mode", "linear"], "adapters of one rank"),
    "a model as adapter": (["merge", "lora0", "base"], "no adapter_config.json"),
    "an adapter as model": (["extract", "lora1", "--base", "base"], "is a LoRA adapter, not a model"),
    "another base": (["merge", "lora0", "other"], "adapters of different bases"),
    "another shape": (["merge", "lora0", "wide"], "not of one base"),
    "whole modules": (["merge", "lora0", "whole"], "holds whole tensors"),
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("room")
    saved(folder, llama, rank=3)
    adapters(folder, 3, 2)
    gpt2().save_pretrained(folder / "gpt2")
    llama(hidden_size=16).save_pretrained(folder / "narrow")
    adapter(llama(hidden_size=16), folder / "wide", r=3, target_modules=LLAMA)
    adapter(llama(), folder / "whole", r=3, target_modules=LLAMA, modules_to_save=["norm"])
    adapter(llama(), folder / "other", r=3, target_modules=LLAMA)
    for name in ("lora0", "other"):
        file = folder / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": f"org/{name}"}))
    broken = llama()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[3, 4] = float("nan")
    broken.save_pretrained(folder / "nan")
    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_a_fault_is_one_line_and_leaves_nothing(
    case: str, room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = BROKEN[case]
    monkeypatch.chdir(room)
    before = sorted(room.rglob("*"))
    output = [] if "-o" in words else ["-o", "out"]
    monkeypatch.setattr(sys, "argv", ["model-fusion", "lora", *words, *output])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(room.rglob("*")) == before


def test_the_recorded_command_makes_the_same_adapter(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(room)
    commands = {
        "again1": ["extract", "tuned", "--base", "base", "--energy", "0.8", "--exclude", "mlp", "--save-rest"],
        "again2": ["merge", "lora0", "lora1", "--weights=0.5,-1", "--mode", "svd", "--rank", "2"],
    }
    for name, words in commands.items():
        monkeypatch.setattr(sys, "argv", ["model-fusion", "lora", *words, "-o", name])
        main()
        recorded = json.loads((room / name / "model_fusion.json").read_text())["command"]
        monkeypatch.setattr(sys, "argv", recorded.split())
        main()
        made = {file.name: file.read_bytes() for file in (room / name).iterdir()}
        assert {file.name: file.read_bytes() for file in (room / "out").iterdir()} == made
        shutil.rmtree(room / "out")
        shutil.rmtree(room / name)
    said = capsys.readouterr().out
    assert "self_attn.q_proj" in said
    assert "NOT in the adapter" in said
