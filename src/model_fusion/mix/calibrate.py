"""Starts the gates of a plan: runs the dense trunk on the experts' texts or prompts where a gate needs that."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_fusion.checkpoint.llm import hash_files, weight_files
from model_fusion.errors import InputError, MissingDependencyError
from model_fusion.mix.combine import combine
from model_fusion.mix.gates import GATES, GateInputs
from model_fusion.mix.gates.prefix import token_table
from model_fusion.mix.plan import MixPlan
from model_fusion.mix.room import Evidence, Room, widen
from model_fusion.mix.statistics import Statistics, StatisticsFolder, accuracy, collect, probing, router_inputs
from model_fusion.recipe.mix import ExpertEntry
from model_fusion.training.texts import documents, split, windows

WINDOW = 256


@dataclass
class Calibrated:
    """gates: float32 [L, E, H] over the mixed layers. accuracy: per layer, on router inputs that were kept out of
    the sums; empty for gates without statistics. evidence: gate prefix's, what goes into the plan's room."""

    gates: Tensor
    accuracy: list[float] = field(default_factory=list)
    evidence: Evidence | None = None


def calibrate(plan: MixPlan, relative_to: Path | None) -> Calibrated:
    """The gates of a plan. Raises `InputError` for texts that cannot be read or are too short."""
    return _Calibration(plan, relative_to).run()


def trunk_model(plan: MixPlan) -> Any:
    """The dense trunk, float32, eval: the base with the plan's averaged (or adapted) tensors in it."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(f"gates from text need {error.name}: pip install 'model-fusion[fuse]'") from None
    logging.disable_progress_bar()
    base = plan.checkpoints[plan.recipe.base_model]
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, trust_remote_code=False)
    changed = list(plan.averaged)
    if base.source.adapter is not None:
        changed = [o for o in plan.outputs if o.how in ("copy", "mean")]
    with torch.no_grad():
        for output in changed:
            model.get_parameter(output.spec.name).copy_(combine(output, plan.checkpoints, plan.recipe.seed))
    return model.eval()


