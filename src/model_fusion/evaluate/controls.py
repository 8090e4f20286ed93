"""The twelve controls of an audit, and the fusion itself. Each is one function: trials, seed, labels -> outcomes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from model_fusion.errors import InputError
from model_fusion.evaluate.linear_head import linear_head
from model_fusion.evaluate.trials import Trials, answers
from model_fusion.fuse.bridges import BridgeConfig, Logit, Tool
from model_fusion.fuse.experts.base import Expert
from model_fusion.fuse.experts.reading import stack
from model_fusion.fuse.fit import Example
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.placeholders import placeholder

TOLD = {
    "in a sentence after the question": "{prompt}\nSomeone who knows the answer says: {words}. Give this answer.",
    "to be repeated": "The right answer is: {words}\nRepeat the right answer in one word.",
    "as a hint": "{prompt} (Hint: the answer is {words}.)",
}
"""Ways to tell the answer. An LLM may follow one and not another: the best of them is the ceiling."""


@dataclass(frozen=True)
class Outcome:
    """Scores of one set of answers. `variant` where a control has several; `texts` are the answers."""

    scores: dict[str, float]
    texts: Sequence[str] = field(default_factory=list)
    variant: str = ""


class NotApplicable(Exception):
    """This control makes no sense for this fusion or task; the message says why."""


Run = Callable[[Trials, int, int | None], list[Outcome]]


@dataclass(frozen=True)
class Control:
    """`key` orders and names it (the number of the evidence list where it has one); `seeded` ones are run once a
    seed; those that ask about `few` labels also with 32, those with a `curve` with each count of the few-label curve;
    `rules_out` is the explanation that it would expose."""

    key: str
    name: str
    rules_out: str
    run: Run
    seeded: bool
    few: bool
    curve: bool


CONTROLS: dict[str, Control] = {}
FUSED = "fused"
"""Key of the row that every control is compared with."""


def control(
    key: str, name: str, rules_out: str, *, seeded: bool = False, few: bool = False, curve: bool = False
) -> Callable[[Run], Run]:
    """Register a control."""

    def register(run: Run) -> Run:
        CONTROLS[key] = Control(key, name, rules_out, run, seeded, few or curve, curve)
        return run

    return register


@control(FUSED, "the fusion", "", seeded=True, curve=True)
def fused(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    model = trials.main(seed, labels)
    texts = trials.ask(model)
    return [Outcome(trials.scores(texts) | ({} if labels else trials.paraphrases(model)), texts)]


@control("saved", "this saved fusion", "")
def saved(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    texts = trials.ask(trials.fused)
    return [Outcome(trials.scores(texts) | trials.paraphrases(trials.fused), texts)]


@control("1", "the expert alone", "the ceiling")
def expert_alone(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    texts = trials.expert.describe(trials.items())
    return [Outcome(trials.scores(texts), texts)]


@control("2", "the LLM alone, told the input in words", "the floor: what text can do")
def in_words(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    asked = zip(trials.questions, trials.items(), strict=True)
    texts = _tell(trials, [_filled(trials, question, trials.task.in_words(item)) for question, item in asked])
    return [Outcome(trials.scores(texts), texts)]


@control("3", "text oracle: the LLM told the expert's answer", "the ceiling of what this LLM can do with it")
def text_oracle(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    words, found = trials.expert.describe(trials.items()), []
    for variant, form in TOLD.items():
        asked = zip(trials.questions, words, strict=True)
        texts = _tell(trials, [form.format(prompt=_filled(trials, q, said), words=said) for q, said in asked])
        found.append(Outcome(trials.scores(texts), texts, variant))
    return found


@control("4a", "the expert's signal zeroed", "the answer ignores the expert", seeded=True, few=True)
def zeroed(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    model = trials.main(seed, labels)
    # The normaliser's mean: what it sends on is exactly 0.
    mean = model.normalisers[trials.name].get_buffer("mean").cpu()
    texts = trials.ask(model.with_experts({trials.name: constant(trials.expert, mean)}))
    return [Outcome(trials.scores(texts), texts)]


@control("4b", "the expert's signal shuffled between rows", "the answer ignores the expert", seeded=True, few=True)
def shuffled(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    return [_rearranged(trials, seed, labels, shuffle(len(trials.questions), seed))]


@control("4c", "each row given the signal of a row decided otherwise", "the answer ignores the expert",
         seeded=True, few=True)  # fmt: skip
def swapped(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    return [_rearranged(trials, seed, labels, swap(trials.expert.describe(trials.items()), seed))]


@control("5", "an untrained expert, same labels and budget", "the bridge learns the task from leaked input",
         seeded=True, curve=True)  # fmt: skip
def untrained(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    if trials.task.untrained is None:
        raise NotApplicable("the task has no untrained expert of the same kind")
    return [_trained_with(trials, seed, trials.task.untrained(seed), labels)]


@control("6", "the raw input through the bridge, no expert", "the bridge learns the task from the input", seeded=True)
def raw_input(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    schema = trials.expert.inputs
    try:
        raw = Expert.from_callable(
            lambda items: stack(items, schema).reshape(len(items), -1), schema, output="features"
        )
    except InputError as error:
        raise NotApplicable(f"the input has no numbers ({error})") from None
    return [_trained_with(trials, seed, raw, labels)]


@control("7", "the expert and a linear head, no LLM", "the LLM does nothing")
def no_llm(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    task = trials.task
    rows = [*task.train, *task.validation]
    features = trials.expert.encode([row.inputs[trials.name] for row in rows])
    answers = [row.answer for row in rows]
    read = [task.parse(answer) for answer in answers]
    values = [value for value in read if isinstance(value, float)]
    say = linear_head(features, values if len(values) == len(rows) else answers)
    texts = say(trials.expert.encode(trials.items()))
    return [Outcome(trials.scores(texts), texts)]


@control("8", "a randomly initialised LLM of the same shape", "any network would do", seeded=True)
def random_llm(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    from transformers import AutoModelForCausalLM

    real = trials.fused.base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(copy.deepcopy(real.config), dtype=real.dtype).to(real.device)
    base.generation_config = copy.deepcopy(real.generation_config)
    model = FusedModel.build(
        base, tokenizer=trials.fused.tokenizer, experts=trials.fused.experts, bridge=trials.config, seed=seed
    )
    trials.fit(model, seed)
    texts = trials.ask(model)
    return [Outcome(trials.scores(texts), texts)]


@control("9", "the same bridge fed a constant (a soft prompt of equal size)", "the trainable budget does it",
         seeded=True)  # fmt: skip
def soft_prompt(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    blank = constant(trials.expert, torch.zeros(trials.expert.feature_shape[1]))
    return [_trained_with(trials, seed, blank, labels)]


@control("10", "tool call: the expert's answer pasted as text", "fusion is not needed")
def tool(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    return [_untrained_bridge(trials, Tool())]


@control("11", "logit bias from the expert's probabilities", "fusion is not needed")
def logit(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    try:
        return [_untrained_bridge(trials, Logit())]
    except InputError as error:
        raise NotApplicable(str(error)) from None


@control("12", "another expert put in, nothing retrained; scored by agreement with it",
         "the LLM memorised a policy", seeded=True)  # fmt: skip
def exchanged(trials: Trials, seed: int, labels: int | None) -> list[Outcome]:
    if not trials.task.exchanged:
        raise NotApplicable("the task has no other expert to put in")
    model, found = trials.main(seed), []
    for variant, make in trials.task.exchanged.items():
        other = make()
        try:
            reading = model.with_experts({trials.name: other})
        except InputError as error:
            raise NotApplicable(f"the other experts do not fit what this bridge reads ({error})") from None
        texts = trials.ask(reading)
        found.append(Outcome(trials.scores(texts, trials.task.retold(other)), texts, variant))
    return found


# ---- what the controls share ---------------------------------------------------------------------------------


def constant(expert: Expert, value: torch.Tensor) -> Expert:
    """An expert of the same feature shape [T, D] whose features are `value` [D] whatever the input."""
    steps, size = expert.feature_shape
    return Expert.from_callable(
        lambda items: value.expand(len(items), steps, size),
        expert.inputs,
        output="features",
        feature_shape=expert.feature_shape,
    )


def shuffle(count: int, seed: int) -> list[int]:
    """For each row, the row whose signal it gets: a permutation by the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def swap(decided: Sequence[str], seed: int) -> list[int]:
    """For each row, one drawn evenly by the seed from all rows decided otherwise. Raises NotApplicable without any."""
    others = {d: [i for i, other in enumerate(decided) if other != d] for d in set(decided)}
    if not all(others.values()):
        raise NotApplicable("the expert decides the same on every input")
    rng = np.random.default_rng(seed)
    return [int(rng.choice(others[decision])) for decision in decided]


