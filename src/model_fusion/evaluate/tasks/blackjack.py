"""Blackjack as a fusion task: experts that learned from played hands, prompts that say nothing of the state."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from model_fusion.evaluate.blackjack import State, evaluate, states
from model_fusion.evaluate.tasks.base import Task
from model_fusion.evaluate.tasks.blackjack_experts import EXPERTS
from model_fusion.fuse.experts import ClassDecision, Expert
from model_fusion.fuse.fit import Example

PROMPT = "Should I hit or stick? The table: <|table|>"
PARAPHRASES = (
    "<|table|> What should I do, hit or stick?",
    "I am playing blackjack. This is my table: <|table|> Hit or stick?",
    "Look at the table: <|table|> Do I take another card (hit) or not (stick)?",
    "The table is <|table|>. Hit or stick?",
    "Blackjack table: <|table|>\nYour advice, hit or stick?",
    "Given this table, <|table|>, is it better to hit or to stick?",
    "Tell me whether to hit or stick here: <|table|>",
    "My hand and the dealer's card: <|table|> Stick or hit?",
    "Please advise me. Table: <|table|>. Should the player hit or stick?",
    "Hit or stick? <|table|>",
)
SPLIT_SEED = 20261121
TEST_STATES = 80


def decisions(expert: Expert, items: Sequence[State]) -> list[str]:
    """The expert's class name for each state."""
    decision = expert.decide(items)
    assert isinstance(decision, ClassDecision)
    return [decision.classes[i] for i in decision.log_probs.argmax(dim=1).tolist()]


def parse(text: str) -> str | None:
    """ "hit" or "stick" if exactly one of them is in the answer as a word, else None."""
    found = set(re.findall(r"\b(hit|stick)\b", text.lower()))
    return found.pop() if len(found) == 1 else None


def score(expert: Expert, items: Sequence[State], texts: Sequence[str]) -> dict[str, float]:
    """Agreement with the expert, share of parsed answers and, over all 280 states, the exact expected return
    (an answer that cannot be read counts as sticking)."""
    read = [parse(text) for text in texts]
    wanted = decisions(expert, items)
    out = {
        "agreement": sum(a == b for a, b in zip(read, wanted, strict=True)) / len(items),
        "parsed": sum(a is not None for a in read) / len(items),
    }
    if set(items) == set(states()):
        out["return"] = evaluate({s: int(a == "hit") for s, a in zip(items, read, strict=True)}).expected_return
    return out


def in_words(item: State) -> str:
    """The state told in words (control 2)."""
    total, dealer, usable = item
    return f"my sum is {total}, the dealer shows {dealer}, usable ace: {'yes' if usable else 'no'}"


def blackjack_task(expert: str | Expert = "grid", *, seed: int = 0, labels: int = 200) -> Task:
    """`labels` labelled states (a fifth of them for validation), 80 test states, all 280 for the return."""
    chosen = EXPERTS[expert](seed) if isinstance(expert, str) else expert
    everything = states()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(everything))
    names = decisions(chosen, everything)

    def examples(rows: Any) -> tuple[Example, ...]:
        return tuple(Example(PROMPT, {"table": everything[i]}, names[i]) for i in rows)

    labelled = order[TEST_STATES : TEST_STATES + labels]
    held = max(1, labels // 5)
    return Task(
        name="blackjack",
        expert_name="table",
        expert=chosen,
        prompt=PROMPT,
        paraphrases=PARAPHRASES,
        train=examples(labelled[held:]),
        validation=examples(labelled[:held]),
        test=examples(order[:TEST_STATES]),
        all_inputs=tuple(everything),
        parse=parse,
        score=lambda items, texts: score(chosen, items, texts),
        in_words=in_words,
    )
