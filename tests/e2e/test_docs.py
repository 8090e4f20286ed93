"""Every document's python and bash blocks run as written, in order, in one empty folder.

An `output` block holds what the block before it prints. Python blocks of a document share their names. A document
that begins with `<!-- after: other.md -->` uses what the other one makes, whose blocks run first.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(python|bash|output)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = [file for file in sorted((ROOT / "docs").glob("*.md")) if FENCE.search(file.read_text(encoding="utf-8"))]
AFTER = re.compile(r"<!-- after: (\S+) -->")
RUNNER = """
import contextlib, io, json, subprocess, sys
names, printed = {"__name__": "document"}, ""
for kind, line, text in json.loads(sys.stdin.read()):
    if kind == "output":
        assert printed.strip() == text.strip(), f"line {line}: printed {printed!r}"
    elif kind == "python":
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\\n" * line + text, "document", "exec"), names)
        printed = out.getvalue()
    else:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True)
        assert done.returncode == 0, f"line {line}: {done.stdout}{done.stderr}"
        printed = done.stdout
"""


def blocks(text: str) -> list[tuple[str, int, str]]:
    """(kind, line number of its fence, content) of every block that runs or is compared."""
    return [(m[1], text[: m.start()].count("\n") + 1, m[2]) for m in FENCE.finditer(text)]


def run(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a document in `folder`, with the command `model-fusion` of this checkout first on the path."""
    bin = folder.parent / f"{folder.name}-bin"
    bin.mkdir()
    folder.mkdir()
    shim = bin / "model-fusion"
    shim.write_text(f"#!{sys.executable}\nfrom model_fusion.cli.main import main\n\nmain()\n")
    shim.chmod(0o755)
    path = {"PATH": f"{bin}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(blocks(text)),
        cwd=folder,
        env={**os.environ, **path},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.stem)
def test_document_runs_as_written(document: Path, tmp_path: Path) -> None:
    text = document.read_text(encoding="utf-8")
    if before := AFTER.match(text):
        text = (document.parent / before[1]).read_text(encoding="utf-8") + "\n" + text
    done = run(text, tmp_path / "room")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_readmes_first_example_says_what_it_promises(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    kind, _, code = next(block for block in blocks(text) if block[0] == "python")
    promised = re.findall(r"print\(.*\)  # (.*)\n", code)
    assert promised
    done = run(f"```{kind}\n{code}```\n```output\n{chr(10).join(promised)}\n```\n", tmp_path / "room")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\n1 / 0\n```\n", "ZeroDivisionError"),
        ("```bash\nfalse\ntrue\n```\n", "line 1"),
        ("```bash\necho one\n```\n\n```output\ntwo\n```\n", "printed 'one"),
        ("```bash\nmodel-fusion fuse none.yml -o out\n```\n", "no such recipe"),
    ],
)
def test_a_document_that_is_wrong_is_red(text: str, message: str, tmp_path: Path) -> None:
    done = run(text, tmp_path / "room")
    assert done.returncode != 0
    assert message in done.stderr


def test_blocks_share_the_folder_and_python_blocks_their_names(tmp_path: Path) -> None:
    parts = [("python", "a = 1"), ("bash", "echo 2 > f"), ("python", "print(a, open('f').read())"), ("output", "1 2")]
    text = "".join(f"```{kind}\n{content}\n```\n" for kind, content in parts)
    done = run(text, tmp_path / "room")
    assert done.returncode == 0, done.stderr
