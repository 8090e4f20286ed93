"""Which of a source folder's small files (tokenizer, chat template …) belong in an output."""

from pathlib import Path


def small_files(folder: Path) -> list[str]:
    """Names of a source folder's small files that belong in the output."""
    return [name for name in sorted(p.name for p in folder.iterdir() if p.is_file()) if _kept(name)]


def _kept(name: str) -> bool:
    exact = {"generation_config.json", "vocab.json", "merges.txt", "vocab.txt", "special_tokens_map.json"}
    exact |= {"added_tokens.json", "chat_template.jinja", "chat_template.json", "processor_config.json"}
    exact |= {
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "normalizer.json",
        "source.spm",
        "target.spm",
    }
    exact |= {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.bpe", "bpe.codes"}
    if name == "tokenizer_report.json":  # speaks of the merge that made the folder
        return False
    return (
        name in exact
        or name.endswith((".tiktoken", "tiktoken.model"))
        or (name.startswith("tokenizer") and name.endswith(".json"))
    )
