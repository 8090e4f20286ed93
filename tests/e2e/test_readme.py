"""Every command in README's bash blocks parses as it stands: no option is unknown, none that is needed is missing."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from model_fusion.cli.main import app

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The words after `model-fusion` of each line of a bash block, without its comment."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["model-fusion"]]


def parse(words: list[str]) -> None:
    """As the command line does, without running anything."""
    command, name, rest = typer.main.get_command(app), "model-fusion", list(words)
    while hasattr(command, "commands"):
        name = rest.pop(0)
        command = command.commands[name]
    command.make_context(name, rest)


@pytest.mark.parametrize("words", commands(TEXT), ids=" ".join)
def test_a_command_of_the_readme_parses(words: list[str]) -> None:
    parse(words)


@pytest.mark.parametrize(
    "line", ["model-fusion safety CHILD --parents A", "model-fusion search recipe.yml", "model-fusion nonsense"]
)
def test_a_wrong_command_is_red(line: str) -> None:
    with pytest.raises(Exception, match=r"No such option|Missing|nonsense"):
        parse(commands(f"```bash\n{line}\n```\n")[0])


def test_there_are_commands() -> None:
    assert len(commands(TEXT)) > 10
