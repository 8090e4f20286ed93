"""Will a router pay? Measured before one is trained: experts × domains, oracle, soup, gateless, headroom.

Headroom (gateless − oracle) is all that a router can win: where it is nothing, gateless or the soup is better.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_fusion.mix.calibrate import tokenizer_of
from model_fusion.mix.domains import Domains, Texts, gather, prepare, recipe_of
from model_fusion.mix.load import load_mixed
from model_fusion.mix.routing import MoELayer, family_of, fixed, moe_layers, replaced, souped, watched
from model_fusion.mix.train import next_token_loss

WORTH = 0.05
"""Bits a byte of headroom below which no router pays: lightly tuned experts of one model leave less."""
BLIND = 0.6
"""Routing accuracy below which a better view of the text is worth trying before longer training."""


@dataclass(frozen=True)
class Verdict:
    """Bits per byte on held-out text, domains weighing the same where there is one number.

    matrix[e][d]: everything through expert e, on domain d. oracle: the best expert of each domain. routed: the
    routers as they are. accuracy: per mixed layer, the share of tokens whose first choice is their domain's expert.
    load[e]: share of choices. mismatch: per mixed layer, ‖x_mixed − x_forced‖ / ‖x_forced‖ of the router's input,
    routed against forced through the text's own expert. nats: the same numbers, per token.
    """

    experts: list[str]
    layers: list[int]
    matrix: list[list[float]]
    oracle: float
    soup: float
    gateless: float
    routed: float
    headroom: float
    accuracy: list[float]
    load: list[float]
    mismatch: list[float]
    nats: dict[str, float]
    sentence: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    folder: Path, texts: Texts | Path | None = None, *, window: int = 128, tokens: int | None = None
) -> Verdict:
    """Judge a mixed folder on the held-out part of each domain's text."""
    model = load_mixed(folder)
    domains = prepare(gather(folder, texts), tokenizer_of(folder), window, tokens)
    return judge(model, domains, gate=recipe_of(folder).get("gate"))


def judge(model: Any, domains: Domains, gate: str | None = None) -> Verdict:
    """The verdict on a loaded model; `gate`: how its routers started."""
    run = _Run(model, domains)
    names, count = list(domains.held_out), len(domains.held_out)
    forced = [run.losses(run.forced(e)) for e in range(count)]
    oracle = [min(row[d] for row in forced) for d in range(count)]
    soup, gateless = run.losses(souped(run.layers)), run.losses(replaced(run.layers, fixed([1 / count] * count)))
    watch = _Watch(run.layers, count)
    routed = run.losses(nullcontext(), watch)
    mean = {"oracle": oracle, "soup": soup, "gateless": gateless, "routed": routed}
    bits = {name: run.bits(values) for name, values in mean.items()}
    headroom = bits["gateless"] - bits["oracle"]
    return Verdict(
        experts=names,
        layers=[layer.number for layer in run.layers],
        matrix=[[run.to_bits(value, d) for d, value in enumerate(row)] for row in forced],
        **bits,
        headroom=headroom,
        accuracy=watch.accuracy(),
        load=watch.load(),
        mismatch=run.mismatch(),
        nats={name: sum(values) / count for name, values in mean.items()},
        sentence=sentence(
            headroom, bits, watch.accuracy(), gate != "prefix" and family_of(model.config.model_type).widens
        ),
    )