def tokenizer_of(folder: Path) -> Any:
    """The folder's tokenizer."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(f"reading text needs {error.name}: pip install 'model-fusion[fuse]'") from None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no tokenizer that can be loaded; text gates need one") from error


class _Calibration:
    def __init__(self, plan: MixPlan, relative_to: Path | None) -> None:
        self.plan, self.relative_to = plan, relative_to
        self.experts = plan.recipe.experts
        self._domains: list[Statistics] | None = None
        self._evidence: Evidence | None = None
        self._model: Any = None

    def run(self) -> Calibrated:
        recipe, room = self.plan.recipe, self.plan.room
        gate = GATES[recipe.chosen_gate()]
        gates = gate.make(
            GateInputs(
                layers=len(self.plan.mixed),
                experts=len(self.experts),
                hidden_size=int(self.plan.dense["hidden_size"]) if room is None else room.width,
                seed=recipe.seed,
                ridge=recipe.ridge,
                embeddings=self._embeddings,
                hidden=self._hidden,
                statistics=self._statistics if room is None else partial(self._prefixes, room),
                means=slice(0) if room is None else room.means,
            )
        )
        if not bool(torch.isfinite(gates).all()):
            raise InputError(f"gate {gate.name} gave NaN or Inf: check the base model's weights and the texts")
        read = gates if room is None else gates[..., room.means]
        return Calibrated(gates, accuracy(read, self._domains) if self._domains else [], self._evidence)

    def _trunk(self) -> Any:
        if self._model is None:
            self._model = trunk_model(self.plan)
        return self._model

    def _tokenizer(self) -> Any:
        return tokenizer_of(self.plan.checkpoints[self.plan.recipe.base_model].folder)

    def _prompts(self, entry: ExpertEntry, negative: bool) -> list[Tensor]:
        """Ids [1, t] of each prompt, a begin token in front as in mergekit."""
        tokenizer = self._tokenizer()
        begin = tokenizer.bos_token or ""
        texts = entry.negative_prompts if negative else entry.prompts
        return [tokenizer(begin + text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]

    def _embeddings(self, negative: bool) -> list[Tensor | None]:
        base = self.plan.checkpoints[self.plan.recipe.base_model]
        table = base.read("model.embed_tokens.weight")
        found: list[Tensor | None] = []
        for entry in self.experts:
            sums = [table[ids[0]].float().sum(0) for ids in self._prompts(entry, negative)]
            found.append(torch.stack(sums).mean(0) if sums else None)
        return found

    def _hidden(self, average: bool, negative: bool) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for entry in self.experts:
            each = []
            for ids in self._prompts(entry, negative):
                with torch.inference_mode():
                    out = self._trunk().model(input_ids=ids, output_hidden_states=True, use_cache=False)
                states = torch.cat([out.hidden_states[n] for n in self.plan.mixed])  # entering each mixed layer
                each.append(states.mean(1) if average else states[:, -1])
            found.append(torch.stack(each).mean(0) if each else None)
        return found

    def _statistics(self) -> list[Statistics]:
        recipe = self.plan.recipe
        store = None
        if recipe.statistics is not None:
            path = Path(recipe.statistics).expanduser()
            rooted = path if self.relative_to is None or path.is_absolute() else self.relative_to / path
            store = StatisticsFolder(rooted)
        tokenizer, trunk = self._tokenizer(), self._identity()
        self._domains = []
        for name, entry in zip(recipe.names(), self.experts, strict=True):
            ids = self._ids(name, entry, tokenizer)
            file = store.file(name, trunk + self.plan.family.router_input, ids, self.plan.mixed) if store else None
            found = store.load(file) if store and file else None
            if found is None:
                found = collect(self._trunk(), ids, self.plan.mixed, self.plan.family.router_input)
                if store and file:
                    store.save(file, found)
            self._domains.append(found)
        return self._domains

    def _ids(self, name: str, entry: ExpertEntry, tokenizer: Any) -> Tensor:
        """Calibration windows [N, T] of one domain."""
        texts = split(documents(entry.texts, self.relative_to))[0] if entry.texts else list(entry.prompts)
        length = WINDOW if entry.texts else min(WINDOW, sum(len(t) for t in texts))
        found = _windows(texts, tokenizer, length, self.plan.recipe.calibration_tokens, name)
        base = self.plan.checkpoints[self.plan.recipe.base_model]
        rows = base.spec("model.embed_tokens.weight").shape[0]
        if int(found.max()) >= rows:
            raise InputError(
                f"{base.source.spec}: its tokenizer gives token {int(found.max())}, its embedding has {rows} rows: "
                "give the tokenizer that belongs to the model"
            )
        return found

    def _prefixes(self, room: Room) -> list[Statistics]:
        """Gate prefix: counts of the windows that are no probes; on the probes, the running means [L, N, E] that the
        widened trunk's routers see, brought to size one. Only these channels are kept: a probe is the only statistic.
        """
        plan, tokenizer = self.plan, self._tokenizer()
        ids = [self._ids(n, e, tokenizer) for n, e in zip(plan.recipe.names(), self.experts, strict=True)]
        probes, counted = zip(*(probing(i) for i in ids), strict=True)
        dense = self._trunk()
        embedding = dense.get_input_embeddings().weight.detach()
        counts = [torch.bincount(i[c].flatten(), minlength=len(embedding)) for i, c in zip(ids, counted, strict=True)]
        layers = int(plan.dense["num_hidden_layers"])
        evidence = Evidence.of(token_table(counts), embedding, layers)
        model = widened(dense, room, evidence)
        found = []
        for own, chosen in zip(ids, probes, strict=True):
            parts = [router_inputs(model, own[n : n + 1], plan.mixed, plan.family.router_input) for n in chosen]
            means = torch.cat([part[:, :, room.means] for part in parts], dim=1)
            found.append(Statistics(0, torch.empty(0), torch.empty(0), means))
        size = torch.cat([f.probe for f in found], dim=1).square().mean((1, 2)).sqrt()
        evidence.gains[plan.mixed] = torch.where(size > 1e-6, 1 / size, 1.0)  # equal texts say nothing
        for each in found:
            each.probe *= evidence.gains[plan.mixed][:, None, None]
        self._domains, self._evidence = found, evidence
        return found

    def _identity(self) -> str:
        """The trunk's identity: its files, and whether other models are averaged into it."""
        recipe = self.plan.recipe
        base = self.plan.checkpoints[recipe.base_model]
        sources = [base, *(self.plan.checkpoints[p.model] for o in self.plan.averaged[:1] for p in o.parts)]
        folders = [f for c in sources for f in (c.folder, c.source.adapter) if f is not None]
        if recipe.statistics is None:
            return ""
        return " ".join(hash_files([p for p in weight_files(f) if p.is_file()]) for f in folders)


def widened(dense: Any, room: Room, evidence: Evidence) -> Any:
    """The dense model with room for the evidence: another of its class, float32, eval."""
    config = type(dense.config).from_dict({**dense.config.to_dict(), **room.config()})
    made = type(dense)(config).eval()
    tied = "lm_head.weight" if config.tie_word_embeddings else ""
    state = {name: widen(name, tensor, room, evidence) for name, tensor in dense.state_dict().items() if name != tied}
    made.load_state_dict(state, strict=not tied)
    return made


def _windows(texts: list[str], tokenizer: Any, length: int, limit: int, name: str) -> Tensor:
    """Windows of at most `length` tokens; short texts (prompts) get shorter windows."""
    try:
        return windows(texts, tokenizer, length, limit)
    except InputError:
        for shorter in (64, 16, 4):
            if shorter < length:
                try:
                    return windows(texts, tokenizer, shorter, limit)
                except InputError:
                    continue
        raise InputError(f"expert {name!r}: its texts or prompts hold fewer than four tokens") from None
