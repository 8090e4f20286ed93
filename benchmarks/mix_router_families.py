"""What limits a router? Families of routers on the models of mix_router.py, trained the same way, side by side.

python benchmarks/mix_router_families.py --json out.json --keep FOLDER [--seeds 0 1 2] [--only NAME …]

FOLDER is one that mix_router.py kept. Per family: the share of the headroom (gateless − forced oracle) recovered on
test files that neither training nor selection saw, with the best three experts weighted (all), two and one; and the
share of tokens for which the gates name the text's own domain. Every family trains 300 steps unless its name says
otherwise; its best validation is kept. Bounds: the best expert of each window, and of each token, the answer known.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import LlamaForCausalLM
from transformers.utils import logging

from measure import machine
from mix_router import NAMES, TESTED, Data, evenly, read_data
from model_fusion.mix.calibrate import tokenizer_of
from model_fusion.mix.gates.prefix import token_table

EACH = 4  # windows a domain in a batch


@dataclass(frozen=True)
class Family:
    """sees: token (the router's input), prefix (also the running mean of the attention's input), window (the mean of
    the WHOLE window, which no generating model has: a bound), counts (also the running mean of log counts), table
    (also the running mean of a trained token table), label (the domain itself: a bound). hidden: 0 is linear.
    loss: lm, label, both, oracle (KL to the model forced through the text's own expert), anneal (temperature 1 → ¼,
    then top-2)."""

    sees: str = "token"
    hidden: int = 0
    loss: str = "lm"
    steps: int = 300
    rate: float = 0.03


FAMILIES = {
    "linear": Family(),
    "linear, 900 steps": Family(steps=900),
    "linear, rate 0.01": Family(rate=0.01),
    "linear, rate 0.1": Family(rate=0.1),
    "linear, labels only": Family(loss="label"),
    "linear, labels beside": Family(loss="both"),
    "linear, KL to the oracle": Family(loss="oracle"),
    "linear, annealed to top-2": Family(loss="anneal"),
    "two-layer": Family(hidden=64),
    "prefix, linear": Family("prefix"),
    "prefix, two-layer": Family("prefix", 64),
    "window mean, linear": Family("window"),
    "counts, untrained": Family("counts", steps=0),
    "counts, linear": Family("counts"),
    "token table, linear": Family("table"),
    "label": Family("label"),
}


def running_mean(x: Tensor) -> Tensor:
    """[b, t, …] → the mean of positions 0 … t."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


