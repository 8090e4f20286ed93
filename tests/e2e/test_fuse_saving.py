"""A saved fusion comes back with the same answers, and a part that was changed is refused."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from model_fusion.errors import InputError, IntegrityError
from model_fusion.fuse import saving
from model_fusion.fuse.bridges import Gated, Lora, Prefix
from model_fusion.fuse.experts import Expert, Field, InputSchema
from model_fusion.fuse.model import FusedModel

PROMPT = "Which flower? <|flower|>"
SCHEMA = InputSchema(tuple(Field(name, "float") for name in ("sepal_l", "sepal_w", "petal_l", "petal_w")))
ITEM = (5.1, 3.5, 1.4, 0.2)


def expert() -> Expert:
    x, y = load_iris(return_X_y=True)
    return Expert.from_sklearn(
        LogisticRegression(max_iter=500).fit(x, y), SCHEMA, classes=("setosa", "versicolor", "virginica")
    )


def logits(fused: FusedModel) -> torch.Tensor:
    with torch.no_grad():
        return fused(**fused.processor([PROMPT], [{"flower": ITEM}])).logits


@pytest.fixture(scope="module", params=[Prefix(), Gated(), Lora()], ids=lambda b: b.kind)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[FusedModel, Path]:
    fused = FusedModel.build("smollm2", experts={"flower": expert()}, bridge=request.param, dtype=torch.float32)
    for parameter in fused.trainable_parameters():  # as if trained: LoRA's B starts at zero
        parameter.data.add_(0.01)
    folder = tmp_path_factory.mktemp("fusion") / request.param.kind
    fused.save_pretrained(folder)
    return fused, folder


def test_comes_back_with_the_same_logits(saved: tuple[FusedModel, Path]) -> None:
    fused, folder = saved
    again = FusedModel.from_pretrained(folder)
    assert torch.equal(logits(again), logits(fused))
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 8_000_000
    # The check is red when a part is not restored.
    again.trainable_parameters()[-1].data.add_(1.0)
    assert not torch.equal(logits(again), logits(fused))


def test_several_bridges_for_one_base_are_switched(saved: tuple[FusedModel, Path]) -> None:
    fused, folder = saved
    other = FusedModel.build("smollm2", experts={"flower": expert()}, bridge=Prefix(tokens=2), dtype=torch.float32)
    before = logits(other)
    other.load_bridge("saved", folder)
    assert torch.equal(logits(other), logits(fused))
    other.set_bridge("default")
    assert torch.equal(logits(other), before)


def copy_of(folder: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, target / "copy"))


def test_tampered_parts_are_refused(saved: tuple[FusedModel, Path], tmp_path: Path) -> None:
    folder = copy_of(saved[1], tmp_path)
    state = load_file(folder / saving.WEIGHTS)
    state[next(iter(state))] += 1
    save_file(state, folder / saving.WEIGHTS)
    with pytest.raises(IntegrityError, match="SHA-256 differs"):
        FusedModel.from_pretrained(folder)
    config = json.loads((folder / saving.CONFIG).read_text())
    config["bridge"]["width"] = 7
    (folder / saving.CONFIG).write_text(json.dumps(config))
    with pytest.raises(IntegrityError, match="changed after it was saved"):
        FusedModel.from_pretrained(folder)
    (folder / saving.CONFIG).unlink()
    with pytest.raises(InputError, match="no fusion_config"):
        FusedModel.from_pretrained(folder)


def test_missing_expert_file_is_named(saved: tuple[FusedModel, Path], tmp_path: Path) -> None:
    folder = copy_of(saved[1], tmp_path)
    gone = next((folder / "experts" / "flower").iterdir())
    gone.unlink()
    with pytest.raises(IntegrityError, match=gone.name):
        FusedModel.from_pretrained(folder)


def test_a_changed_base_is_refused(saved: tuple[FusedModel, Path]) -> None:
    _, folder = saved
    other = FusedModel.build("smollm2", experts={"flower": expert()}, dtype=torch.float32)
    with torch.no_grad():
        other.base.get_input_embeddings().weight.add_(1e-3)
    with pytest.raises(IntegrityError, match="has changed since this bridge was trained"):
        FusedModel.from_pretrained(folder, base=other.base, tokenizer=other.tokenizer)


def test_a_full_disk_leaves_nothing(
    saved: tuple[FusedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        saved[0].save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_folders_content_is_not_overwritten(saved: tuple[FusedModel, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        saved[0].save_pretrained(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
