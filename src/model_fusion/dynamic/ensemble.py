"""`model_fusion.ensemble([...])`: opens causal LMs and lets them speak as one, as their vocabularies allow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from model_fusion.checkpoint.llm import LLMSource, load_llm, resolve_llm
from model_fusion.checkpoint.lora import adapt
from model_fusion.checkpoint.reader import open_checkpoint
from model_fusion.checkpoint.sources import Source, resolve
from model_fusion.dynamic.averaged import AveragedModels
from model_fusion.dynamic.union import Member, UnionOfModels
from model_fusion.errors import InputError
from model_fusion.tokenizer.compare import Relation, compare


class Ensemble:
    """Opened models. `members`; `union`, which writes with all of them; `averaged`, the one causal LM they are where
    all have one vocabulary, else None."""

    def __init__(self, members: Sequence[Member], *, top_k: int = 10) -> None:
        self.members = list(members)
        self.union = UnionOfModels(self.members, top_k)
        first = members[0].tokenizer.get_vocab()
        one = all(compare(first, m.tokenizer.get_vocab()) is Relation.EQUAL for m in members)
        self.averaged = AveragedModels([m.model for m in members], [m.weight for m in members]) if one else None

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """The continuation of a plain prompt, or the answer to a conversation (each model's own chat template).

        One vocabulary: the whole distributions are averaged, through transformers' `generate`. Several: UniTE."""
        if self.averaged is None:
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            return self.union.generate(prompt, **options)
        import torch

        torch.manual_seed(seed)
        first = self.members[0]
        ids = torch.tensor([first.prompt(prompt)], device=self.averaged.device)
        chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            chosen = {"do_sample": True, "temperature": temperature, "top_k": 0}
        out = self.averaged.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=first.tokenizer.pad_token_id,
            **chosen,
        )
        return str(first.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def stream(self, prompt: str | Sequence[Mapping[str, str]], **options: Any) -> Iterator[bytes]:
        """As `UnionOfModels.stream`."""
        return self.union.stream(prompt, **options)


def ensemble(
    models: Sequence[str | Path], *, weights: Sequence[float] | None = None, top_k: int = 10, dtype: Any = "auto"
) -> Ensemble:
    """Open `models`: embedded names, hub ids, folders (a twin's too), GGUF files, base+adapter. `weights`: above 0, one
    a model; equal where not given. `top_k`: how many tokens of each are united where vocabularies differ.

    Raises InputError."""
    import model_fusion.dynamic.causal_lm  # noqa: F401  (a member may be a twin: this registers its class)

    if not models:
        raise InputError("an ensemble needs at least one model")
    shares = [1.0] * len(models) if weights is None else list(weights)
    if len(shares) != len(models):
        raise InputError(f"{len(models)} models but {len(shares)} weights: give one a model")
    if not all(0 < share < float("inf") for share in shares):
        raise InputError(f"weights must be above 0, got {', '.join(f'{share:g}' for share in shares)}")
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}")
    # everything is found before anything is loaded
    sources = [resolve(str(model)) if _adapted(model) else resolve_llm(model) for model in models]
    return Ensemble(
        [Member(*_load(source, dtype), share) for source, share in zip(sources, shares, strict=True)], top_k=top_k
    )


def _adapted(model: str | Path) -> bool:
    """Whether the text means base+adapter."""
    return "+" in str(model) and not Path(model).expanduser().exists()


def _load(source: LLMSource | Source, dtype: Any) -> tuple[Any, Any]:
    """(model, tokenizer); an adapter is added to its base's weights."""
    if isinstance(source, LLMSource):
        return load_llm(source, dtype=dtype)
    checkpoint = open_checkpoint(source)
    model, tokenizer = load_llm(LLMSource(source.spec, str(source.folder), ""), dtype=dtype)
    adapt(dict(model.named_parameters(remove_duplicate=False)), checkpoint)
    return model, tokenizer
