"""What subspace merges cost: a streamed merge's time and private memory, and the errors of the shorter SVDs.

    python benchmarks/subspace.py [--size 500M] [--models FOLDER] [--methods tsv_m iso_c] [--json FILE]

The merges are whole processes on the models of `merge.py` (made, or found in --models). `--layers 0 4` merges these
layers alone, with embeddings and head: the largest tensors are there, and a long measurement can be cut. Memory is held
against the bar of all merges, 400 MB + threads × (models + 2) × the largest tensor in float32, plus the workspace of
one SVD of the largest matrix, measured in a process of its own. Errors are ‖merged − reference‖ / ‖reference‖ of one
matrix's merged task vector, the reference with LAPACK's full float64 SVDs; energy is the share of the best possible Σσ²
that the kept triples hold.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from made_models import SIZES, Shape, make
from measure import machine
from merge import SEEDS, bound, environment, once

METHODS: dict[str, dict[str, Any]] = {
    "tsv_m": {},
    "tsv_m randomized": {"svd": "randomized"},
    "iso_c": {},
    "iso_cts": {},
    "wudi": {},
}
TASKS = (2, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="50M")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--layers", type=int, nargs=2, metavar=("FIRST", "END"), help="only these (default: all)")
    parser.add_argument("--errors", action=argparse.BooleanOptionalAction, default=True, help="measure the SVDs too")
    parser.add_argument("--models", type=Path, help="keep the models here, and use them again where they exist")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--workspace-of", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.workspace_of:
        print(json.dumps(workspace_here(*options.workspace_of)))
        return
    shape = SIZES[options.size]
    layers = tuple(options.layers or (0, shape.layers))
    facts = {"size": options.size, "parameters": shape.numel(), "seeds": SEEDS, "layers": layers, **machine()}
    print(json.dumps(facts, indent=1), flush=True)
    workspace = workspace_of(matrix_of(shape))
    result: dict[str, Any] = {"facts": facts, "workspace": workspace, "merges": [], "errors": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.models or Path(temporary)
        for name, seed in SEEDS.items():
            if not (folder / name).exists():
                make(folder / name, shape, seed, None if name == "base" else SEEDS["base"])
        for method in options.methods:
            result["merges"].append(merged(method, folder, Path(temporary), shape, layers, workspace["bytes"]))
            print(json.dumps(result["merges"][-1]), flush=True)
    if options.errors:
        for tasks in TASKS:
            for spectrum in ("flat", "decaying"):
                result["errors"] += errors(matrix_of(shape), tasks, spectrum)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def matrix_of(shape: Shape) -> tuple[int, int]:
    """The largest matrix that is no token table."""
    dims = [d for name, d in shape.tensors() if len(d) == 2 and "embed" not in name and "head" not in name]
    largest = max(dims, key=math.prod)
    return largest[0], largest[1]


def merged(
    method: str, folder: Path, out: Path, shape: Shape, layers: tuple[int, ...], workspace: int
) -> dict[str, Any]:
    """One merge of two models: seconds and private memory beside what is allowed."""
    recipe = {
        "merge_method": method.split()[0],
        "base_model": str(folder / "base"),
        "slices": [
            {"sources": [{"model": str(folder / name), "layer_range": list(layers)} for name in ("one", "two")]}
        ],
        "parameters": METHODS[method],
        "dtype": "bfloat16",
    }
    path = out / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-c", "from model_fusion.cli.main import main; main()", "merge"]
    cost = once("ours", command, path, out / "merged", memory=True)
    bar = bound(shape, len(SEEDS))
    return {
        "method": method,
        "cpu": cost.cpu,
        "wall": cost.wall,
        "private": cost.private,
        "bar": bar,
        "within": cost.private <= bar + workspace,
    }


def workspace_of(dims: tuple[int, int]) -> dict[str, Any]:
    """`workspace_here` in a fresh process."""
    command = [sys.executable, __file__, "--workspace-of", *map(str, dims)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def workspace_here(rows: int, columns: int) -> dict[str, Any]:
    """By how much one SVD of a float64 matrix raises this process's peak memory."""
    import torch

    from model_fusion.merge.methods.subspace.matrices import svd

    torch.set_num_threads(1)
    svd(torch.randn(64, 64, dtype=torch.float64))  # LAPACK is loaded now
    matrix = torch.randn(rows, columns, dtype=torch.float64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    svd(matrix)
    seconds = time.process_time() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"matrix": [rows, columns], "bytes": (after - before) << 10, "cpu": seconds}


def errors(dims: tuple[int, int], tasks: int, spectrum: str) -> list[dict[str, Any]]:
    """TSV-M of random task vectors with each SVD: CPU seconds and error.

    A flat spectrum (Gaussian) is the hardest for a random projection; real task vectors decay.
    """
    import torch

    from model_fusion.merge.methods import Key
    from model_fusion.merge.methods.subspace import tsv

    def lapack(matrix: torch.Tensor, count: int | None = None, *rest: object) -> Any:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return type(real(matrix[:1, :1]))(u[:, :count], s[:count], vh[:count])

    def kept(svd: Any, how: str) -> float:
        return float(svd(models[0], min(dims) // tasks, how).s.square().sum())

    generator = torch.Generator().manual_seed(tasks)
    models = []
    for _ in range(tasks):
        matrix = torch.randn(*dims, dtype=torch.float64, generator=generator)
        if spectrum == "decaying":
            scale = torch.arange(1, dims[1] + 1, dtype=torch.float64).rsqrt()
            turn = torch.linalg.qr(torch.randn(dims[1], dims[1], dtype=torch.float64, generator=generator))[0]
            matrix = (matrix * scale) @ turn
        models.append(matrix.float().double())
    real, rows = tsv.svd, []
    want = torch.empty(0)
    for name, how in (("LAPACK float64", lapack), ("exact", real), ("randomized", real)):
        tsv.svd = how
        start = time.process_time()
        got = tsv._tsv(models, tsv.TsvParams(svd="randomized" if name == "randomized" else "exact"), Key())
        seconds = time.process_time() - start
        want = got if name == "LAPACK float64" else want
        error = float(torch.linalg.matrix_norm(got - want) / torch.linalg.matrix_norm(want))
        row = {"svd": name, "tasks": tasks, "spectrum": spectrum, "cpu": seconds, "error": error}
        row["energy"] = kept(how, "randomized" if name == "randomized" else "exact") / kept(lapack, "exact")
        rows.append(row)
        print(json.dumps(rows[-1]), flush=True)
    tsv.svd = real
    return rows


def table(result: dict[str, Any]) -> str:
    space = result["workspace"]
    lines = [f"One SVD of {space['matrix']}: {space['bytes'] / 1e6:.0f} MB, {space['cpu']:.1f} CPU s", ""]
    lines += ["| method | CPU s | wall s | private MB | bar MB (without the SVD) | within |", "|---" * 6 + "|"]
    for row in result["merges"]:
        cells = [f"{row['cpu']:.1f}", f"{row['wall']:.1f}", f"{row['private'] / 1e6:.0f}", f"{row['bar'] / 1e6:.0f}"]
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {'yes' if row['within'] else 'no'} |")
    lines += ["", "| SVD | tasks | spectrum | CPU s a matrix | error | energy |", "|---" * 6 + "|"]
    for row in result["errors"]:
        cells = [row["svd"], str(row["tasks"]), row["spectrum"], f"{row['cpu']:.1f}", f"{row['error']:.1e}"]
        lines.append(f"| {' | '.join(cells)} | {row['energy']:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
