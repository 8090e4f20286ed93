"""Twin-Merging around any torch module: θ(x) = θ* + Σ_t w_t(x) v_t, each row of a batch with its own weights.

The shared module stays what it is; hooks act only while `weighted` holds the weights of one forward pass. Linear layers
(and transformers' Conv1D) and embeddings are never merged: h = W* x + Σ_t w_t(x) U_t (V_t x). Every other module that
an expert changed (norms, convolutions) runs with its parameters merged for each row, by `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from model_fusion.dynamic.parts import Part, Parts
from model_fusion.errors import InputError

Features = Callable[..., Tensor]
"""From the shared module's own arguments to what the router sees, float [B, d]."""


class TwinModel(nn.Module):
    """`model(*inputs)` as the shared module, merged anew for each row of the batch.

    **Arguments**
    shared: the merged module θ*; it is put in eval mode. parts: see `parts.exclusive`; names as in its `state_dict`.
    router: [B, d] features to [B, T] logits; None where the caller always gives `expert_weights`. features: what the
    router sees; without it, the shared module's own output [B, d] (or its mean over all but first and last dimension).

    **Raises** InputError where a part belongs to no tensor of the module, or a changed layer is not batch-first.
    """

    def __init__(
        self, shared: nn.Module, parts: Parts, router: nn.Module | None = None, features: Features | None = None
    ) -> None:
        super().__init__()
        self.shared = shared.eval()
        self.router = router
        self.features = features
        counts = {part.experts for part in parts.values()}
        if len(counts) > 1:
            raise InputError(f"the parts are of {sorted(counts)} experts: all need the same number")
        self.experts = counts.pop() if counts else 0
        self._weights: Tensor | None = None
        self._stored = self._names(parts)
        parts = {name: parts[name] for name in dict.fromkeys(self._stored.values())}
        self._shapes = {name: part.shape for name, part in parts.items()}
        self._factors = nn.ParameterDict()
        for name, part in parts.items():
            self._factors[f"{_key(name)}:down"] = nn.Parameter(part.down, requires_grad=False)
            if part.up is not None:
                self._factors[f"{_key(name)}:up"] = nn.Parameter(part.up, requires_grad=False)
        self._attach()

    def part(self, name: str) -> Part:
        """The part of one tensor."""
        key = _key(name)
        return Part(self._shapes[name], self.experts, self._factors[f"{key}:down"], self._factors.get(f"{key}:up"))

    @property
    def parts(self) -> Parts:
        return {name: self.part(name) for name in self._shapes}

    def bytes(self) -> dict[str, int]:
        """Bytes of the shared model's tensors (tied ones once), of the exclusive parts, and of the router."""
        router = 0 if self.router is None else _nbytes(self.router)
        return {
            "shared": _nbytes(self.shared),
            "exclusive": sum(p.nbytes for p in self.parts.values()),
            "router": router,
        }

    # ---- the forward pass ----------------------------------------------------------------------------------

    @torch.no_grad()
    def route(self, *inputs: Any, **options: Any) -> Tensor:
        """softmax(router(features)), float32 [B, T], of the plain shared model on these inputs."""
        if self.router is None:
            raise InputError("this twin has no router: give expert_weights [B, T], or a router")
        with self.weighted(None):
            seen = (self.features or self.shared)(*inputs, **options)
        if self.features is None and seen.dim() > 2:
            seen = seen.flatten(1, -2).mean(1)
        like = next(self.router.parameters(), seen)
        weights: Tensor = self.router(seen.to(like)).float().softmax(-1)
        return weights

    def forward(self, *inputs: Any, expert_weights: Tensor | None = None, **options: Any) -> Any:
        """The shared module's output with each row's own weights; expert_weights [B, T] replace the router's."""
        weights = self.route(*inputs, **options) if expert_weights is None else expert_weights
        with self.weighted(weights):
            return self.shared(*inputs, **options)

    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        """The whole state dict of θ* + Σ_t w_t v_t for one row of weights [T]: an ordinary model of that row."""
        state = dict(self.shared.state_dict())
        for name, stored in self._stored.items():
            state[name] = state[name] + self.part(stored).mixed(weights[None])[0].to(state[name])
        return state

    @contextmanager
    def weighted(self, weights: Tensor | None) -> Iterator[None]:
        """While inside, the shared module runs with these weights [B, T]; None: as it is."""
        if weights is not None and (weights.dim() != 2 or weights.shape[1] != self.experts):
            raise InputError(f"expert_weights {list(weights.shape)}: expected [batch, {self.experts}]")
        before, self._weights = self._weights, weights
        try:
            yield
        finally:
            self._weights = before

    # ---- hooks ---------------------------------------------------------------------------------------------

    def _names(self, parts: Mapping[str, Part]) -> dict[str, str]:
        """The name of every tensor that a part changes → that part's name. Tied tensors need one part only."""
        state = self.shared.state_dict(keep_vars=True)
        if unknown := sorted(set(parts) - set(state)):
            raise InputError(f"the shared module has no tensor {unknown[0]!r}, of which a part was given")
        stored: dict[int, str] = {}
        for name in parts:
            stored.setdefault(id(state[name]), name)
        return {name: stored[id(tensor)] for name, tensor in state.items() if id(tensor) in stored}

    def _attach(self) -> None:
        state = self.shared.state_dict(keep_vars=True)
        parts = {id(state[name]): stored for name, stored in self._stored.items()}
        for path, module in self.shared.named_modules():
            own = {key: parts[id(t)] for key, t in _tensors(module).items() if id(t) in parts}
            if own:
                module.register_forward_hook(_Hook(self, path, own), with_kwargs=True)


