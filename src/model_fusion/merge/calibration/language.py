"""Statistics and coefficients of causal LMs on text: loads checkpoints, cuts texts into windows, names as on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model_fusion.checkpoint.llm import LLMSource, load_llm
from model_fusion.checkpoint.lora import adapt
from model_fusion.checkpoint.reader import open_checkpoint
from model_fusion.checkpoint.sources import resolve
from model_fusion.checkpoint.statistics import Kind, Statistics
from model_fusion.errors import InputError, MissingDependencyError
from model_fusion.merge.calibration.collect import Labels, collect_statistics
from model_fusion.merge.calibration.entropy import Coefficients, adamerging
from model_fusion.merge.calibration.propagate import collect_merged_statistics
from model_fusion.merge.device import usable
from model_fusion.training.texts import documents, windows

_BATCH = 4
Step = Callable[[int], object]


@dataclass(frozen=True)
class Texts:
    """files: text files or folders; window: tokens a sequence; tokens: at most so many, evenly from the documents."""

    files: Sequence[str]
    window: int = 128
    tokens: int | None = 16384

    def read(self) -> list[str]:
        """The documents. Raises InputError for texts that are missing."""
        if not self.files:
            raise InputError("no text: give files or folders with --texts")
        return documents(self.files)

    def batches(self, read: Sequence[str], model: Model) -> list[dict[str, Any]]:
        """`input_ids` [4, window] each, where the model is. Raises InputError for texts that are too short."""
        ids = windows(read, model.tokenizer, self.window, self.tokens).to(next(model.module.parameters()).device)
        return [{"input_ids": part, "use_cache": False} for part in torch.split(ids, _BATCH)]


class Model:
    """A recipe's model (`base+adapter` too) as a module in float32, and its names on disk."""

    def __init__(self, text: str, device: str = "cpu") -> None:
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(f"running a model needs {error.name}: install model-fusion[fuse]") from None
        source = resolve(text)
        if source.file is not None:
            raise InputError(f"{text}: a bare state dict cannot be run; in Python, collect_statistics takes its module")
        checkpoint = open_checkpoint(source)
        self.text = text
        found = load_llm(LLMSource(text, str(source.folder), ""), dtype=torch.float32)
        self.module: nn.Module = found[0]
        self.tokenizer: Any = found[1]
        weights = dict(self.module.named_parameters(remove_duplicate=False))
        self._names: dict[int, str] = {}
        for name, own in adapt(weights, checkpoint).items():
            self._names.setdefault(id(weights[name]), own)
        self._ids = {name: id(weight) for name, weight in weights.items()}
        with usable(device):
            self.module.to(device)

    def on_disk(self, name: str) -> str | None:
        """What a weight of the module is called in its files; None for one that they hold in another form."""
        return self._names.get(self._ids[name])

    def named(self, found: Statistics, texts: Texts) -> Statistics:
        """The statistics under the names on disk."""
        tensors: dict[str, Tensor] = {}
        lost = []
        for name, tensor in found.items():
            own = self.on_disk(name)
            if own is None:
                lost.append(name)
            else:
                tensors[own] = tensor
        first = frozenset(own for name in found.inputs_first if (own := self.on_disk(name)))
        about = {**found.about, "model": self.text, "window": texts.window, "tokens": texts.tokens}
        return replace(found, tensors=tensors, inputs_first=first, unseen=(*found.unseen, *lost), about=about)


def of_model(
    model: str,
    texts: Texts,
    kind: Kind,
    *,
    labels: Labels = "own",
    seed: int = 0,
    only: Sequence[str] = (),
    device: str = "cpu",
    step: Step = lambda total: None,
) -> Statistics:
    """`collect_statistics` of one model on text. Raises InputError."""
    read = texts.read()
    loaded = Model(model, device)
    batches = texts.batches(read, loaded)
    found = collect_statistics(
        loaded.module, batches, kind, labels=labels, seed=seed, only=only, step=lambda: step(len(batches))
    )
    return loaded.named(found, texts)


def of_merged(
    models: Sequence[str],
    texts: Sequence[Texts],
    *,
    alpha: float = 0.9,
    device: str = "cpu",
    step: Step = lambda total: None,
) -> list[Statistics]:
    """`collect_merged_statistics` of models, each on its own text. Raises InputError."""
    if len(models) != len(texts):
        raise InputError(f"{len(models)} models and {len(texts)} texts: give one --texts a model, in their order")
    read = [one.read() for one in texts]
    loaded = [Model(model, device) for model in models]
    batches = [one.batches(r, model) for model, one, r in zip(loaded, texts, read, strict=True)]
    found = collect_merged_statistics([m.module for m in loaded], batches, alpha=alpha, step=step)
    return [m.named(own, one) for m, own, one in zip(loaded, found, texts, strict=True)]


def coefficients(
    base: str,
    models: Sequence[str],
    texts: Sequence[Texts],
    *,
    steps: int,
    learning_rate: float,
    device: str = "cpu",
    step: Step = lambda total: None,
) -> Coefficients:
    """`adamerging` of models by the entropy of their next-token predictions on each of the texts. Raises InputError."""
    read = [one.read() for one in texts]
    start = Model(base, device)
    batches = [one.batches(r, start) for one, r in zip(texts, read, strict=True)]
    states = [Model(model).module.state_dict() for model in models]
    found = adamerging(start.module, states, batches, steps=steps, learning_rate=learning_rate, step=step)
    named = tuple({own: value for n, value in one.items() if (own := start.on_disk(n))} for one in found.weights)
    return replace(found, weights=named)
