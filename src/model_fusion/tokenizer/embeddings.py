"""Embedding rows by token: for each model, which of its rows an output row is, and how absent ones are filled.

An absent token's row comes, as mergekit documents, from the base model if that has the token, else from the only
model that has it, else it is the average of all that have it; or from where the recipe says. Rows without a token
(padding) keep their number.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.recipe.tokenizer import ModelToken, TokenEmbedding, Zero
from model_fusion.tokenizer.compare import compare
from model_fusion.tokenizer.table import TokenTable

ABSENT = -1
_ZERO, _AVERAGE = -1, -2


@dataclass(frozen=True)
class RowMap:
    """How every model's embedding becomes one over the output's `rows`.

    `row_of[model]` int64 [rows]: the model's row, or ABSENT. `donor` int64 [rows]: the position in `models` of the
    model that fills absent rows, or _ZERO or _AVERAGE; `donor_row` int64 [rows]: that model's row. `forced` bool
    [rows]: filled even where a model has the token.
    """

    models: tuple[str, ...]
    rows: int
    row_of: dict[str, Tensor]
    donor: Tensor
    donor_row: Tensor
    forced: Tensor
    report: dict[str, Any] = field(default_factory=dict)

    def unchanged(self, model: str, rows: int) -> bool:
        """Whether the model's embedding of `rows` rows already is the output's."""
        same = rows == self.rows and torch.equal(self.row_of[model], torch.arange(rows))
        return same and not bool(self.forced.any())

    def remap(self, model: str, table: Callable[[str], Tensor]) -> Tensor:
        """[rows, …] of one model. `table(model)` gives a model's own tensor [its rows, …]; donors' only if needed.

        Rows are copied as they are; an average is taken in float32, and the result is then float32.
        """
        own = table(model)
        rows = self.row_of[model]
        result = own[rows.clamp(min=0)]
        missing = (rows < 0) | self.forced
        result[missing] = 0
        for position, name in enumerate(self.models):
            wanted = missing & (self.donor == position)
            if wanted.any():
                donated = table(name)[self.donor_row[wanted]]
                if donated.dtype != result.dtype:
                    result = result.float()
                result[wanted] = donated.to(result.dtype)
        averaged = (missing & (self.donor == _AVERAGE)).nonzero().squeeze(1)
        if len(averaged):
            result = result.float()
            result[averaged] = self._average(averaged, table)
        return result

    def _average(self, wanted: Tensor, table: Callable[[str], Tensor]) -> Tensor:
        total, count = None, torch.zeros(len(wanted))
        for name in self.models:
            rows = self.row_of[name][wanted]
            has = rows >= 0
            part = table(name)[rows.clamp(min=0)].float()
            part[~has] = 0
            total = part if total is None else total + part
            count += has
        assert total is not None
        return total / count.view(-1, *[1] * (total.dim() - 1))


def build(
    output: TokenTable,
    rows: int,
    tables: Mapping[str, TokenTable],
    own_rows: Mapping[str, int],
    base: str | None,
    tokens: Mapping[str, TokenEmbedding],
) -> RowMap:
    """The map from each model's rows to the output's.

    **Arguments** rows: of the output, padding included. tables, own_rows: each model's tokens and embedding length.
    base: whose embedding an absent token takes first. tokens: what the recipe says of single tokens.
    **Raises** InputError where a recipe's token names a model, token or row that is not there.
    """
    models = tuple(tables)
    row_of = {name: _rows(output, rows, tables[name], own_rows[name]) for name in models}
    has = torch.stack([row_of[name] >= 0 for name in models])
    count = has.sum(0)
    donor = torch.where(count == 0, _ZERO, torch.where(count == 1, has.int().argmax(0), _AVERAGE))
    if base in row_of:
        donor[row_of[base] >= 0] = models.index(base)
    stacked = torch.stack([row_of[name] for name in models])
    donor_row = stacked.gather(0, donor.clamp(min=0)[None]).squeeze(0)
    forced = torch.zeros(rows, dtype=torch.bool)
    for token, asked in tokens.items():
        row = output.ids[token]
        donor[row], donor_row[row] = _asked(token, asked, models, tables, own_rows)
        forced[row] = asked.force
    made = RowMap(models, rows, row_of, donor, donor_row, forced)
    made.report.update(_report(made, output, tables, own_rows))
    return made


def _rows(output: TokenTable, rows: int, own: TokenTable, own_rows: int) -> Tensor:
    found = torch.full((rows,), ABSENT)
    free = torch.ones(max(rows, own_rows), dtype=torch.bool)
    free[[i for i in output.ids.values() if i < len(free)]] = False
    free[[i for i in own.ids.values() if i < len(free)]] = False
    free[min(rows, own_rows) :] = False
    padding = free.nonzero().squeeze(1)
    found[padding] = padding
    pairs = [(i, own.ids[t]) for t, i in output.ids.items() if own.ids.get(t, own_rows) < own_rows]
    if pairs:
        new, old = torch.tensor(pairs).T
        found[new] = old
    return found


def _asked(
    token: str,
    asked: TokenEmbedding,
    models: tuple[str, ...],
    tables: Mapping[str, TokenTable],
    own_rows: Mapping[str, int],
) -> tuple[int, int]:
    """Donor and its row for a token that the recipe speaks of."""
    source = asked.source
    if isinstance(source, Zero):
        return _ZERO, 0
    name = source.model if isinstance(source, ModelToken) else source
    if name not in tables:
        raise InputError(f"tokens: {token!r} takes its embedding from {name!r}, which is no model of the recipe")
    if isinstance(source, ModelToken) and source.token_id is not None:
        if not 0 <= source.token_id < own_rows[name]:
            raise InputError(f"tokens: {token!r} wants row {source.token_id} of {name}, which has {own_rows[name]}")
        return models.index(name), source.token_id
    wanted = source.token if isinstance(source, ModelToken) else token
    row = tables[name].ids.get(wanted or "", own_rows[name])
    if row >= own_rows[name]:
        raise InputError(f"tokens: {name} has no embedding of token {wanted!r}, which {token!r} is to be taken from")
    return models.index(name), row


def _report(
    made: RowMap, output: TokenTable, tables: Mapping[str, TokenTable], own_rows: Mapping[str, int]
) -> dict[str, Any]:
    """Which tokens came from where: every row that some model did not have itself."""
    lists = {name: (rows < 0).tolist() for name, rows in made.row_of.items()}
    donor, forced = made.donor.tolist(), made.forced.tolist()
    filled = {}
    for token, row in sorted(output.ids.items(), key=lambda item: item[1]):
        lacking = [name for name in made.models if lists[name][row] or forced[row]]
        if lacking:
            special = {_ZERO: "zero", _AVERAGE: "average"}.get(donor[row])
            filled[token] = {"id": row, "filled_for": lacking, "from": special or made.models[donor[row]]}
    return {
        "rows": made.rows,
        "tokens": len(output.ids),
        "models": {
            name: {
                "tokens": len(table.ids),
                "rows": own_rows[name],
                "relation": str(compare(table.ids, output.ids, (own_rows[name], made.rows))),
            }
            for name, table in tables.items()
        },
        "filled": filled,
    }
