"""The two untrained baselines, to be preferred where they win: `logit` and `tool`.

`logit` adds the expert's log-probabilities at the tokens of its class names while the answer is generated;
`tool` pastes the expert's words into the prompt, as the result of a tool call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.fuse.bridges.base import Bridge, BridgeConfig, LLMShape


@dataclass(frozen=True)
class Tool(BridgeConfig):
    """The expert's `describe()` replaces the placeholder."""

    kind: ClassVar[str] = "tool"

    def build(self, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> ToolBridge:
        return ToolBridge(base, experts)


class ToolBridge(Bridge):
    kind = "tool"
    trainable = False
    uses_text = True


@dataclass(frozen=True)
class Logit(BridgeConfig):
    """`boost` lifts all class names alike over other words, so that the answer is one of them; `strength`
    multiplies the expert's log-probabilities."""

    kind: ClassVar[str] = "logit"
    boost: float = 40.0
    strength: float = 10.0

    def build(self, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> LogitBridge:
        if self.boost < 0 or self.strength <= 0:
            raise InputError("logit: boost must be at least 0 and strength above 0")
        return LogitBridge(self, base, experts)


class LogitBridge(Bridge):
    kind = "logit"
    trainable = False

    def __init__(self, config: Logit, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(base, experts)
        self.config = config


class AnswerBias:
    """A logits processor: at each step, tokens that continue a class's answer get boost + strength * log p.

    answers: for each class the token ids of its answer, end of turn included. log_probs float32 [B, C]; rows
    of NaN have no expert and stay untouched. The log-probability of a token is the log-sum-exp over the
    classes it continues, so shared first tokens do not count twice.
    """

    def __init__(self, answers: list[list[int]], log_probs: Tensor, prompt_length: int, config: Logit) -> None:
        self.answers, self.log_probs, self.start, self.config = answers, log_probs, prompt_length, config

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = self.log_probs.repeat_interleave(len(input_ids) // len(self.log_probs), dim=0)
        scores = scores.clone()
        for row, written in enumerate(input_ids[:, self.start :].tolist()):
            if rows[row].isnan().any():
                continue
            step = len(written)
            following: dict[int, list[int]] = {}
            for number, answer in enumerate(self.answers):
                if len(answer) > step and answer[:step] == written:
                    following.setdefault(answer[step], []).append(number)
            for token, classes in following.items():
                log_p = torch.logsumexp(rows[row, classes], dim=0).clamp(min=-30.0)
                scores[row, token] += self.config.boost + self.config.strength * log_p
        return scores
