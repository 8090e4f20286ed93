"""Do transformers 4.57 and 5.x load the same mixture, no key missing or unexpected, with the same logits?

python benchmarks/mix_versions.py --other PYTHON --json out.json

PYTHON is an interpreter of another environment (torch, transformers 4.57, safetensors); it runs this file too.
Every family, built from tiny random models with tied embeddings, grouped heads, llama3 rope and biases; those that
gate prefix widens, widened too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

IDS = torch.arange(48).view(2, 24) * 5 % 256


def logits_of(root: Path, out: Path) -> dict[str, Any]:
    """Load every folder of `root`; save the logits, return each one's complaints."""
    transformers.utils.logging.set_verbosity_error()
    found, notes = {}, {}
    for folder in sorted(p for p in root.iterdir() if (p / "config.json").is_file()):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        with torch.no_grad():
            found[folder.name] = model.float().eval()(IDS).logits.contiguous()
        notes[folder.name] = {key: sorted(map(str, value)) for key, value in info.items() if value}
    save_file(found, out)
    return notes


def build_all(root: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from mix_fixtures import KINDS, model, write
    from model_fusion.mix.build import build
    from model_fusion.mix.families import FAMILIES

    for kind in KINDS:
        trunk = model(kind, 0)
        models = [write(root / "dense" / f"{kind}{i}", kind, i, trunk) for i in range(3)]
        experts = [{"model": str(m), "prompts": [f"{m.name} speaks of itself {i} times"]} for i, m in enumerate(models)]
        recipe = {"base_model": str(models[0]), "experts": experts}
        build({**recipe, "gate": "random"}, root / kind)
        if FAMILIES[KINDS[kind][1]].widens:
            build({**recipe, "gate": "prefix"}, root / f"{kind}_prefix")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", help="another environment's Python")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        notes = logits_of(args.load, args.json.with_suffix(".safetensors"))
        args.json.write_text(json.dumps({"transformers": transformers.__version__, "notes": notes}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        build_all(root)
        notes = logits_of(root, root / "own.safetensors")
        theirs = root / "other.json"
        subprocess.run([args.other, __file__, "--load", str(root), "--json", str(theirs)], check=True)
        other = json.loads(theirs.read_text())
        mine, second = load_file(root / "own.safetensors"), load_file(theirs.with_suffix(".safetensors"))
    rows = {
        kind: {
            "max_logit_difference": float((mine[kind] - second[kind]).abs().max()),
            "complaints": [*map(str, notes[kind].items()), *map(str, other["notes"][kind].items())],
        }
        for kind in mine
    }
    report = {"versions": [transformers.__version__, other["transformers"]], "families": rows}
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