def sentence(headroom: float, bits: dict[str, float], accuracy: list[float], widens: bool) -> str:
    """The verdict in words; `bits` holds oracle, soup, gateless and routed in bits per byte, `accuracy` each layer's,
    `widens` says whether this mixture could have gate prefix, and has not."""
    won = bits["gateless"] - bits["routed"]
    share = f"; the routers as they are win {won:.3f} of it" if won > 0 else "; the routers as they are win none of it"
    if headroom < WORTH:
        words = {"soup": "the soup", "gateless": "gateless", "routed": "the routers as they are"}
        best = min(words, key=lambda name: bits[name])
        return (
            f"Training the router will not pay, because the best expert of each domain is only {headroom:.3f} bits "
            f"a byte better than running all experts (gateless); use {words[best]} ({bits[best]:.3f})."
        )
    left = bits["routed"] - bits["oracle"]
    if left < WORTH:
        return (
            f"Training the router will not pay, because the routers as they are come within {left:.3f} bits a byte of "
            f"always knowing the domain's own expert; use them ({bits['routed']:.3f})."
        )
    mean = sum(accuracy) / len(accuracy)
    hint = ""
    if mean < BLIND and widens:
        hint = (
            f" They name the text's own expert for {mean:.3f} of the tokens: gate prefix, which reads all the text so "
            "far, may tell more."
        )
    return (
        f"Training the router can pay, because the best expert of each domain is {headroom:.3f} bits a byte better "
        f"than running all experts (gateless){share}.{hint}"
    )


class _Watch:
    """Counts, for each layer, first choices that are the domain's expert, and all choices."""

    def __init__(self, layers: list[MoELayer], experts: int) -> None:
        self.layers, self.domain = layers, 0
        self.right = torch.zeros(len(layers), experts)
        self.tokens = torch.zeros(len(layers), experts)
        self.chosen = torch.zeros(experts)

    def see(self, layer: int, inputs: Tensor, logits: Tensor, indices: Tensor) -> None:
        self.right[layer, self.domain] += (logits.argmax(-1) == self.domain).sum()
        self.tokens[layer, self.domain] += len(logits)
        self.chosen += torch.bincount(indices.reshape(-1), minlength=len(self.chosen))

    def accuracy(self) -> list[float]:
        return [float(x) for x in (self.right / self.tokens.clamp(min=1)).mean(1)]

    def load(self) -> list[float]:
        return [float(x) for x in self.chosen / self.chosen.sum().clamp(min=1)]


class _Run:
    def __init__(self, model: Any, domains: Domains) -> None:
        self.model, self.domains = model, domains
        self.layers = moe_layers(model)
        self.count = len(domains.held_out)

    def forced(self, expert: int) -> AbstractContextManager[None]:
        return replaced(self.layers, fixed([float(expert == e) for e in range(self.count)]))

    def losses(self, routing: AbstractContextManager[Any], watch: _Watch | None = None) -> list[float]:
        """Nats a token on each domain's held-out windows."""
        found = []
        with routing, torch.inference_mode():
            for number, ids in enumerate(self.domains.held_out.values()):
                if watch is not None:
                    watch.domain = number
                with watched(self.layers, watch.see) if watch is not None else nullcontext():
                    parts = [
                        next_token_loss(self.model(input_ids=b, use_cache=False).logits, b) for b in torch.split(ids, 8)
                    ]
                found.append(float(torch.cat(parts).mean()))
        return found

    def to_bits(self, nats: float, domain: int) -> float:
        name = list(self.domains.held_out)[domain]
        ids = self.domains.held_out[name]
        return nats / log(2) * ids[:, 1:].numel() / self.domains.sizes[name]

    def bits(self, nats: list[float]) -> float:
        return sum(self.to_bits(value, d) for d, value in enumerate(nats)) / len(nats)

    def mismatch(self) -> list[float]:
        apart, size = torch.zeros(len(self.layers)), torch.zeros(len(self.layers))
        with torch.inference_mode():
            for number, ids in enumerate(self.domains.held_out.values()):
                with self._inputs(None) as free:
                    self.model(input_ids=ids[:4], use_cache=False)
                with self._inputs(number) as held:
                    self.model(input_ids=ids[:4], use_cache=False)
                for i, (a, b) in enumerate(zip(free, held, strict=True)):
                    apart[i] += float((a - b).norm() / b.norm())
                    size[i] += 1
        return [float(x) for x in apart / size]

    @contextmanager
    def _inputs(self, expert: int | None) -> Iterator[list[Tensor]]:
        """Router inputs of each layer, routed freely or through one expert."""
        seen: list[Tensor] = []
        handles = [
            layer.router.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
            for layer in self.layers
        ]
        try:
            with nullcontext() if expert is None else self.forced(expert):
                yield seen
        finally:
            for handle in handles:
                handle.remove()
