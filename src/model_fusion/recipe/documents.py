"""A recipe file of several YAML documents (mergekit-multi's form) as one recipe whose other merges have names.

The document without a name is the merge itself; the others are made first, and models call them by their names.
"""

from typing import Any

from model_fusion.errors import InputError


def joined(documents: list[Any], where: str) -> Any:
    """One recipe from a file's documents: the named ones under the key `merges` of the one without a name.

    Where all have names, the last is the merge itself. Raises `InputError` for two without a name, or two of one name.
    """
    if len(documents) == 1:
        return documents[0]
    for number, document in enumerate(documents, 1):
        if not isinstance(document, dict):
            raise InputError(f"{where}: document {number}: expected keys such as merge_method and models")
    nameless = [i for i, document in enumerate(documents) if document.get("name") is None]
    if len(nameless) > 1:
        first, second = nameless[0] + 1, nameless[1] + 1
        raise InputError(f"{where}: documents {first} and {second} have no name; name all but the one to write")
    final = nameless[0] if nameless else len(documents) - 1
    merges: dict[str, Any] = dict(documents[final].get("merges") or {})
    for i, document in enumerate(documents):
        if i != final:
            name = str(document["name"])
            if name in merges:
                raise InputError(f"{where}: two merges are named {name!r}")
            merges[name] = {key: value for key, value in document.items() if key != "name"}
    return {**documents[final], "merges": merges}


def in_order(uses: dict[str, list[str]], final: list[str]) -> list[str]:
    """Names of merges so that each comes after those it uses. `uses` maps a merge to the model names in it, `final`
    are those of the merge itself. Raises `InputError` for a circle, and for a merge that nothing uses."""
    order: list[str] = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            circle = " → ".join([*path[path.index(name) :], name])
            raise InputError(f"merges use each other in a circle: {circle}")
        if name in order:
            return
        for used in uses[name]:
            if used in uses:
                visit(used, [*path, name])
        order.append(name)

    for name in final:
        if name in uses:
            visit(name, [])
    for name in uses:
        visit(name, [])
    reached = _reached(uses, final)
    idle = next((name for name in uses if name not in reached), None)
    if idle is not None:
        raise InputError(f"merge {idle!r} is used by no other merge: use its name as a model, or remove it")
    return order


def _reached(uses: dict[str, list[str]], final: list[str]) -> set[str]:
    found: set[str] = set()
    todo = [name for name in final if name in uses]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [used for used in uses[name] if used in uses]
    return found
