"""What happens to the inputs before they are planned: one vocabulary, one chat template, the output's small files.

Reads headers, configs and tokenizer files. Problems are collected for `plan`, not raised one by one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from model_fusion.architecture.align import aligned, multimodal
from model_fusion.architecture.roles import has_row_a_token, heads, input_embedding, ties
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.checkpoint.views import Remade, Renamed
from model_fusion.errors import InputError
from model_fusion.recipe.merge import MergeRecipe
from model_fusion.recipe.tokenizer import TokenizerSpec
from model_fusion.tokenizer.chat_templates import choose, template_of, with_template
from model_fusion.tokenizer.compare import first_difference
from model_fusion.tokenizer.embeddings import RowMap, build
from model_fusion.tokenizer.table import VOCABULARY_FILES, TokenTable, read_object, read_table
from model_fusion.tokenizer.unite import output_files, unite

REPORT = "tokenizer_report.json"
_TABLE_FILES = (*VOCABULARY_FILES, "tokenizer_config.json")
_TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass
class Prepared:
    """`checkpoints` agree in names and rows; `files` are the output's small files, `config` its config so far."""

    checkpoints: dict[str, Checkpoint]
    template: str
    files: dict[str, bytes]
    config: dict[str, Any]
    problems: list[str] = field(default_factory=list)


def prepare(
    recipe: MergeRecipe,
    checkpoints: dict[str, Checkpoint],
    other_tokenizer: Mapping[str, bytes] | None = None,
    trust_remote_code: bool = False,
) -> Prepared:
    """The inputs as the planner wants them. `other_tokenizer`: files of a tokenizer source that is not merged.
    `trust_remote_code`: the output takes its template's Python files along; nothing here runs them."""
    template = recipe.base_model or recipe.model_names()[0]
    if not multimodal(checkpoints[template].config):  # a text model has no place for a tower
        template = next((name for name, c in checkpoints.items() if multimodal(c.config)), template)
    own = checkpoints[template]
    views = {name: aligned_with(checkpoint, own) for name, checkpoint in checkpoints.items()}
    wanted = heads(own.names) or _untied_heads(views, own)
    views = {name: _with_heads(view, wanted) for name, view in views.items()}
    ready = Prepared(views, template, own.files(), json.loads(json.dumps(own.config)))
    if wanted and not heads(own.names):
        _untie(ready.config)
    try:
        _Tokens(recipe, ready, other_tokenizer).run()
    except InputError as error:
        ready.problems.append(str(error))
    _remote_code(ready, own, trust_remote_code)
    return ready


def _remote_code(ready: Prepared, own: Checkpoint, trusted: bool) -> None:
    """A config that names Python files makes whoever loads it run them: only knowingly."""
    tokenizer = read_object(ready.files, "tokenizer_config.json", ready.template)
    if not (ready.config.get("auto_map") or tokenizer.get("auto_map")):
        return
    if trusted:
        ready.files |= {file.name: file.read_bytes() for file in sorted(own.folder.glob("*.py"))}
    else:
        ready.problems.append(
            f"{ready.template}: it runs code of its own (auto_map), which the output would too; read that code, then "
            "pass --trust-remote-code"
        )


def aligned_with(checkpoint: Checkpoint, template: Checkpoint) -> Checkpoint:
    """The checkpoint under the template's names, where one of the two has a tower."""
    if checkpoint is template or not (multimodal(checkpoint.config) or multimodal(template.config)):
        return checkpoint
    names = aligned(checkpoint.names, template.names)
    return checkpoint if all(new == old for new, old in names.items()) else Renamed(checkpoint, names)


def _untied_heads(views: Mapping[str, Checkpoint], own: Checkpoint) -> list[str]:
    """Heads that are not their model's embedding, though the template `own` ties the two: the output cannot."""
    if not ties(own.config) or input_embedding(own.names) is None:
        return []
    for view in views.values():
        embedding = input_embedding(view.names)
        found = [head for head in heads(view.names) if embedding is None or not view.same(head, embedding)]
        if found and not ties(view.config):
            return found
    return []


