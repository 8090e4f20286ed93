"""How two vocabularies stand to each other. Rows are an embedding's, padding included."""

from collections.abc import Mapping
from enum import StrEnum


class Relation(StrEnum):
    """`SUBSET`: the first's tokens are some of the second's, under the same ids. `PERMUTED`: the same tokens under
    other ids. `PADDED`: equal tables, embeddings of different length. `DIFFERENT`: anything else."""

    EQUAL = "equal"
    PADDED = "padded"
    PERMUTED = "permuted"
    SUBSET = "subset"
    DIFFERENT = "different"


def compare(first: Mapping[str, int], second: Mapping[str, int], rows: tuple[int, int] | None = None) -> Relation:
    """The relation of two token → id tables; `rows` are the lengths of the embeddings they go with."""
    if first == second:
        return Relation.EQUAL if rows is None or rows[0] == rows[1] else Relation.PADDED
    if first.keys() == second.keys():
        return Relation.PERMUTED
    if first.items() <= second.items():
        return Relation.SUBSET
    return Relation.DIFFERENT


def first_difference(first: Mapping[str, int], second: Mapping[str, int]) -> str:
    """A token that the two treat differently, to end an error message with."""
    return min(token for token, _ in first.items() ^ second.items())