def _rearranged(trials: Trials, seed: int, labels: int | None, source: Sequence[int]) -> Outcome:
    """Row i answered with the signal of row source[i], scored as row i; `follows`: scored as row source[i]."""
    model, items = trials.main(seed, labels), trials.items()
    asked = [
        Example(q.prompt, {**q.inputs, trials.name: items[i]}, "")
        for q, i in zip(trials.questions, source, strict=True)
    ]
    texts = trials.ask(model, asked)
    follows = trials.task.score_examples([trials.questions[i] for i in source], texts)["agreement"]
    return Outcome(trials.scores(texts) | {"follows": follows}, texts)


def _trained_with(trials: Trials, seed: int, expert: Expert, labels: int | None) -> Outcome:
    # The labels, and what the objective `align` tells its oracle, are the audited expert's.
    expert = copy.copy(expert)
    expert.describe = trials.expert.describe  # type: ignore[method-assign]
    with trials.trained(seed, experts={trials.name: expert}, labels=labels) as model:
        texts = trials.ask(model)
    return Outcome(trials.scores(texts), texts)


def _untrained_bridge(trials: Trials, bridge: BridgeConfig) -> Outcome:
    with trials.beside(bridge) as model:
        texts = trials.ask(model)
        return Outcome(trials.scores(texts) | trials.paraphrases(model), texts)


def _filled(trials: Trials, question: Example, words: str) -> str:
    return question.prompt.replace(placeholder(trials.name), words)


def _tell(trials: Trials, told: Sequence[str]) -> list[str]:
    """The plain LLM's answers to one prompt a question, in which the audited expert's placeholder is words."""
    rest = [{k: v for k, v in q.inputs.items() if k != trials.name} for q in trials.questions]
    with trials.top.bridge_off():
        return answers(trials.top, told, rest)
