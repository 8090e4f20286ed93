"""Blackjack as a fusion task: experts that learned from played hands, prompts that say nothing of the state."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from model_fusion.errors import InputError
from model_fusion.evaluate.blackjack import State, evaluate, optimal_policy, states
from model_fusion.evaluate.tasks.base import Metric, Task
from model_fusion.evaluate.tasks.blackjack_experts import CLASSES, EXPERTS, untrained_expert
from model_fusion.evaluate.tasks.exchanged import permuted, rule
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


def draw(figure: Any, items: Sequence[State], texts: Sequence[str]) -> None:
    """The 280-state policy of the answers above the optimal one: hard and soft sums against the dealer's card."""
    optimum = optimal_policy()
    said: dict[State, str | None] = {state: parse(text) for state, text in zip(items, texts, strict=True)}
    best: dict[State, str | None] = {state: CLASSES[optimum[state]] for state in items}
    axes = figure.subplots(2, 2)
    shades = {"stick": 0.0, "hit": 1.0, None: 0.5}
    for line, (title, policy) in enumerate((("fused model", said), ("optimal play", best))):
        for column, usable in enumerate((False, True)):
            ax, low = axes[line][column], 12 if usable else 4
            cells = [[shades[policy.get((t, d, usable))] for d in range(1, 11)] for t in range(low, 22)]
            where = (0.5, 10.5, low - 0.5, 21.5)
            ax.imshow(cells, cmap="coolwarm", vmin=0, vmax=1, origin="lower", aspect="auto", extent=where)
            for total, dealer, soft in items:
                if soft == usable and policy[total, dealer, soft] != best[total, dealer, soft]:
                    ax.plot(dealer, total, "k.", markersize=4)
            ax.set(title=f"{title}, {'soft' if usable else 'hard'} sums", xlabel="dealer's card", ylabel="sum")
    figure.supxlabel("red: hit, blue: stick, grey: unreadable; a dot: not the optimal choice", fontsize=8)


def blackjack_task(expert: str | Expert = "grid", *, seed: int = 0, labels: int = 200) -> Task:
    """`labels` labelled states (a fifth of them for validation), 80 test states, all 280 for the return."""
    if isinstance(expert, str) and expert not in EXPERTS:
        raise InputError(f"unknown Blackjack expert {expert!r}: one of {', '.join(EXPERTS)}")
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
        metric=Metric("return", "exact expected return", digits=4),
        retold=lambda other: blackjack_task(other, seed=seed, labels=labels),
        untrained=untrained_expert,
        exchanged={
            "its outputs exchanged": lambda: permuted(chosen, (1, 0)),
            "hits below 16": lambda: rule(chosen, lambda item: "hit" if item[0] < 16 else "stick"),
            "hits below 19 on soft sums only": lambda: rule(
                chosen, lambda item: "hit" if item[2] and item[0] < 19 else "stick"
            ),
            "hits when the dealer shows 7 or more": lambda: rule(
                chosen, lambda item: "hit" if item[1] >= 7 else "stick"
            ),
        },
        draw=draw,
        landmarks={
            "optimal play": evaluate(optimal_policy()).expected_return,
            "always stick": evaluate(dict.fromkeys(everything, 0)).expected_return,
        },
        options={"expert": expert, "seed": seed, "labels": labels} if isinstance(expert, str) else {},
    )
