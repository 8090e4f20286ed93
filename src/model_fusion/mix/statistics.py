"""What ridge and mean gates need of a domain: Σx, XᵀX and a count at the TRUE router input of a dense trunk.

The router input of layer l is what the dense model's FFN of layer l receives. It is measured on one fixed trunk:
in the mixed model it depends on the routing of earlier layers (`verdict` measures by how much). One domain's
statistics know nothing of the others', so experts can be added and dropped.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from model_fusion.errors import IntegrityError

_BATCH = 4
_PROBE = 256
_PROBE_SHARE = 8  # one window of eight goes to the probe, until it is full


@dataclass
class Statistics:
    """count: tokens. total [L, H] = Σx and gram [L, H, H] = XᵀX, float64. probe [L, N, H], float32: inputs that
    are in neither sum, for the temperature and a held-out accuracy."""

    count: int
    total: Tensor
    gram: Tensor
    probe: Tensor

    def add(self, inputs: Tensor) -> None:
        """inputs [L, n, H]."""
        self.count += inputs.shape[1]
        for layer, x in enumerate(inputs):  # a batch's product in float32, the running sum in float64
            self.total[layer] += x.double().sum(0)
            self.gram[layer] += x.T @ x

    @classmethod
    def empty(cls, layers: int, width: int) -> "Statistics":
        zeros = torch.zeros(layers, width, dtype=torch.float64)
        return cls(0, zeros, torch.zeros(layers, width, width, dtype=torch.float64), torch.zeros(layers, 0, width))


def router_inputs(model: Any, ids: Tensor, layers: Sequence[int] | None = None, module: str = "mlp") -> Tensor:
    """ids [b, t] → [L, b·t, H], float32: what `module` (the FFN) of each (chosen) layer receives."""
    modules = [layer.get_submodule(module) for layer in model.model.layers]
    seen: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[number] = args[0].detach().float().reshape(-1, args[0].shape[-1])

        return hook

    chosen = list(range(len(modules))) if layers is None else list(layers)
    handles = [modules[n].register_forward_pre_hook(keep(n)) for n in chosen]
    try:
        with torch.inference_mode():
            model.model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([seen[n] for n in chosen]).cpu()


def probing(ids: Tensor, most: int | None = None) -> tuple[list[int], list[int]]:
    """Which windows of ids [N, T] are probes (at most `most`), and which are counted."""
    probes = [n for n in range(len(ids)) if n % _PROBE_SHARE == _PROBE_SHARE - 1] or [len(ids) - 1]
    probes = probes[:most]
    return probes, [n for n in range(len(ids)) if n not in probes] or probes  # a single window has to serve as both


def collect(model: Any, ids: Tensor, layers: Sequence[int], module: str = "mlp") -> Statistics:
    """Stream one domain's windows ids [N, T] through the dense trunk."""
    result, probes, held = Statistics.empty(len(layers), int(model.config.hidden_size)), [], 0
    chosen, counted = probing(ids, most=max(1, -(-_PROBE // ids.shape[1])))
    for n in chosen:
        x = router_inputs(model, ids[n : n + 1], layers, module)[:, : _PROBE - held]
        probes.append(x)
        held += x.shape[1]
    for start in range(0, len(counted), _BATCH):
        result.add(router_inputs(model, ids[counted[start : start + _BATCH]], layers, module))
    result.probe = torch.cat(probes, dim=1)
    return result


class StatisticsFolder:
    """One file a domain, named by its trunk, layers and tokens: a changed text makes another file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, name: str, trunk: str, ids: Tensor, layers: Sequence[int]) -> Path:
        key = hashlib.sha256(repr((trunk, list(layers), tuple(ids.shape))).encode() + ids.numpy().tobytes())
        plain = re.sub(r"[^\w.-]", "_", name)  # an expert may be called after a hub id, with a slash
        return self.folder / f"{plain}-{key.hexdigest()[:16]}.safetensors"

    def load(self, file: Path) -> Statistics | None:
        if not file.is_file():
            return None
        try:
            table = load_file(file)
            return Statistics(int(table["count"]), table["total"], table["gram"], table["probe"])
        except (SafetensorError, KeyError) as error:
            raise IntegrityError(f"{file}: damaged statistics; delete the file, it will be made again") from error

    def save(self, file: Path, statistics: Statistics) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        table = {"count": torch.tensor(statistics.count), "total": statistics.total}
        table |= {"gram": statistics.gram, "probe": statistics.probe.contiguous()}
        partial = file.with_suffix(".partial")
        partial.write_bytes(save(table))
        partial.replace(file)


def accuracy(rows: Tensor, domains: Sequence[Statistics]) -> list[float]:
    """Per layer, the share of probe tokens (domains weigh the same) whose highest score is their own domain's."""
    result = []
    for layer, weight in enumerate(rows):
        right = [float(((d.probe[layer] @ weight.T).argmax(-1) == i).float().mean()) for i, d in enumerate(domains)]
        result.append(sum(right) / len(right))
    return result
