"""Train a bridge with TRL's SFTTrainer instead of `fit`: the fused model is an ordinary transformers model.

    pip install trl datasets
    python examples/train_with_trl.py

The expert is a function of one number. The model's own collator turns rows (prompt, inputs, answer) into ids, features
and labels, so TRL is told to leave the dataset as it is.
"""

from __future__ import annotations

import argparse
import math
import tempfile

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import model_fusion as mf
from model_fusion.fuse.bridges import Gated
from model_fusion.fuse.experts import Field, InputSchema

QUESTION = "Should I hit or stick? The table: <|table|>"


def chances(items: list[float]) -> list[list[float]]:
    """Probabilities of "stick" and "hit"."""
    return [[1 / (1 + math.exp(8 * x)), 1 / (1 + math.exp(-8 * x))] for x in items]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    steps: int = parser.parse_args().steps
    expert = mf.Expert.from_callable(chances, InputSchema((Field("x", "float"),)), classes=("stick", "hit"))
    fused = mf.FusedModel.build("smollm2", experts={"table": expert}, bridge=Gated(), dtype=torch.bfloat16)
    xs = [(2 * i + 1) / 64 - 1 for i in range(64)]
    rows = [{"prompt": QUESTION, "inputs": {"table": x}, "answer": "hit" if x > 0 else "stick"} for x in xs]

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_steps=4,
            report_to=[],
        )
        SFTTrainer(
            fused,
            settings,
            train_dataset=Dataset.from_list(rows),
            data_collator=fused.collator(rows),
            processing_class=fused.tokenizer,
        ).train()
    fused.eval()
    held = [i / 10 + 0.05 for i in range(-10, 10)]
    answers = fused.answer([QUESTION] * len(held), [{"table": x} for x in held])
    right = sum(a == ("hit" if x > 0 else "stick") for a, x in zip(answers, held, strict=True))
    print(f"{right} of {len(held)} new inputs answered as the expert decides")


if __name__ == "__main__":
    main()