class Router(nn.Module):
    """One gate a layer, on what the family sees. `table` [V, E]: log counts."""

    def __init__(self, family: Family, layers: int, width: int, table: Tensor, sharpness: float) -> None:
        super().__init__()
        count, self.family = table.shape[1], family
        extra = {"prefix": width, "counts": count, "table": 16}.get(family.sees, 0)
        size = {"label": count}.get(family.sees, width + extra)
        self.table = nn.Parameter(torch.randn(len(table), 16) * 0.05) if family.sees == "table" else table
        if family.hidden:
            self.gates = nn.ModuleList(
                nn.Sequential(nn.Linear(size, family.hidden), nn.ReLU(), nn.Linear(family.hidden, count))
                for _ in range(layers)
            )
        else:
            self.gates = nn.ModuleList(nn.Linear(size, count, bias=False) for _ in range(layers))
        with torch.no_grad():
            for gate in self.gates:
                last = gate[-1] if isinstance(gate, nn.Sequential) else gate
                for parameter in last.parameters():
                    parameter.zero_()
                if family.sees == "counts":
                    last.weight[:, width:] = sharpness / 16 * torch.eye(count)

    def forward(self, layer: int, x: Tensor, attended: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """x [b, t, H] (router input), attended (attention input) → logits [b, t, E]."""
        sees = self.family.sees
        if sees == "prefix":
            x = torch.cat([x, 4 * running_mean(attended)], -1)
        elif sees == "window":
            x = 4 * x.mean(1, keepdim=True).expand_as(x)
        elif sees == "counts":
            x = torch.cat([x, 16 * running_mean(self.table[ids])], -1)
        elif sees == "table":
            x = torch.cat([x, 4 * running_mean(self.table[ids])], -1)
        elif sees == "label":
            count = self.table.shape[1]
            x = nn.functional.one_hot(labels, count).float()[:, None].expand(-1, x.shape[1], -1)
        logits: Tensor = self.gates[layer](x)
        return logits


class Mixed(nn.Module):
    """The base with every FFN replaced by all experts, weighted by `router` (or by the fixed `weights`)."""

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.base = LlamaForCausalLM.from_pretrained(work / "base").eval().requires_grad_(False)
        experts = [LlamaForCausalLM.from_pretrained(work / name).eval().requires_grad_(False) for name in NAMES]
        self.router: Router | None = None
        self.fixed, self.top_k, self.temperature = torch.ones(len(NAMES)) / len(NAMES), len(NAMES), 1.0
        self.ids, self.labels, self.logits, self.attended = torch.empty(0), torch.empty(0), list[Tensor](), Tensor()
        for number, layer in enumerate(self.base.model.layers):
            layer.mlp = _Experts(self, number, [e.model.layers[number].mlp for e in experts])
            layer.self_attn.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.attended = named["hidden_states"] if "hidden_states" in named else args[0]

    def weights(self, layer: int, x: Tensor) -> Tensor:
        if self.router is None:
            return self.fixed
        logits = self.router(layer, x, self.attended, self.ids, self.labels)
        self.logits.append(logits)
        best, chosen = (logits / self.temperature).topk(self.top_k, -1)
        return torch.zeros_like(logits).scatter(-1, chosen, best.softmax(-1))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        self.ids, self.labels, self.logits = ids, labels, []
        found: Tensor = self.base(input_ids=ids, use_cache=False).logits
        return found

    @torch.no_grad()
    def names_domain(self, sets: list[Tensor]) -> float:
        """Share of tokens, mean over layers and domains, whose highest logit is the domain's."""
        right = []
        for domain, ids in enumerate(sets):
            self(ids[:100], torch.full((len(ids[:100]),), domain))
            right.append(mean([float((z.argmax(-1) == domain).float().mean()) for z in self.logits]))
        return mean(right)

    @torch.no_grad()
    def nats(self, sets: list[Tensor]) -> list[Tensor]:
        """Nats [N, t - 1] of each domain's windows."""
        found = []
        for domain, ids in enumerate(sets):
            parts = []
            for batch in torch.split(ids, 32):
                logits = self(batch, torch.full((len(batch),), domain))
                parts.append(cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none"))
            found.append(torch.cat(parts))
        return found

    def bits(self, sets: list[Tensor]) -> list[float]:
        """Bits a byte of each domain."""
        return [float(one.mean()) / math.log(2) for one in self.nats(sets)]


class _Experts(nn.Module):
    def __init__(self, owner: Mixed, layer: int, experts: list[nn.Module]) -> None:
        super().__init__()
        self.__dict__["owner"], self.layer, self.experts = owner, layer, nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.owner.weights(self.layer, x)
        used = [e for e in range(len(self.experts)) if weights.dim() > 1 or weights[e]]
        return torch.stack([weights[..., e : e + 1] * self.experts[e](x) for e in used]).sum(0)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def forced(model: Mixed, expert: int | None) -> Mixed:
    """All text through one expert; None: all experts with one weight."""
    model.router, count = None, len(NAMES)
    model.fixed = torch.ones(count) / count if expert is None else torch.eye(count)[expert]
    return model


def objective(model: Mixed, router: Router, ids: Tensor, labels: Tensor, done: float) -> Tensor:
    """The family's loss on one batch; `done`: the share of training behind us."""
    family = router.family
    if family.loss == "anneal":
        model.temperature, model.top_k = (1 - 0.75 * min(1.0, done / 0.7)), 2 if done > 0.7 else len(NAMES)
    teacher = None
    if family.loss == "oracle":
        with torch.no_grad():
            teacher = torch.cat([forced(model, d)(ids[labels == d], labels) for d in range(len(NAMES))])
        model.router = router
    logits = model(ids, labels)
    gates = torch.stack([cross_entropy(z.transpose(1, 2), labels[:, None].expand(ids.shape)) for z in model.logits])
    if teacher is not None:
        return kl_div(log_softmax(logits, -1), log_softmax(teacher, -1), log_target=True, reduction="sum") / ids.numel()
    lm = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])
    return {"label": gates.mean(), "both": lm + gates.mean()}.get(family.loss, lm)


