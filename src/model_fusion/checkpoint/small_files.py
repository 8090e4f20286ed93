"""Which of a source folder's small files (tokenizer, chat template …) belong in an output."""

from pathlib import Path

from model_fusion.tokenizer.table import VOCABULARY_FILES


def small_files(folder: Path) -> list[str]:
    """Names of a source folder's small files that belong in the output."""
    return [name for name in sorted(p.name for p in folder.iterdir() if p.is_file()) if _kept(name)]


_KEPT = {
    *VOCABULARY_FILES, "special_tokens_map.json", "normalizer.json", "source.spm", "target.spm",
    "generation_config.json", "chat_template.jinja", "chat_template.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
}  # fmt: skip


def _kept(name: str) -> bool:
    if name == "tokenizer_report.json":  # speaks of the merge that made the folder
        return False
    return (
        name in _KEPT
        or name.endswith((".tiktoken", "tiktoken.model"))
        or (name.startswith("tokenizer") and name.endswith(".json"))
    )
