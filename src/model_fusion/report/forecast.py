"""The text of a dry run, from its result's fields. Imports no room."""

from typing import Any


def forecast(found: Any) -> str:
    """Plan, bytes and expected time."""
    lines = []
    for merge in found.merges:
        lines.append(f"{merge.name}: {merge.method} of {len(merge.models)} models, {merge.tensors} tensors")
        lines += [f"  {'base  ' if model == merge.base else 'model '} {model}" for model in merge.models]
        lines.append(f"  reads {merge.read / 1e9:.3f} GB, writes {merge.written / 1e9:.3f} GB")
        if merge.seconds is None:
            lines.append(f"  time unknown: {merge.unknown}")
        else:
            about = f"  about {_time(merge.seconds)} with {found.threads} threads: an estimate, from {merge.sampled}"
            lines.append(
                about + " tensors merged and thrown away; writing to the disk and the program's start come on top"
            )
    lines += [f"warning: {text}" for text in found.warnings]
    return "\n".join([*lines, "nothing was written"])


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
