"""A checkpoint's token → row table, read from its tokenizer files without any tokenizer library."""

from pathlib import Path

from model_fusion.checkpoint.reader import read_json


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token → id, added tokens included; None when the folder has no table that can be compared."""
    full, plain = folder / "tokenizer.json", folder / "vocab.json"
    if full.is_file():
        data = read_json(full)
        model = data.get("model")
        table = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(table, list):  # Unigram: [token, score] in order of id
            table = {str(item[0]): i for i, item in enumerate(table)}
        if isinstance(table, dict):
            added = {t["content"]: t["id"] for t in data.get("added_tokens") or [] if "content" in t and "id" in t}
            return {**table, **added}
    return read_json(plain) if plain.is_file() else None
