"""A folder of any files that appears complete or not at all; for what is no plain checkpoint of one shard layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from model_fusion.checkpoint.output_folder import OutputFolder, check_target, explain


@contextmanager
def whole_folder(target: Path, inputs: Sequence[Path] = (), *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder beside `target` to fill, which takes its place when the block completes.

    Raises InputError where `target` exists without `overwrite`, is an input, or the disk is full.
    """
    check_target(target, inputs, overwrite=overwrite)
    with OutputFolder(target) as output:
        try:
            output.open()
            output.empty()
            yield output.partial
            for path in output.partial.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors leaves its files to the owner alone
                _sync(path)
            output.publish([], {}, "")
        except OSError as error:
            raise explain(error, target) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
