"""mergekit as another process, and what it wrote."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


def run_mergekit(
    python: str, jobs: list[dict[str, Any]], folder: Path, cwd: Path | None = None
) -> dict[str, str | None]:
    """Output → what mergekit failed with, or None. `cwd`: where the recipes' paths start."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps([{k: job[k] for k in ("recipe", "out", "masks")} for job in jobs]))
    driver = Path(__file__).resolve().with_name("mergekit_driver.py")
    done = subprocess.run([python, str(driver), str(listed)], capture_output=True, text=True, cwd=cwd)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) != len(jobs):
        raise RuntimeError(done.stderr[-3000:])
    return {line["out"]: line["error"] for line in lines}


def read(folder: Path) -> dict[str, Tensor]:
    """A folder's tensors; mergekit puts GPT-2's under `transformer.`, which stock transformers reads either way."""
    files = sorted(folder.glob("*.safetensors"))
    return {k.removeprefix("transformer."): v for file in files for k, v in load_file(file).items()}
