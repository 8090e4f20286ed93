"""Statistics of one model on its own data: Gram matrices for RegMean, a diagonal Fisher for Fisher merging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from model_fusion.checkpoint.statistics import KINDS, Kind, Statistics
from model_fusion.errors import InputError
from model_fusion.merge.calibration.batches import (
    Forward,
    call,
    check_finite,
    evaluating,
    logits_of,
    mask_of,
    samples,
)
from model_fusion.merge.calibration.layers import Grams, check_layers, linear_layers

Labels = Literal["own", "given", "next"]


def collect_statistics(
    module: nn.Module,
    batches: Iterable[Any],
    kind: Kind = "gram",
    *,
    forward: Forward | None = None,
    labels: Labels = "own",
    seed: int = 0,
    only: Sequence[str] = (),
    step: Callable[[], object] = lambda: None,
) -> Statistics:
    """What `merge` with `regmean` (kind gram) or `fisher` needs of a model beside its weights.

    **Arguments**
    batches: what the module takes: a tensor, a tuple (by position), a mapping (by name; positions where its
        `attention_mask` is 0 are left out). forward: how it is called, `(module, batch) → logits`.
    labels: whose log-likelihood the Fisher differentiates. `own`: labels drawn from the model's own probabilities,
        the paper's Fisher. `given`: batches are pairs (inputs, labels), or mappings with `labels`; labels below 0 do
        not count. `next`: the next token of a mapping's `input_ids`.
    only: parts of names; other weights are left out (in several passes, large models need less memory).
    step: called after each batch.

    The module is left as it was. Memory: one matrix [in, in] a layer, or one tensor a weight.

    **Raises** InputError where a kind or label is unknown, nothing was given, or values are NaN or Inf.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of statistics {kind!r}; known: {', '.join(KINDS)}")
    if labels not in get_args(Labels):
        raise InputError(f"unknown labels {labels!r}; known: {', '.join(get_args(Labels))}")

    def wanted(name: str) -> bool:
        return not only or any(part in name for part in only)

    with evaluating(module):
        if kind == "gram":
            found = _grams(module, batches, forward or call, wanted, step)
        else:
            found = _fisher(module, batches, forward or call, labels, seed, wanted, step)
    if found.count == 0:
        raise InputError(f"no {kind} statistics: no batch was given, or only= names no weight that saw any")
    return found


def _grams(
    module: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    wanted: Callable[[str], bool],
    step: Callable[[], object],
) -> Statistics:
    layers = linear_layers(module)
    check_layers(layers, module)
    with Grams(layer for layer in layers if wanted(layer.name)) as grams, torch.no_grad():
        for batch in batches:
            grams.mask = mask_of(batch)
            forward(module, batch)
            step()
    return grams.statistics()


def _fisher(
    module: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    labels: Labels,
    seed: int,
    wanted: Callable[[str], bool],
    step: Callable[[], object],
) -> Statistics:
    """Mean over samples of (∇ log p(y|x))², one backward pass a sample (Matena & Raffel 2022, equation 3)."""
    weights = {n: p for n, p in module.named_parameters() if p.is_floating_point() and wanted(n)}
    sums = {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in weights.items()}
    count = 0
    with _differentiable(weights), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for batch in batches:
            for sample in samples(batch):
                inputs, targets = _labelled(sample, labels)
                logits = logits_of(forward(module, inputs))
                check_finite(logits, "the module's answer")
                value = _log_likelihood(logits, targets, labels, mask_of(sample))
                grads = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                for name, grad in zip(weights, grads, strict=True):
                    if grad is not None:
                        sums[name].add_(grad.to(sums[name].dtype).square_())
                count += 1
            step()
    means = {}
    for name, total in sums.items():
        means[name] = total.div_(max(count, 1)).cpu()
        check_finite(means[name], f"the gradient of {name!r}")
    return Statistics("fisher", means, count, about={"labels": labels})


@contextmanager
def _differentiable(weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    before = {name: weight.requires_grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name])


def _labelled(sample: Any, labels: Labels) -> tuple[Any, Tensor | None]:
    """What the module is given, and the labels."""
    if labels == "own":
        return sample, None
    if labels == "next":
        if not (isinstance(sample, Mapping) and isinstance(sample.get("input_ids"), Tensor)):
            raise InputError("labels 'next' needs batches that are mappings with `input_ids`")
        return sample, sample["input_ids"][:, 1:]
    if isinstance(sample, Mapping) and isinstance(sample.get("labels"), Tensor):
        return {name: value for name, value in sample.items() if name != "labels"}, sample["labels"]
    if isinstance(sample, tuple) and len(sample) == 2:
        return sample
    raise InputError("labels 'given' needs batches that are pairs (inputs, labels) or mappings with `labels`")


def _log_likelihood(logits: Tensor, targets: Tensor | None, labels: Labels, mask: Tensor | None) -> Tensor:
    """Σ log p of the labels of one sample; logits [1, ..., C]."""
    if labels == "next":
        logits, mask = logits[:, :-1], None if mask is None else mask[:, 1:]
    if targets is None:
        drawn = torch.multinomial(logits.detach().float().softmax(-1).flatten(0, -2), 1)
        targets = drawn.view(logits.shape[:-1])
    if targets.shape != logits.shape[:-1]:
        raise InputError(f"labels {list(targets.shape)} do not fit logits {list(logits.shape)}")
    counted = targets >= 0
    if mask is not None and mask.shape == counted.shape:
        counted = counted & mask.to(counted.device)
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return chosen.masked_fill(~counted, 0.0).sum()