class _Hook:
    """After one changed module: its output with each row's parameters. `own`: parameter's name → the part's."""

    def __init__(self, twin: TwinModel, path: str, own: dict[str, str]) -> None:
        self._twin, self.path, self.own = [twin], path, own

    def __call__(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        twin = self._twin[0]
        if twin._weights is None:
            return output
        weights = twin._weights.to(output.device)
        x = args[0] if args else next(iter(options.values()))
        if x.shape[0] not in (1, len(weights)):  # one row for all: position ids
            raise InputError(
                f"{self.path}: sees {x.shape[0]} rows, expert_weights have {len(weights)}: "
                "Twin needs layers that keep the batch first"
            )
        parts = {key: twin.part(name) for key, name in self.own.items()}
        kind = type(module).__name__
        if isinstance(module, nn.Linear) or kind == "Conv1D":
            return _linear(output, x, weights, parts, transposed=kind == "Conv1D")
        if isinstance(module, nn.Embedding):
            return _embedding(output, x, weights, parts["weight"])
        return _each_row(twin, module, weights, parts, args, options)


def _linear(output: Tensor, x: Tensor, weights: Tensor, parts: Mapping[str, Part], transposed: bool) -> Tensor:
    """output + Σ_t w_t (U_t V_t x + d_t): [B, …, m]. Conv1D keeps its weight as [n, m]."""
    if "weight" in parts:
        one = parts["weight"]
        assert one.up is not None
        first, second = (one.up.T, one.down.T) if transposed else (one.down, one.up)
        inner = nn.functional.linear(x, first)
        spread = weights.repeat_interleave(len(one.down) // one.experts, dim=1).to(inner)
        output = output + nn.functional.linear(inner * _beside(spread, inner), second)
    if "bias" in parts:
        output = output + _beside(parts["bias"].mixed(weights), output).to(output.dtype)
    return output


def _embedding(output: Tensor, ids: Tensor, weights: Tensor, part: Part) -> Tensor:
    """output + Σ_t w_t U_t[ids] V_t: [B, …, n]."""
    assert part.up is not None
    inner = nn.functional.embedding(ids, part.up)
    spread = weights.repeat_interleave(len(part.down) // part.experts, dim=1).to(inner)
    return output + (inner * _beside(spread, inner)) @ part.down


def _beside(rows: Tensor, like: Tensor) -> Tensor:
    """[B, k] as [B, 1, …, 1, k], with as many dimensions as `like`."""
    return rows.view(len(rows), *(1,) * (like.dim() - 2), rows.shape[-1])


def _each_row(
    twin: TwinModel,
    module: nn.Module,
    weights: Tensor,
    parts: Mapping[str, Part],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """The module run with the parameters of each row. Only tensors whose first dimension is the batch are split."""
    own = _tensors(module)
    changed = {key: own[key] + part.mixed(weights).to(own[key]) for key, part in parts.items()}

    def split(value: Any) -> int | None:
        return 0 if isinstance(value, Tensor) and value.dim() and len(value) == len(weights) else None

    def run(state: dict[str, Tensor], given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        given = tuple(v[None] if split(w) == 0 else v for v, w in zip(given, args, strict=True))
        named = {k: v[None] if split(options[k]) == 0 else v for k, v in named.items()}
        return functional_call(module, state, given, named)[0]

    axes = (0, tuple(split(v) for v in args), {k: split(v) for k, v in options.items()})
    with twin.weighted(None):  # the call below must not meet this hook again
        return vmap(run, in_dims=axes)(changed, args, options)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a module owns itself."""
    own = [*module.named_parameters(recurse=False, remove_duplicate=False), *module.named_buffers(recurse=False)]
    return dict(own)


def _key(name: str) -> str:
    """A tensor's name as a key of a ParameterDict, which takes no dots."""
    return name.replace(".", "/")


def _nbytes(module: nn.Module) -> int:
    unique = {id(t): t.nbytes for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(unique.values())
