"""What all recipes share: YAML in; every mistake one line that names the file, the place and what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from model_fusion.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (1.1 reads 1e-5 as text), and no key twice in one mapping: the first would be lost silently."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        found: set[str] = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in found:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
            found.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def yaml_documents(path: Path) -> list[Any]:
    """The YAML documents of a file. Raises InputError."""
    try:
        return list(yaml.load_all(path.read_text(encoding="utf-8"), _Loader))
    except FileNotFoundError as error:
        raise InputError(f"no such recipe: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None)
        why = f" ({problem})" if problem else ""
        raise InputError(f"{path}{line}: not valid YAML{why}") from error


def mistake(error: ValidationError, where: str) -> InputError:
    """The first mistake that pydantic found, with its place, as one line."""
    # Of a choice of forms, the one whose own rule failed says more than those that did not fit at all.
    first = min(error.errors(), key=lambda found: found["type"] != "value_error")
    place = ".".join(str(part) for part in first["loc"])
    return InputError(f"{where}: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}")


def nearest(word: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the valid words, to end an error message with."""
    options = list(valid)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(sorted(options))}"
