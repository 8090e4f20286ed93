"""UniTE (Yao et al. 2025, arXiv:2410.03777): causal LMs of different vocabularies that write one text.

At each step the members' k likeliest tokens are united by their bytes, each string's probability is averaged over the
members, and the chosen string is appended to every member's ids. A member without that token reads it as the longest
tokens of its own that spell it, and its probability is that of the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.tokenizer.surface import Speller, surfaces

END = b""
"""The string that ends the text: any of a member's end tokens."""


@dataclass
class Member:
    """One model with its tokenizer and what its ids stand for."""

    model: Any
    tokenizer: Any
    weight: float = 1.0
    table: list[bytes | None] = field(init=False)
    speller: Speller = field(init=False)
    ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.table = surfaces(self.tokenizer)
        self.speller = Speller(self.table)
        given = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        self.ends = [] if given is None else [given] if isinstance(given, int) else list(given)

    def prompt(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a plain prompt, or of a conversation through the member's own chat template."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        if self.tokenizer.chat_template is None:
            raise InputError(f"{self.name}: has no chat template; give the prompt as plain text")
        return list(self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))

    @property
    def name(self) -> str:
        return str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)


class _Reader:
    """A member in the middle of a text: its cache, and the probabilities of what comes next."""

    def __init__(self, member: Member, ids: list[int]) -> None:
        self.member, self.cache = member, None
        self.probs = torch.empty(0)
        self.read(ids)

    @torch.no_grad()
    def read(self, ids: list[int]) -> None:
        model = self.member.model
        given = torch.tensor([ids], device=model.device)
        out = model(input_ids=given, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        self.probs = out.logits[0, -1].float().softmax(-1).cpu()

    def likeliest(self, k: int) -> list[bytes]:
        """The strings of the k likeliest tokens; special ones other than the end are left out."""
        found = []
        for number in self.probs.topk(min(k, len(self.probs))).indices.tolist():
            piece = END if number in self.member.ends else self._surface(number)
            if piece is not None:
                found.append(piece)
        return found

    def _surface(self, number: int) -> bytes | None:
        table = self.member.table
        return table[number] or None if number < len(table) else None

    def probability(self, piece: bytes) -> float:
        """That the member goes on with `piece`: its token's, or that of the first token that spells it."""
        if piece == END:
            return float(self.probs[self.member.ends].sum())
        ids = self.member.speller.spell(piece)
        return 0.0 if ids is None else float(self.probs[ids[0]])

    def append(self, piece: bytes) -> None:
        ids = self.member.speller.spell(piece)
        assert ids is not None
        self.read(ids)


class UnionOfModels:
    """Members of any vocabularies; `generate` writes one text with all of them."""

    def __init__(self, members: Sequence[Member], top_k: int = 10) -> None:
        if not members:
            raise InputError("an ensemble needs at least one model")
        if top_k < 1:
            raise InputError(f"top_k must be at least 1, got {top_k}")
        for member in members:
            if not (member.weight > 0 and math.isfinite(member.weight)):
                raise InputError(f"{member.name}: its weight must be above 0, got {member.weight}")
        self.members, self.top_k = list(members), top_k

    def stream(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[bytes]:
        """The strings chosen one after the other, as bytes; `max_new_tokens` counts strings. Greedy at
        temperature 0, else sampled from the united probabilities to the power 1 / temperature."""
        readers = [_Reader(member, member.prompt(prompt)) for member in self.members]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(max_new_tokens):
            pieces, probabilities = self.next(readers)
            if temperature > 0:
                sharpened = probabilities.double().pow(1 / temperature)
                chosen = int(torch.multinomial(sharpened, 1, generator=generator))
            else:
                chosen = int(probabilities.argmax())
            if pieces[chosen] == END:
                return
            yield pieces[chosen]
            for reader in readers:
                reader.append(pieces[chosen])

    def next(self, readers: Sequence[_Reader]) -> tuple[list[bytes], Tensor]:
        """The united strings, and their averaged probabilities float64 [n], summing to one over them."""
        united = dict.fromkeys(piece for reader in readers for piece in reader.likeliest(self.top_k))
        pieces = [p for p in united if all(p == END or r.member.speller.spell(p) is not None for r in readers)]
        if not pieces:
            raise InputError("the models share no way to go on: their vocabularies spell no common string")
        weights = torch.tensor([reader.member.weight for reader in readers], dtype=torch.float64)
        each = torch.tensor([[r.probability(p) for p in pieces] for r in readers], dtype=torch.float64)
        mean = (weights[:, None] * each).sum(0) / weights.sum()
        return pieces, mean / mean.sum()

    def generate(self, prompt: str | Sequence[Mapping[str, str]], **options: Any) -> str:
        """The text that `stream` makes; bytes that are no UTF-8 become replacement characters."""
        return b"".join(self.stream(prompt, **options)).decode("utf-8", errors="replace")
