"""Trains the routers of a mixed folder, and nothing else, on the user's text; the folder is then written anew.

The routers are found by module, never by name: `"gate" in name` would also train `gate_proj`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, softmax

from model_fusion.checkpoint import card, lineage
from model_fusion.checkpoint.reader import Checkpoint, read_json
from model_fusion.checkpoint.small_files import small_files
from model_fusion.checkpoint.sources import Source
from model_fusion.checkpoint.writer import CheckpointWriter
from model_fusion.errors import InputError
from model_fusion.mix.calibrate import tokenizer_of
from model_fusion.mix.domains import Domains, Texts, gather, prepare
from model_fusion.mix.load import load_mixed
from model_fusion.mix.routing import MoELayer, family_of, moe_layers, top_k, watched
from model_fusion.training.loop import History, Measure, TrainSettings, train


@dataclass(frozen=True)
class RouterSettings:
    """routing: "top_k" as the model runs, or "soft" (every expert, weighted) while training. balance: weight of the
    load-balancing loss (Fedus et al. 2021, equation 4). domain: weight of a cross-entropy that asks each router for
    the text's own expert. window: tokens a sequence. tokens: at most so many training tokens a domain."""

    routing: Literal["top_k", "soft"] = "top_k"
    balance: float = 0.0
    domain: float = 0.0
    window: int = 128
    tokens: int | None = None
    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 3e-3
    validate_every: int = 20
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.window < 2 or self.balance < 0 or self.domain < 0:
            raise InputError("window must be at least 2, balance and domain at least 0")
        if self.routing not in ("top_k", "soft"):
            raise InputError(f"routing {self.routing!r}: give top_k or soft")
        self.loop()

    def loop(self) -> TrainSettings:
        """The shared loop's part."""
        return TrainSettings(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            validate_every=self.validate_every,
            patience=self.patience,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Trained:
    """Held-out loss (nats a token, domains weigh the same) before and after; `kept`: whether training lowered it.
    Where it did not, the old routers stay. `parameters`: how many were trained."""

    folder: Path
    before: float
    after: float
    kept: bool
    parameters: int
    history: History


def train_router(
    folder: Path, texts: Texts | Path | None = None, settings: RouterSettings | None = None, *, progress: bool = True
) -> Trained:
    """Train the routers of `folder` in place. An interrupted run goes on from `.NAME.training` beside it."""
    settings = settings or RouterSettings()
    found = gather(folder, texts)
    model = load_mixed(folder)
    domains = prepare(found, tokenizer_of(folder), settings.window, settings.tokens)
    layers, parameters = freeze(model)
    _check_that_something_trains(layers, settings)
    objective = _Objective(model, layers, domains, settings)
    before = objective.held_out().loss
    start = [p.detach().clone() for p in parameters]
    history = train(
        objective,
        parameters,
        len(objective.ids),
        objective.held_out,
        settings.loop(),
        resume=folder.parent / f".{folder.name}.training",
        fingerprint=_fingerprint(folder, domains, settings),
        progress=progress,
    )
    after = objective.held_out().loss
    kept = after < before
    if kept:
        _rewrite(folder, model, layers, {"settings": asdict(settings), "before": before, "after": after})
    else:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    return Trained(folder, before, after, kept, sum(p.numel() for p in parameters), history)


def freeze(model: Any) -> tuple[list[MoELayer], list[nn.Parameter]]:
    """Freeze everything but the routers' weights: layers × experts × width parameters."""
    layers = moe_layers(model)
    model.requires_grad_(False)
    parameters = [cast(nn.Parameter, layer.router.weight) for layer in layers]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return layers, parameters


def _check_that_something_trains(layers: list[MoELayer], settings: RouterSettings) -> None:
    alone = layers[0].router.top_k == 1 and settings.routing == "top_k"
    if alone and not (settings.balance or settings.domain):
        raise InputError(
            "with one expert a token its weight is always 1, so the text's loss cannot move a router: "
            "give --routing soft, or --domain 1 (or build with experts_per_token 2)"
        )


class _Objective(nn.Module):
    """Next-token loss of a batch of windows, domains interleaved; the model is no sub-module that could be moved."""

    def __init__(self, model: Any, layers: list[MoELayer], domains: Domains, settings: RouterSettings) -> None:
        super().__init__()
        self.model, self.layers, self.settings = model, layers, settings
        self.ids = torch.cat(list(domains.train.values()))
        labels = [torch.full((len(ids),), i) for i, ids in enumerate(domains.train.values())]
        self.labels = torch.cat(labels)
        self.judged = list(domains.held_out.values())

    def forward(self, indices: Tensor) -> Tensor:
        ids, seen = self.ids[indices], list[Tensor]()
        count = len(self.judged) if self.settings.routing == "soft" else self.layers[0].router.top_k
        with top_k(self.layers, count), watched(self.layers, lambda i, x, logits, chosen: seen.append(logits)):
            logits = self.model(input_ids=ids, use_cache=False).logits
        loss = next_token_loss(logits, ids).mean()
        if self.settings.balance:
            loss = loss + self.settings.balance * sum(balance_loss(s, count) for s in seen) / len(seen)
        if self.settings.domain:
            wanted = self.labels[indices].repeat_interleave(ids.shape[1])
            loss = loss + self.settings.domain * sum(cross_entropy(s.float(), wanted) for s in seen) / len(seen)
        return loss

    @torch.no_grad()
    def held_out(self) -> Measure:
        """Mean held-out loss of the model as it runs (top-k), domains weighing the same."""
        losses = []
        for ids in self.judged:
            parts = [next_token_loss(self.model(input_ids=b, use_cache=False).logits, b) for b in torch.split(ids, 16)]
            losses.append(float(torch.cat([p.reshape(-1) for p in parts]).mean()))
        return Measure(sum(losses) / len(losses), 0.0)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Nats [b, t − 1] of each next token."""
    flat = cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return flat


def balance_loss(logits: Tensor, count: int) -> Tensor:
    """E Σ fₑ Pₑ: the share of choices that fall on expert e times its mean probability; 1 when even."""
    experts = logits.shape[-1]
    probabilities = softmax(logits.float(), dim=-1)
    share = one_hot(probabilities.topk(count, dim=-1).indices, experts).float().sum(1).mean(0) / count
    return experts * (share * probabilities.mean(0)).sum()


def _fingerprint(folder: Path, domains: Domains, settings: RouterSettings) -> str:
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    digest.update((folder / lineage.NAME).read_bytes())
    for ids in domains.train.values():
        digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


def _rewrite(folder: Path, model: Any, layers: list[MoELayer], note: dict[str, Any]) -> None:
    """The folder again, atomically: every tensor byte for byte, the routers from the model."""
    checkpoint = Checkpoint(Source(str(folder), folder))
    gate = family_of(model.config.model_type).gate
    fresh = {f"model.layers.{layer.number}.{gate}": layer.router.weight.detach() for layer in layers}
    specs = list(checkpoint)
    key = hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()
    with CheckpointWriter(folder, specs, key=key) as writer:
        for spec in specs:
            tensor = fresh[spec.name].to(spec.dtype) if spec.name in fresh else checkpoint.read(spec.name)
            writer.write(spec.name, tensor)
        names = [*small_files(folder), "config.json"]
        files = {name: (folder / name).read_bytes() for name in names}
        changed = {name: writer.done[name] for name in fresh}
        text = f"The routers were trained: held-out loss {note['before']:.4f} → {note['after']:.4f} nats a token."
        files[lineage.NAME] = lineage.amend(read_json(folder / lineage.NAME), changed, text, training=note)
        files[card.NAME] = card.build(files[lineage.NAME])
        writer.finish(files)
