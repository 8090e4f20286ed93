"""Every flag of mergekit-yaml 0.1.5 works on our command line, or is answered with what to do instead."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from merge_fixtures import write
from model_fusion.cli.main import app
from model_fusion.cli.mergekit import translated
from model_fusion.errors import InputError

# as its --help lists them
SWITCHES = [
    "allow-crimes", "unsafe-truncate-embeddings", "trust-remote-code", "quiet", "cuda", "low-cpu-memory",
    "lazy-unpickle", "read-to-gpu", "multi-gpu", "async-write", "copy-tokenizer", "clone-tensors", "write-model-card",
    "safe-serialization",
]  # fmt: skip
VALUES = {
    "--transformers-cache": "DIR", "--lora-merge-cache": "DIR", "--lora-merge-dtype": "float32", "--random-seed": "7",
    "--device": "cuda", "-j": "2", "--num-threads": "2", "--write-threads": "2", "--out-shard-size": "5B",
}  # fmt: skip
OURS = {"--trust-remote-code", "--no-trust-remote-code", "--device", "--threads"}
ALL = [[f"--{name}"] for name in SWITCHES] + [[f"--no-{name}"] for name in SWITCHES]
ALL += [[flag, value] for flag, value in VALUES.items()] + [["-v"], ["--gpu-rich"]]


ANSWERED = {
    "--unsafe-truncate-embeddings", "--no-copy-tokenizer", "--no-write-model-card", "--no-safe-serialization",
    "--transformers-cache", "--random-seed", "--out-shard-size",
}  # fmt: skip


@pytest.mark.parametrize("words", [words for words in ALL if words[0] not in ANSWERED], ids=" ".join)
def test_a_flag_is_understood(words: list[str]) -> None:
    kept, dropped = translated(["r.yml", *words, "out"])
    assert [kept[0], kept[-1]] == ["r.yml", "out"]
    assert (len(kept) == 2 and dropped == words[:1]) or kept[1] in OURS


@pytest.mark.parametrize("words", [words for words in ALL if words[0] in ANSWERED], ids=" ".join)
def test_a_flag_without_counterpart_is_answered(words: list[str]) -> None:
    with pytest.raises(InputError, match=f"^{words[0]} of mergekit: "):
        translated(["r.yml", *words, "out"])


def test_values_may_stand_behind_an_equals_sign() -> None:
    assert translated(["--num-threads=3", "--lora-merge-cache=x", "r"]) == (
        ["--threads", "3", "r"],
        ["--lora-merge-cache"],
    )
    with pytest.raises(InputError, match="write `seed: 7` in the recipe"):
        translated(["--random-seed=7"])


def test_our_own_words_are_left_alone() -> None:
    words = [
        "r.yml",
        "-o",
        "out",
        "--overwrite",
        "--resume",
        "--threads",
        "2",
        "--shard-size",
        "1GB",
        "--fill-missing",
        "a",
    ]
    assert translated(words) == (words, [])


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("ab"):
        write(tmp_path / name, seed)
    models = [{"model": name, "parameters": {"weight": 1}} for name in "ab"]
    (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_command_line_of_mergekit_merges(room: Path) -> None:
    words = ["merge", "r.yml", "out", "--allow-crimes", "--copy-tokenizer", "--lazy-unpickle", "-j", "2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "not needed here: --allow-crimes, --copy-tokenizer, --lazy-unpickle" in done.output
    assert (room / "out/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["r.yml"], "name the folder to write once"),
        (["r.yml", "out", "-o", "out"], "name the folder to write once"),
        (["r.yml", "out", "--shard-size", "0", "--dry-run"], "at least one byte"),
        (["r.yml", "out", "--shard-size", "big", "--dry-run"], "give a size such as 5GB"),
    ],
)
def test_refused(room: Path, words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["merge", *words])
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)
    assert sorted(path.name for path in room.iterdir()) == ["a", "b", "r.yml"]
