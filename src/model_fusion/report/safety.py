"""What a safety audit says in the terminal. Takes its report, imports no room."""

from collections.abc import Mapping
from typing import Any


def audited(report: Mapping[str, Any]) -> str:
    """One row a model, the cosines by layer, the flags."""
    asked = report["prompts"]
    head = f"{asked['harmful']} harmful and {asked['benign']} harmless requests ({asked['origin']}), judged by rules"
    lines = [head, f"{'':<28}{'refused, harmful':>26}{'refused, harmless':>26}{'harmful told apart':>20}"]
    for row in report["models"]:
        name = f"{row['role']} {_short(row['model'])}"
        apart = "–" if row["told_apart"] is None else f"{row['told_apart']:.2f}"
        lines.append(f"{name:<28}{_rate(row['refusal']):>26}{_rate(row['over_refusal']):>26}{apart:>20}")
    if report["direction_of"] is None:
        lines += ["(harmful told apart: too few requests of a kind to say)"]
    else:
        lines += [
            f"(harmful told apart: along the refusal direction of {_short(report['direction_of'])} at layer "
            f"{report['direction_layer']}, both from the other half of the requests)"
        ]
    if report["alignment"] is not None:
        lines += _alignment(report["alignment"])
    return "\n".join([*lines, *(report["flags"] or ["Nothing to flag on these requests."]), report["warning"]])


def repaired(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The audit before, and the child's row after."""
    row = after["models"][0]
    lines = [audited(before), "", f"after the repair: refused, harmful {_rate(row['refusal'])}; refused, harmless "
             f"{_rate(row['over_refusal'])}"]  # fmt: skip
    return "\n".join([*lines, *(after["flags"] or ["Nothing to flag on these requests."])])


def _alignment(alignment: Mapping[str, Any]) -> list[str]:
    layers: dict[int | None, list[float]] = {}
    for one in alignment["tensors"]:
        layers.setdefault(one["layer"], []).append(one["cosine"])
    lines = [
        f"SafeMERGE cosines of the child's change from {_short(alignment['base'])}, alignment from "
        f"{_short(alignment['unaligned'])} to {_short(alignment['aligned'])}: {alignment['below']} of "
        f"{len(alignment['tensors'])} tensors below {alignment['threshold']:g}"
    ]
    for layer, found in sorted(layers.items(), key=lambda item: (item[0] is None, item[0] or 0)):
        label = "outside layers" if layer is None else f"layer {layer}"
        below = sum(value < alignment["threshold"] for value in found)
        lines.append(f"  {label:<16} least {min(found):6.3f}  mean {sum(found) / len(found):6.3f}  below {below}")
    return lines


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{rate['count']}/{rate['n']} [{rate['low']:.2f}, {rate['high']:.2f}]"


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name
