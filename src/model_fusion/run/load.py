"""What is asked on the command line: a saved fusion, or an ordinary checkpoint (a merged or mixed one, say).

What can be checked without the LLM is checked first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model_fusion.checkpoint.llm import load_llm, resolve_llm
from model_fusion.dynamic import MODEL_TYPE
from model_fusion.fuse import saving
from model_fusion.fuse.ask import ask, generation, questions
from model_fusion.fuse.chat import ChatSession
from model_fusion.fuse.model import FusedModel
from model_fusion.run.experts import saved_schemas, task_parts


def open_fusion(folder: Path, config: Mapping[str, Any], *, allow_pickle: bool = False) -> FusedModel:
    """The fused model in `folder`. A built-in task's expert needs no `given`; other code does (InputError)."""
    return FusedModel.from_pretrained(folder, given=task_parts(config.get("task")), allow_pickle=allow_pickle)


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds an ordinary checkpoint and no fusion."""
    return (folder / "config.json").is_file() and not (folder / saving.CONFIG).is_file()


def open_checkpoint(folder: Path) -> FusedModel:
    """The causal LM in `folder` as a fused model without experts: asked in the same way. Raises InputError."""
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind == "query_mixture":
        import model_fusion.mix.query  # (registers a class that is ours)
    elif kind == MODEL_TYPE:
        import model_fusion.dynamic.causal_lm  # noqa: F401  (registers a class that is ours)
    source = resolve_llm(folder)
    fused = FusedModel(*load_llm(source), {}, source)
    fused.add_bridge("default", "tool")
    fused.eval()
    return fused


def generate(
    folder: str | Path,
    *,
    prompt: str | None = None,
    inputs: Sequence[str] = (),
    file: Path | None = None,
    allow_pickle: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    **options: Any,
) -> list[tuple[str, str]]:
    """(prompt, answer) for each question to the fusion saved in `folder`; `options` as in `ask`."""
    folder = Path(folder)
    generation(max_new_tokens, temperature)
    if is_checkpoint(folder):
        asked = questions({}, prompt=prompt, inputs=inputs, file=file)
        fused = open_checkpoint(folder)
    else:
        config = saving.read_config(folder)
        saving.check_files(folder, config)
        asked = questions(saved_schemas(config), prompt=prompt, inputs=inputs, file=file)
        fused = open_fusion(folder, config, allow_pickle=allow_pickle)
    answers = ask(fused, asked, max_new_tokens=max_new_tokens, temperature=temperature, **options)
    return [(question.prompt, answer) for question, answer in zip(asked, answers, strict=True)]


def open_chat(
    folder: str | Path,
    *,
    allow_pickle: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> ChatSession:
    """A chat with the fusion or checkpoint in `folder`; the other arguments as in `ChatSession`."""
    generation(max_new_tokens, temperature)
    folder = Path(folder)
    if is_checkpoint(folder):
        fused = open_checkpoint(folder)
    else:
        config = saving.read_config(folder)
        saving.check_files(folder, config)
        fused = open_fusion(folder, config, allow_pickle=allow_pickle)
    return ChatSession(fused, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
