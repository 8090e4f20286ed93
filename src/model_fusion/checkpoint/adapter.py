"""A LoRA adapter's folder as peft writes it: what its settings mean, and its matrices. No peft needed, no base known.

What peft would compute otherwise than W + scale · B A (DoRA, PiSSA's changed base …) is refused by name.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model_fusion.checkpoint.formats import Entry, read_header
from model_fusion.checkpoint.reader import load_pickle, map_tensor, read_json
from model_fusion.errors import InputError

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_NAME = re.compile(r"^(.+)\.lora_(embedding_)?(A|B)(?:\.default)?(?:\.weight)?$")
_REFUSED = (
    "use_dora", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config", "use_bdlora",
)  # fmt: skip
# these initialisations subtract something from the base's weights, so the adapter alone is not the difference
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Pair:
    """The matrices A [rank, in] and B [out, rank] of one module, and the scale of their product."""

    a: Entry
    b: Entry
    scale: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the product; an embedding's table is stored the other way round."""
        return (self.b.shape[0], self.a.shape[1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B in float32."""
        return map_tensor(self.a).float(), map_tensor(self.b).float()


class Adapter:
    """`pairs`: module → matrices; `saved`: parameter → the whole tensor that replaces the base's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        pickled = folder / PICKLED
        self.file = pickled if pickled.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS
        if not (folder / CONFIG).is_file():
            raise InputError(f"{folder}: no {CONFIG}; expected a LoRA folder as peft writes it")
        self.config = read_json(folder / CONFIG)
        self._check()
        if not self.file.is_file():
            raise InputError(f"{self.file}: the adapter's weights are missing")
        self.pairs: dict[str, Pair] = {}
        self.saved: dict[str, Entry] = {}
        self._read()

    def _check(self) -> None:
        config, file = self.config, self.folder / CONFIG
        kind = config.get("peft_type", "LORA")
        if kind != "LORA":
            raise InputError(f"{file}: peft_type {kind!r} is not LoRA")
        for key in _REFUSED:
            if config.get(key):
                raise InputError(f"{file}: {key} is not supported; merge the adapter with peft first")
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
            raise InputError(
                f"{file}: init_lora_weights {start!r} changes the base; convert it to LoRA with peft first"
            )
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise InputError(f"{file}: r and lora_alpha must be numbers, r at least 1")
        for key in ("rank_pattern", "alpha_pattern"):
            table = config.get(key) or {}
            if not isinstance(table, dict) or not all(isinstance(v, int | float) for v in table.values()):
                raise InputError(f"{file}: {key} must map module names to numbers")

    def _pattern(self, key: str, module: str) -> Any:
        """peft's rule: the first pattern that matches the end of the module's path."""
        table: dict[str, Any] = self.config.get(key) or {}
        for pattern, value in table.items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                raise InputError(f"{self.folder / CONFIG}: {key} {pattern!r} is no pattern ({error})") from error
            if found:
                return value
        return self.config["r" if key == "rank_pattern" else "lora_alpha"]

    def _entries(self) -> list[Entry]:
        if self.file.name == WEIGHTS:
            return read_header(self.file)
        found = load_pickle(self.file).items()
        return [Entry(name, t.dtype, tuple(t.shape), self.file, 0, t.nbytes, t.detach()) for name, t in found]

    def _read(self) -> None:
        halves: dict[str, dict[str, Entry]] = {}
        embeddings: set[str] = set()
        for entry in self._entries():
            name = entry.name.removeprefix(PREFIX)
            match = _NAME.match(name)
            if match is None:
                if ".lora_" in name:
                    raise InputError(f"{self.file}: tensor {entry.name!r} is not a LoRA matrix; merge with peft first")
                saved = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
                self.saved[saved.replace(".modules_to_save.", ".")] = entry
                continue
            halves.setdefault(match.group(1), {})[match.group(3)] = entry
            if match.group(2):
                embeddings.add(match.group(1))
        for module, half in halves.items():
            if set(half) != {"A", "B"}:
                raise InputError(f"{self.file}: {module!r} has lora_{min(half)} only; the pair is incomplete")
            a, b = half["A"], half["B"]
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
                raise InputError(f"{self.file}: {module!r} has A {list(a.shape)} and B {list(b.shape)}: no product")
            rank, alpha = self._pattern("rank_pattern", module), self._pattern("alpha_pattern", module)
            if rank != a.shape[0]:
                raise InputError(f"{self.file}: {module!r} has rank {a.shape[0]}, {CONFIG} says {rank}")
            scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
            self.pairs[module] = Pair(a, b, scale, module in embeddings)
        if not self.pairs and not self.saved:
            raise InputError(f"{self.file}: holds no LoRA matrices")
