"""Embeddings remapped by token, against a reference that goes token by token in Python and float64."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.recipe.tokenizer import TokenEmbedding
from model_fusion.tokenizer import embeddings
from model_fusion.tokenizer.embeddings import build
from model_fusion.tokenizer.table import TokenTable
from model_fusion.tokenizer.unite import unite

WIDTH = 3
Tables = Mapping[str, Mapping[str, int]]


def reference(
    output: Mapping[str, int], rows: int, tables: Tables, weights: Mapping[str, Tensor], base: str | None
) -> dict[str, Tensor]:
    """mergekit's rules, written out: own row; else the base's; else the only holder's; else the holders' mean."""
    made = {}
    for model in tables:
        result = torch.zeros(rows, WIDTH, dtype=torch.float64)
        for token, row in output.items():
            holders = [m for m in tables if token in tables[m]]
            if token in tables[model]:
                donors = [model]
            elif base is not None and token in tables[base]:
                donors = [base]
            else:
                donors = holders
            for donor in donors:
                result[row] += weights[donor][tables[donor][token]].double() / len(donors)
        made[model] = result
    return made


def check(tables: Tables, base: str | None) -> None:
    weights = {m: torch.randn(max(t.values()) + 1, WIDTH) for m, t in tables.items()}
    full = {m: TokenTable(dict(t), raw={"model": {"type": "WordLevel", "vocab": t}}) for m, t in tables.items()}
    output = unite(full, base or next(iter(tables)))
    rows = {m: len(w) for m, w in weights.items()}
    made = build(output, output.length, full, rows, base, {})
    expected = reference(output.ids, output.length, tables, weights, base)
    used = sorted(output.ids.values())
    for model in tables:
        got = made.remap(model, weights.__getitem__)
        assert torch.allclose(got[used].double(), expected[model][used], atol=1e-6), model


vocabularies = st.lists(st.permutations(list("abcdefgh")), min_size=2, max_size=4).flatmap(
    lambda orders: st.tuples(*(st.integers(1, 8).map(lambda n, o=o: o[:n]) for o in orders))
)


@settings(max_examples=60, deadline=None)
@given(vocabularies, st.booleans())
def test_every_row_is_the_reference_s(words: tuple[list[str], ...], with_base: bool) -> None:
    tables = {f"m{i}": {t: n for n, t in enumerate(order)} for i, order in enumerate(words)}
    check(tables, "m0" if with_base else None)


THREE = {"x": {"a": 0, "b": 1}, "y": {"b": 0, "c": 1}, "z": {"c": 0, "d": 1}}


def test_merging_by_row_turns_the_reference_test_red(monkeypatch: pytest.MonkeyPatch) -> None:
    check(THREE, None)
    plain = embeddings._rows
    monkeypatch.setattr(
        embeddings, "_rows", lambda o, r, t, n: torch.where(plain(o, r, t, n) < 0, -1, torch.arange(r) % n)
    )
    with pytest.raises(AssertionError):
        check(THREE, None)


def test_an_average_over_too_many_turns_it_red(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = embeddings.RowMap._average
    monkeypatch.setattr(embeddings.RowMap, "_average", lambda self, *a: plain(self, *a) * 2 / len(self.models))
    with pytest.raises(AssertionError):
        check(THREE, None)


def asked(**tokens: object) -> dict[str, Tensor]:
    tables = {m: TokenTable(dict(t), raw={"model": {"type": "WordLevel", "vocab": t}}) for m, t in THREE.items()}
    weights = {m: torch.randn(2, WIDTH).bfloat16() for m in THREE}
    wanted = {token: TokenEmbedding.model_validate(value) for token, value in tokens.items()}
    output = unite(tables, "x", wanted)
    made = build(output, output.length, tables, dict.fromkeys(THREE, 2), None, wanted)
    rows = {f"{m}.{t}": made.remap(m, weights.__getitem__)[i] for m in THREE for t, i in output.ids.items()}
    return rows | {f"own {m}.{t}": weights[m][i] for m in THREE for t, i in THREE[m].items()}


def test_single_tokens_take_what_the_recipe_says() -> None:
    got = asked(
        c={"source": "z", "force": True},
        d={"source": {"kind": "zero"}},
        n={"source": {"kind": "model_token", "model": "y", "token": "b"}},
        o={"source": {"kind": "model_token", "model": "y", "token_id": 1}},
    )
    for model in "xyz":
        assert torch.equal(got[f"{model}.c"].bfloat16(), got["own z.c"])
        assert torch.equal(got[f"{model}.n"].bfloat16(), got["own y.b"])
        assert torch.equal(got[f"{model}.o"].bfloat16(), got["own y.c"])
    assert torch.equal(got["z.d"].bfloat16(), got["own z.d"])  # not forced: the model's own row stays
    assert not got["x.d"].any()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nobody", "no model of the recipe"),
        ("x", "no embedding of token 'c'"),
        ({"kind": "model_token", "model": "x", "token_id": 9}, "row 9 of x"),
    ],
)
def test_sources_that_are_not_there_are_refused(source: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        asked(c={"source": source})


def test_padding_rows_stay_where_they_are() -> None:
    table = TokenTable({"a": 0, "b": 1})
    made = build(table, 4, {"x": table, "y": table}, {"x": 4, "y": 2}, "x", {})
    weights = {"x": torch.randn(4, WIDTH), "y": torch.randn(2, WIDTH)}
    assert made.unchanged("x", 4)
    assert not made.unchanged("y", 2)
    assert torch.equal(made.remap("x", weights.__getitem__), weights["x"])
    assert torch.equal(made.remap("y", weights.__getitem__), torch.cat([weights["y"], weights["x"][2:]]))


def test_the_report_says_where_each_token_came_from() -> None:
    tables = {m: TokenTable(dict(t), raw={"model": {"type": "WordLevel", "vocab": t}}) for m, t in THREE.items()}
    output = unite(tables, "x")
    report = build(output, output.length, tables, dict.fromkeys(THREE, 2), None, {}).report
    assert report["models"]["x"] == {"tokens": 2, "rows": 2, "relation": "subset"}
    assert report["filled"]["a"] == {"id": 0, "filled_for": ["y", "z"], "from": "x"}
    assert report["filled"]["b"]["from"] == "average"