def _untie(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False
    for inner in [value for value in config.values() if isinstance(value, dict) and "tie_word_embeddings" in value]:
        inner["tie_word_embeddings"] = False


def _with_heads(checkpoint: Checkpoint, wanted: list[str]) -> Checkpoint:
    """A tied checkpoint, which stores no head, beside one that does: its head is its embedding."""
    embedding = input_embedding(checkpoint.names)
    absent = [name for name in wanted if name not in checkpoint]
    if not absent or embedding is None or not ties(checkpoint.config):
        return checkpoint
    return Renamed(checkpoint, {name: name for name in checkpoint.names} | dict.fromkeys(absent, embedding))


class _Tokens:
    """The tokenizer's part of `prepare`."""

    def __init__(self, recipe: MergeRecipe, ready: Prepared, other: Mapping[str, bytes] | None) -> None:
        self.recipe, self.ready = recipe, ready
        self.files = {name: checkpoint.files() for name, checkpoint in ready.checkpoints.items()}
        self.other = other
        self.tables: dict[str, TokenTable] = {}

    def _read(self) -> None:
        """The tables. Fine-tunes mostly share their tokenizer's bytes: a large file is then parsed once."""
        parsed: dict[tuple[bytes | None, ...], TokenTable | None] = {}
        for name in self.files:
            key = self._bytes(name)
            if key not in parsed:
                parsed[key] = read_table(self.files[name], name)
            table = parsed[key]
            if table is not None:
                self.tables[name] = table

    def _bytes(self, name: str) -> tuple[bytes | None, ...]:
        return tuple(self.files[name].get(file) for file in _TABLE_FILES)

    def run(self) -> None:
        spec = self.recipe.tokenizer_spec()
        if spec is not None or len({self._bytes(name) for name in self.files}) > 1:
            self._read()
        if spec is None:
            self._compare()
        else:
            self._unite(spec)
        if self.recipe.chat_template is not None:
            found = [template_of(files, name) for name, files in self.files.items()]
            chosen = choose(self.recipe.chat_template, found)
            if chosen is not None:
                self.ready.files = with_template(self.ready.files, chosen, self.ready.template)

    def _compare(self) -> None:
        """Without a word on tokenizers, rows are merged by number: every model must mean the same by them."""
        own = self.tables.get(self.ready.template)
        for name, table in self.tables.items():
            if own is not None and table.ids != own.ids:
                odd = first_difference(own.ids, table.ids)
                self.ready.problems.append(
                    f"{name}: its vocabulary differs from {self.ready.template}'s (at token {odd!r}); set "
                    "tokenizer_source to base, union or a model to merge by token"
                )

    def _unite(self, spec: TokenizerSpec) -> None:
        checkpoints, template = self.ready.checkpoints, self.ready.template
        absent = [name for name in checkpoints if name not in self.tables]
        if absent:
            raise InputError(f"{absent[0]}: no tokenizer files to merge tokens by (tokenizer.json or vocab.json)")
        source = template if spec.source in ("base", "union") else spec.source
        if source in self.tables:
            files, own = self.files[source], self.tables[source]
        else:
            files = dict(self.other or {})
            found = read_table(files, source)
            if found is None:
                raise InputError(f"tokenizer_source {source}: no tokenizer.json or vocab.json there")
            own = found
        united = unite({source: own} | (self.tables if spec.source == "union" else {}), source, spec.tokens)
        rows_of = {name: self._rows(checkpoint) for name, checkpoint in checkpoints.items()}
        rows = max(rows_of.get(source, 0), united.length)
        if spec.pad_to_multiple_of:
            rows = -(-rows // spec.pad_to_multiple_of) * spec.pad_to_multiple_of
        kept = {name: data for name, data in self.files[template].items() if name not in _TOKENIZER_FILES}
        self.ready.files = kept | {n: d for n, d in output_files(files, united, source).items() if n not in kept}
        mapping = build(united, rows, self.tables, rows_of, self.recipe.base_model, spec.tokens)
        self._renumber(self.tables[template], united, source)
        self._resize(rows_of[template], rows)
        if any(not mapping.unchanged(name, rows_of[name]) for name in checkpoints):
            self._remap(mapping, rows_of)
            report = {"source": spec.source, **mapping.report}
            self.ready.files[REPORT] = json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n"

    def _rows(self, checkpoint: Checkpoint) -> int:
        name = input_embedding(checkpoint.names)
        if name is None:
            raise InputError(f"{checkpoint.source.spec}: no input embedding, so tokens cannot be merged")
        return checkpoint.spec(name).shape[0]

    def _remap(self, mapping: RowMap, rows_of: dict[str, int]) -> None:
        before = dict(self.ready.checkpoints)
        by_token = [
            name
            for name in before[self.ready.template].names
            if has_row_a_token(name)
            and all(name not in c or c.spec(name).shape[:1] == (rows_of[m],) for m, c in before.items())
        ]
        for model, checkpoint in before.items():
            made = {}
            for name in by_token:
                if name in checkpoint:

                    def table(donor: str, name: str = name) -> Any:
                        return before[donor].read(name)

                    shape = (mapping.rows, *checkpoint.spec(name).shape[1:])
                    made[name] = (shape, partial(mapping.remap, model, table))
            self.ready.checkpoints[model] = Remade(checkpoint, made)

    def _resize(self, old: int, new: int) -> None:
        for place in (self.ready.config, *(v for v in self.ready.config.values() if isinstance(v, dict))):
            if place.get("vocab_size") == old:
                place["vocab_size"] = new

    def _renumber(self, own: TokenTable, output: TokenTable, source: str) -> None:
        """Ids in config.json and generation_config.json follow their tokens; where the output's tokenizer has no
        such token, the tokenizer's own model says which id takes its part."""
        if all(output.ids.get(token) == i for token, i in own.ids.items()):
            return
        token_of = {i: token for token, i in own.ids.items()}
        generation = read_object(self.ready.files, "generation_config.json", self.ready.template)
        given = self.ready.checkpoints[source].config if source in self.ready.checkpoints else {}
        inner = [value for value in self.ready.config.values() if isinstance(value, dict)]
        for place in (self.ready.config, *inner, generation):
            for key, value in place.items():
                if not key.endswith(("_token_id", "_token_index")) or value is None:
                    continue
                ids = value if isinstance(value, list) else [value]
                new = [output.ids.get(token_of[i]) if i in token_of else i for i in ids]
                if None not in new:
                    place[key] = new if isinstance(value, list) else new[0]
                elif given.get(key) is not None:
                    place[key] = given[key]
                else:
                    lost = token_of[ids[new.index(None)]]
                    raise InputError(f"the output's tokenizer lacks {lost!r}, the {key} of {self.ready.template}")
        if generation:
            self.ready.files["generation_config.json"] = json.dumps(generation, indent=2).encode() + b"\n"
