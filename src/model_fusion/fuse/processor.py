"""From prompts and expert inputs to the tensors that the fused model reads, and the collator for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.fuse.bridges.base import Bridge
from model_fusion.fuse.experts.base import Expert, Features
from model_fusion.fuse.placeholders import check_placeholders, placeholder, split

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Occurrence:
    """One placeholder of a prompt: which expert, and its features [T, D] with mask [T]."""

    expert: int
    values: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Encoded:
    """One row: token ids, how many of them are the prompt, and its placeholders in order."""

    ids: list[int]
    prompt_length: int
    occurrences: list[Occurrence]


class FusedProcessor:
    """Turns prompts with `<|expert|>` placeholders and expert inputs into model inputs.

    A prompt is a string (one user message, put through the chat template where the tokenizer has one) or a list
    of {"role", "content"} messages. `inputs` maps an expert's name to its item, or to a list of items where its
    placeholder occurs several times.
    """

    def __init__(self, tokenizer: Any, experts: Mapping[str, Expert], bridge: Bridge, ids: Mapping[str, int]) -> None:
        self.tokenizer, self.experts, self.bridge, self.ids = tokenizer, experts, bridge, dict(ids)
        self.names = tuple(experts)

    def __call__(
        self, prompts: Sequence[str | Messages], inputs: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor]:
        """Left-padded model inputs for generation. Raises InputError for what does not fit."""
        return self.collate(self.encode(prompts, inputs), left=True)

    def encode(
        self,
        prompts: Sequence[str | Messages],
        inputs: Sequence[Mapping[str, Any]] | None = None,
        answers: Sequence[str] | None = None,
    ) -> list[Encoded]:
        """One `Encoded` a prompt; with `answers`, the answer and the end of turn follow the prompt's ids."""
        given: list[Mapping[str, Any]] = list(inputs) if inputs is not None else [{}] * len(prompts)
        if len(given) != len(prompts):
            raise InputError(f"{len(prompts)} prompts but inputs for {len(given)}: give one mapping a prompt")
        texts = [self.render(prompt) for prompt in prompts]
        pieces = [split(text, self.names) for text in texts]
        items = self._items(pieces, given)
        words = self._words(items) if self.bridge.uses_text else {}
        features = {} if self.bridge.uses_text else self._features(items)
        rows: list[Encoded] = []
        for row, parts in enumerate(pieces):
            seen = dict.fromkeys(self.names, 0)
            ids: list[int] = []
            occurrences: list[Occurrence] = []
            plain = ""
            for kind, content in parts:
                if kind == "text":
                    plain += content
                    continue
                key = (content, row, seen[content])
                seen[content] += 1
                if self.bridge.uses_text:
                    plain += words[key]
                    continue
                ids += self._tokens(plain.removesuffix(" ") if self.bridge.takes_space else plain)
                plain = ""
                ids += [self.ids[content]] * self.bridge.slots(content)
                values, mask = features[key]
                occurrences.append(Occurrence(self.names.index(content), values, mask))
            ids += self._tokens(plain)
            length = len(ids)
            if answers is not None:
                ids = [*ids, *self.answer_ids(answers[row])]
            rows.append(Encoded(ids, length, occurrences))
        return rows

    def render(self, prompt: str | Messages) -> str:
        """The prompt as text up to where the assistant's answer begins."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        for message in messages:
            if not isinstance(message, Mapping) or not all(
                isinstance(message.get(k), str) for k in ("role", "content")
            ):
                raise InputError(
                    f"a prompt is a text, or a list of messages with role and content; {message!r} is no such message"
                )
            check_placeholders(message["content"], self.names, self.tokenizer.all_special_tokens)
        if self.tokenizer.chat_template:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return text
        return "\n".join(message["content"] for message in messages) + "\n"

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of a whole answer and the end of turn."""
        return [*self._tokens(answer), self.tokenizer.eos_token_id]

    def collate(self, rows: Sequence[Encoded], *, left: bool = False, labels: bool = False) -> dict[str, Tensor]:
        """Pad rows into `input_ids`, `attention_mask` int64 [B, L], `expert_features` float32 [B, O, T, D],
        `expert_mask` bool [B, O, T], `expert_index` int64 [B, O] and, if asked, `labels` (-100 on prompt and pads)."""
        length = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id, dtype=torch.long)
        attention = torch.zeros_like(ids)
        targets = torch.full_like(ids, -100)
        for number, row in enumerate(rows):
            start = length - len(row.ids) if left else 0
            ids[number, start : start + len(row.ids)] = torch.tensor(row.ids)
            attention[number, start : start + len(row.ids)] = 1
            answer = torch.tensor(row.ids[row.prompt_length :], dtype=torch.long)
            targets[number, start + row.prompt_length : start + len(row.ids)] = answer
        batch = {"input_ids": ids, "attention_mask": attention, **self._pack(rows)}
        return {**batch, "labels": targets} if labels else batch

    def _pack(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        count = max(len(row.occurrences) for row in rows)
        if not count:
            return {}
        shapes = [expert.feature_shape for expert in self.experts.values()]
        t, d = max(s[0] for s in shapes), max(s[1] for s in shapes)
        values = torch.zeros(len(rows), count, t, d)
        mask = torch.zeros(len(rows), count, t, dtype=torch.bool)
        index = torch.full((len(rows), count), -1, dtype=torch.long)
        for number, row in enumerate(rows):
            for o, occurrence in enumerate(row.occurrences):
                rows_t, rows_d = occurrence.values.shape
                values[number, o, :rows_t, :rows_d] = occurrence.values
                mask[number, o, :rows_t] = occurrence.mask
                index[number, o] = occurrence.expert
        return {"expert_features": values, "expert_mask": mask, "expert_index": index}

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        clash = set(ids) & set(self.ids.values()) if not self.bridge.uses_text else set()
        if clash:
            token = self.tokenizer.convert_ids_to_tokens(min(clash))
            raise InputError(f"the text contains {token!r}, which is reserved for an expert's placeholder: rephrase it")
        return ids

    def _items(
        self, pieces: Sequence[list[tuple[str, str]]], inputs: Sequence[Mapping[str, Any]]
    ) -> dict[str, list[tuple[tuple[str, int, int], Any]]]:
        """For each expert, ((name, row, occurrence), item) in order; every mismatch is an InputError."""
        items: dict[str, list[tuple[tuple[str, int, int], Any]]] = {name: [] for name in self.names}
        for row, (parts, given) in enumerate(zip(pieces, inputs, strict=True)):
            for name in given:
                if name not in self.experts:
                    raise InputError(f"unknown expert {name!r} in the inputs; the experts are {', '.join(self.names)}")
            for name in self.names:
                count = sum(part == ("expert", name) for part in parts)
                if count and name not in given:
                    raise InputError(f"the prompt has {placeholder(name)} but no input for {name!r} was given")
                if name in given and not count:
                    raise InputError(f"an input for {name!r} was given but the prompt has no {placeholder(name)}")
                values = given[name] if count > 1 else [given[name]] if count else []
                if count and len(values) != count:
                    raise InputError(f"{placeholder(name)} occurs {count} times but {len(values)} inputs were given")
                items[name] += [((name, row, number), value) for number, value in enumerate(values)]
        return items

    def _features(
        self, items: Mapping[str, list[tuple[tuple[str, int, int], Any]]]
    ) -> dict[tuple[str, int, int], tuple[Tensor, Tensor]]:
        found: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}
        for name, rows in items.items():
            if not rows:
                continue
            features = check_features(name, self.experts[name], self.experts[name].encode([item for _, item in rows]))
            found |= {key: (features.values[i], features.mask[i]) for i, (key, _) in enumerate(rows)}
        return found

    def _words(self, items: Mapping[str, list[tuple[tuple[str, int, int], Any]]]) -> dict[tuple[str, int, int], str]:
        found: dict[tuple[str, int, int], str] = {}
        for name, rows in items.items():
            if rows:
                words = self.experts[name].describe([item for _, item in rows])
                found |= {key: word for (key, _), word in zip(rows, words, strict=True)}
        return found


def check_features(name: str, expert: Expert, features: Features) -> Features:
    """Features as promised: [B, T, D] of the expert's shape, finite where present. Raises InputError."""
    if tuple(features.values.shape[1:]) != tuple(expert.feature_shape):
        raise InputError(
            f"expert {name!r} gave features of shape {list(features.values.shape[1:])}, "
            f"expected {list(expert.feature_shape)}"
        )
    if not torch.isfinite(features.values[features.mask]).all():
        raise InputError(f"expert {name!r} gave NaN or infinite features: check its inputs")
    return features
