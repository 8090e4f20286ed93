"""Small byte-level BPE tokenizers that share text and differ in tokens."""

import json
from pathlib import Path
from typing import Any

CORPUS = "the cat sat on the mat and the dog ate the hat of the man in the sun"


def train(words: str, size: int, special: tuple[str, ...] = ()) -> dict[str, Any]:
    """A tokenizer.json (as data) trained on `words`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), show_progress=False)
    tokenizer.train_from_iterator([words] * 4, trainer)
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    return data


def table(data: dict[str, Any]) -> dict[str, int]:
    """Token → id as the tokenizers library reads it."""
    from tokenizers import Tokenizer

    found: dict[str, int] = Tokenizer.from_str(json.dumps(data)).get_vocab()
    return found


def put(folder: Path, data: dict[str, Any], **config: Any) -> None:
    """Write tokenizer.json and tokenizer_config.json into a checkpoint folder."""
    (folder / "tokenizer.json").write_text(json.dumps(data))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(base | config))
