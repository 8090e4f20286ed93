"""A mixed folder as a running model: the stock class of transformers, float32, with its tokenizer."""

from pathlib import Path
from typing import Any

import torch

from model_fusion.errors import InputError, MissingDependencyError
from model_fusion.mix.domains import recipe_of


def load_mixed(folder: Path) -> Any:
    """The model in eval mode. Raises `InputError` for a folder that mix did not build."""
    recipe_of(folder)
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(
            f"running a mixed model needs {error.name}: pip install 'model-fusion[fuse]'"
        ) from None
    import model_fusion.mix.query  # noqa: F401  (registers the one class that is ours)

    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    except OSError as error:
        raise InputError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]})") from None
