"""`make demo`: train a CNN on played Blackjack hands, then give its skill to a frozen LLM through three bridges.

The LLM reads a prompt that says nothing of the cards, receives the CNN's output through the bridge, and answers in
words. Beside them stand the two ways that need no training: the CNN's answer pasted as text, and a bias on its words.
Each row is scored exactly: the expected return over all 280 states of greedy, parsed answers.
"""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.table import Table

from model_fusion.evaluate.blackjack import evaluate, optimal_policy, states
from model_fusion.evaluate.tasks.blackjack import blackjack_task, decisions
from model_fusion.fuse.bridges import bridge_config
from model_fusion.fuse.model import FusedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2", help="embedded name, hub id, local folder or GGUF file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bridges", default="tool,logit,gated,prefix,lora")
    arguments = parser.parse_args()
    console = Console()

    start = time.perf_counter()
    task = blackjack_task("grid", seed=arguments.seed)
    console.print(f"CNN trained on 1,000,000 played hands in {time.perf_counter() - start:.1f} s")
    expert = {s: int(name == "hit") for s, name in zip(states(), decisions(task.expert, states()), strict=True)}

    table = Table("", "test agreement", "exact return", "training, s", title="Blackjack, answered in words")
    table.add_row("optimal play", "", f"{evaluate(optimal_policy()).expected_return:.4f}", "")
    table.add_row("the CNN alone", "1.000", f"{evaluate(expert).expected_return:.4f}", "")
    table.add_row("always stick", "", f"{evaluate(dict.fromkeys(states(), 0)).expected_return:.4f}", "")
    asked, unseen = task.questions(), [example.inputs["table"] for example in task.test]
    for bridge in map(bridge_config, arguments.bridges.split(",")):
        fused = FusedModel.build(arguments.base, experts={"table": task.expert}, bridge=bridge, seed=arguments.seed)
        start = time.perf_counter()
        if fused.bridge.trainable:
            fused.fit(task.train, validation=task.validation, seed=arguments.seed)
        seconds = f"{time.perf_counter() - start:.1f}" if fused.bridge.trainable else "none"
        answers = fused.answer([question.prompt for question in asked], [question.inputs for question in asked])
        said = dict(zip(task.all_inputs, answers, strict=True))
        agreement = task.score(unseen, [said[item] for item in unseen])["agreement"]
        gain = task.score(task.all_inputs, answers)["return"]
        table.add_row(bridge.kind, f"{agreement:.3f}", f"{gain:.4f}", seconds)
    console.print(table)
    talk = ["What is the capital of France?", "Should I hit or stick? The table: <|table|>"]
    for prompt, given in zip(talk, ({}, {"table": (16, 10, False)}), strict=True):
        console.print(f"[bold]{prompt}[/bold] {given or ''}\n  {fused.answer([prompt], [given])[0]}")


if __name__ == "__main__":
    main()