def train(model: Mixed, router: Router, data: Data, seed: int) -> None:
    """AdamW with warm-up and cosine; the router of the best validation (soft, or top-2 where annealed) is kept."""
    family, generator = router.family, torch.Generator().manual_seed(seed)
    parameters = list(router.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=family.rate, weight_decay=0.0)
    labels = torch.arange(len(NAMES)).repeat_interleave(EACH)
    best = (math.inf, router.state_dict())
    for step in range(family.steps):
        for group in optimizer.param_groups:
            falling = 0.55 + 0.45 * math.cos(math.pi * step / family.steps)
            group["lr"] = family.rate * min(1.0, (step + 1) / 5) * falling
        ids = torch.cat([d[torch.randint(len(d), (EACH,), generator=generator)] for d in data.train])
        objective(model, router, ids, labels, step / family.steps).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 75 == 0 and (family.loss != "anneal" or step + 1 == family.steps):
            now = mean(model.bits(data.validation))
            if now < best[0]:
                best = (now, {name: value.clone() for name, value in router.state_dict().items()})
    router.load_state_dict(best[1])


def one_seed(seed: int, work: Path, data: Data, only: list[str]) -> dict[str, Any]:
    model = Mixed(work)
    each = [forced(model, expert).nats(data.test) for expert in range(len(NAMES))]
    domains = [torch.stack([each[e][d] for e in range(len(NAMES))]) for d in range(len(NAMES))]  # each [E, N, t - 1]
    oracle = mean([float(found[d].mean()) / math.log(2) for d, found in enumerate(domains)])
    window = mean([float(found.mean(-1).min(0).values.mean()) / math.log(2) for found in domains])
    token = mean([float(found.min(0).values.mean()) / math.log(2) for found in domains])
    gateless = mean(forced(model, None).bits(data.test))
    table = token_table([torch.bincount(d.flatten(), minlength=256) for d in data.train])
    sizes = (model.base.config.num_hidden_layers, model.base.config.hidden_size)
    found: dict[str, Any] = {"seed": seed, "oracle": oracle, "gateless": gateless, "families": {}}
    found["bounds"] = {
        name: (gateless - bits) / (gateless - oracle) for name, bits in {"window": window, "token": token}.items()
    }
    print(f"seed {seed}: oracle {oracle:.3f}, gateless {gateless:.3f}, bounds {found['bounds']}", flush=True)
    sharpness = 0.0
    if any(FAMILIES[name].sees == "counts" for name in only):
        scores = {}
        for factor in (16.0, 32.0, 64.0, 128.0):
            model.router = Router(FAMILIES["counts, untrained"], *sizes, table, factor)
            scores[factor] = mean(model.bits(data.validation))
        sharpness = min(scores, key=lambda factor: scores[factor])
    for name in only:
        began = time.process_time()
        torch.manual_seed(seed)
        router = Router(FAMILIES[name], *sizes, table, sharpness)
        model.router, model.top_k, model.temperature = router, len(NAMES), 1.0
        train(model, router, data, seed)
        row = {}
        model.temperature = 0.25 if FAMILIES[name].loss == "anneal" else 1.0
        for top in (3, 2, 1):
            model.router, model.top_k = router, top
            if top == len(NAMES):
                row["names_domain"] = model.names_domain(data.test)
            row[f"top_{top}"] = (gateless - mean(model.bits(data.test))) / (gateless - oracle)
        found["families"][name] = row | {"cpu": time.process_time() - began}
        print(f"  {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--keep", type=Path, required=True, help="a folder that mix_router.py --keep wrote")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=0, help="train all so long, whatever the family says")
    parser.add_argument("--windows", type=int, default=TESTED, help="test windows a domain; half as many select")
    args = parser.parse_args()
    logging.disable_progress_bar()
    data = read_data(args.keep, tokenizer_of(args.keep / f"seed{args.seeds[0]}" / "base"))
    validation, test = ([evenly(rows, n) for rows in part] for part, n in
                        ((data.validation, args.windows // 2), (data.test, args.windows)))  # fmt: skip
    data = Data(data.train, validation, test)
    if args.steps:
        FAMILIES.update({name: replace(f, steps=min(f.steps, 1) * args.steps) for name, f in FAMILIES.items()})
    runs = []
    for seed in args.seeds:
        runs.append(one_seed(seed, args.keep / f"seed{seed}", data, args.only))
        args.json.write_text(
            json.dumps({"machine": machine(), "steps": args.steps, "windows": args.windows, "runs": runs}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
