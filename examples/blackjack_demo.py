"""`make demo`: train a CNN on played Blackjack hands, then give its skill to a frozen LLM through three bridges.

The LLM reads a prompt that says nothing of the cards, receives the CNN's output through the bridge, and answers in
words. Each row is scored exactly: the expected return over all 280 states of greedy, parsed answers.
"""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.table import Table

from model_fusion.evaluate.blackjack import evaluate, optimal_policy, states
from model_fusion.evaluate.tasks.blackjack import blackjack_task, decisions
from model_fusion.fuse.bridges import Gated, Lora, Prefix
from model_fusion.fuse.model import FusedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2", help="embedded name, hub id, local folder or GGUF file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = Console()

    start = time.perf_counter()
    task = blackjack_task("grid", seed=arguments.seed)
    console.print(f"CNN trained on 1,000,000 played hands in {time.perf_counter() - start:.1f} s")
    expert = {s: int(name == "hit") for s, name in zip(states(), decisions(task.expert, states()), strict=True)}

    table = Table("", "test agreement", "exact return", "fusion, s", title="Blackjack, answered in words")
    table.add_row("optimal play", "", f"{evaluate(optimal_policy()).expected_return:.4f}", "")
    table.add_row("the CNN alone", "1.000", f"{evaluate(expert).expected_return:.4f}", "")
    table.add_row("always stick", "", f"{evaluate(dict.fromkeys(states(), 0)).expected_return:.4f}", "")
    for bridge in (Gated(), Prefix(), Lora()):
        fused = FusedModel.build(arguments.base, experts={"table": task.expert}, bridge=bridge, seed=arguments.seed)
        start = time.perf_counter()
        fused.fit(task.train, validation=task.validation, seed=arguments.seed)
        seconds = time.perf_counter() - start
        everything = fused.answer([task.prompt] * 280, [{"table": item} for item in task.all_inputs])
        unseen = [example.inputs["table"] for example in task.test]
        answers = fused.answer([task.prompt] * len(unseen), [{"table": item} for item in unseen])
        result = {**task.score(task.all_inputs, everything), **{"agreement": task.score(unseen, answers)["agreement"]}}
        table.add_row(bridge.kind, f"{result['agreement']:.3f}", f"{result['return']:.4f}", f"{seconds:.1f}")
    console.print(table)
    talk = ["What is the capital of France?", "Should I hit or stick? The table: <|table|>"]
    for prompt, given in zip(talk, ({}, {"table": (16, 10, False)}), strict=True):
        console.print(f"[bold]{prompt}[/bold] {given or ''}\n  {fused.answer([prompt], [given])[0]}")


if __name__ == "__main__":
    main()
