"""What an audit's numbers say, in words: each claim, whether the evidence supports it, and the numbers. By rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

FOLLOWS = 0.95
AGREES = 0.98
KL_BAR = 0.1
PERPLEXITY_BAR = 1.02
READ = 0.9


@dataclass(frozen=True)
class Claim:
    """`supported` is None where the audit did not measure it."""

    claim: str
    supported: bool | None
    because: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Evidence:
    """Reads an audit's report: rows by control, and which way the task's metric counts."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report = report
        self.metric = report["task"]["metric"]
        self.enough = report["seeds"]["enough"]

    def rows(self, control: str) -> list[Mapping[str, Any]]:
        return [row for row in self.report["rows"] if row["control"] == control]

    def row(self, control: str, labels: int | None = None) -> Mapping[str, Any] | None:
        return next((row for row in self.rows(control) if row["labels"] == labels), None)

    def mean(self, control: str, score: str) -> float | None:
        row = self.row(control)
        return None if row is None or score not in row["scores"] else float(row["scores"][score]["mean"])

    def advantage(self, row: Mapping[str, Any], score: str) -> int | None:
        """+1: the fusion is better and the paired interval excludes 0; -1: worse; 0: not told apart; None: no
        interval to tell by."""
        difference = row.get("difference", {}).get(score)
        if difference is None or difference["low"] is None:
            return None
        if difference["low"] <= 0 <= difference["high"]:
            return 0
        better = self.metric["higher_is_better"] or score != self.metric["name"]
        return 1 if (difference["mean"] > 0) == better else -1

    def said(self, row: Mapping[str, Any], score: str) -> str:
        """ "difference +0.113 [+0.101, +0.125], 5 seeds"."""
        d, digits = row["difference"][score], self.metric["digits"] if score == self.metric["name"] else 3
        name = self.metric["label"] if score == self.metric["name"] else score
        text = f"{name}: fusion minus control {d['mean']:+.{digits}f} {bounds(d, digits)}, {d['n']} seeds"
        parsed = row["scores"].get("parsed")
        if parsed is not None and parsed["mean"] < READ:
            text += f" (only {parsed['mean']:.0%} of the control's answers hold an answer that can be read)"
        return text


def bounds(interval: Mapping[str, Any], digits: int) -> str:
    """ "[low, high]" with signs, or "(no interval)"."""
    if interval["low"] is None:
        return "(no interval)"
    return f"[{interval['low']:+.{digits}f}, {interval['high']:+.{digits}f}]"


def claims(report: Mapping[str, Any]) -> list[Claim]:
    """Every claim that a fusion makes, judged. Fewer than five seeds support none that needs an interval."""
    e = Evidence(report)
    return [claim for rule in RULES for claim in rule(e)]


def _level(e: Evidence) -> Iterator[Claim]:
    agreement = e.mean("fused", "agreement")
    if agreement is None:
        return
    text = f"mean agreement with the expert on test rows {agreement:.3f}, the bar is {AGREES}"
    own, fused = e.mean("1", e.metric["name"]), e.mean("fused", e.metric["name"])
    if own is not None and fused is not None:
        text += f"; {e.metric['label']} {fused:.{e.metric['digits']}f}, the expert's own {own:.{e.metric['digits']}f}"
    if (recovered := e.report.get("skill_recovered")) is not None:
        text += f"; of what the expert knows beyond the LLM told the input in words, {recovered:.3f} is recovered"
    yield Claim("The fused model answers with the expert's skill.", agreement >= AGREES, text)


def _against(key: str, claim: str, otherwise: str, score: str = "agreement") -> Callable[[Evidence], Iterator[Claim]]:
    """A rule: the fusion beats every row of control `key`, the paired interval excluding 0."""

    def rule(e: Evidence) -> Iterator[Claim]:
        for row in e.rows(key):
            if score not in row.get("difference", {}):
                continue
            found, few = e.advantage(row, score), f" ({row['labels']} labels)" if row["labels"] else ""
            text = e.said(row, score)
            if found is None or not e.enough:
                yield Claim(claim + few, None, f"too few seeds to tell; {text}")
            else:
                yield Claim(claim + few, found == 1, text if found == 1 else f"{otherwise}; {text}")

    return rule


def _exchange(e: Evidence) -> Iterator[Claim]:
    rows = e.rows("12")
    if rows:
        worst = min(rows, key=lambda row: float(row["scores"]["agreement"]["mean"]))
        value = float(worst["scores"]["agreement"]["mean"])
        yield Claim(
            "The LLM reads the expert and did not memorise its answers: another expert put in is followed.",
            value >= FOLLOWS,
            f"lowest mean agreement with a new expert {value:.3f} ({worst['variant']}) of {len(rows)}, bar {FOLLOWS}",
        )


def _language(e: Evidence) -> Iterator[Claim]:
    speech = e.report["speech"]
    kl, perplexity = speech["kl_mean"], speech["perplexity"]
    beside = ""
    if "beside_expert" in perplexity:
        beside = (
            f"; perplexity of prose after a prompt with the expert {perplexity['beside_expert']:.3f}, "
            f"told its words instead {perplexity['told_instead']:.3f}"
        )
    ratio = perplexity["bridge_on"] / perplexity["bridge_off"]
    yield Claim(
        "Without the expert in the prompt the LLM is what it was.",
        bool(speech["identical_without_expert"]) or ratio <= PERPLEXITY_BAR,
        f"logits bit-identical: {'yes' if speech['identical_without_expert'] else 'no'}; "
        f"perplexity {perplexity['bridge_on']:.3f}, before {perplexity['bridge_off']:.3f}",
    )
    yield Claim(
        "With the expert present, unrelated questions are answered as before.",
        kl <= KL_BAR,
        f"mean KL to the text oracle over {speech['prompts']} prompts {kl:.3f} nats a token, "
        f"the bar is {KL_BAR}{beside}",
    )


def _baseline(key: str, name: str, unlike: str) -> Callable[[Evidence], Iterator[Claim]]:
    """A rule: what the fusion can do that an untrained baseline cannot, and when to prefer the baseline."""

    def rule(e: Evidence) -> Iterator[Claim]:
        row = e.row(key)
        if row is None:
            why = next((s["why"] for s in e.report["skipped"] if s["control"] == key), None)
            if why is not None:
                yield Claim(f"The fusion can do what {name} cannot.", True, f"{name} does not apply here: {why}")
            return
        found = {score: e.advantage(row, score) for score in row["difference"]}
        texts = "; ".join(e.said(row, score) for score in row["difference"])
        if not e.enough or any(value is None for value in found.values()):
            yield Claim(f"The fusion can do what {name} cannot.", None, f"too few seeds to tell; {texts}")
        elif any(value == 1 for value in found.values()):
            what = ", ".join(score for score, value in found.items() if value == 1)
            lost = ", ".join(score for score, value in found.items() if value == -1)
            yield Claim(
                f"The fusion answers better than {name} on this task ({what}).", True,
                f"{texts}. {unlike}" + (f" It is worse in: {lost}." if lost else ""),
            )  # fmt: skip
        else:
            yield Claim(
                f"The fusion answers better than {name} on this task.", False,
                f"{texts}. On this task {name}, which trains nothing, does as well: prefer it.",
            )  # fmt: skip

    return rule


def _told(e: Evidence) -> Iterator[Claim]:
    """A tool call is only as good as its prompt: the text oracle is one with a plainer prompt."""
    rows = [row for row in e.rows("3") if "agreement" in row.get("difference", {})]
    if not rows:
        return
    row = max(rows, key=lambda row: float(row["scores"]["agreement"]["mean"]))
    found, text = e.advantage(row, "agreement"), f"told {row['variant']}: {e.said(row, 'agreement')}"
    claim = "The fusion answers better than the LLM plainly told the expert's answer and asked to give it."
    if found is None or not e.enough:
        yield Claim(claim, None, f"too few seeds to tell; {text}")
    elif found == 1:
        yield Claim(claim, True, f"{text}. This LLM cannot even repeat the answer reliably")
    else:
        yield Claim(claim, False, f"{text}. A tool call with such a prompt, which trains nothing, does as well: "
                                  "where the prompt is yours to write, prefer it")  # fmt: skip


def _relay(e: Evidence) -> Iterator[Claim]:
    count = e.report["task"]["classes"]
    if count == 2:
        yield Claim(
            "The fusion passes on more than one bit.", False,
            "the expert has two classes: the LLM relays one bit, which a logit bias does untrained; "
            "a ten-class or continuous expert and composed questions are needed to show more",
        )  # fmt: skip


RULES: tuple[Callable[[Evidence], Iterator[Claim]], ...] = (
    _level,
    _against("4a", "The answers depend on the expert's signal (zeroed).", "zeroing the signal changes too little"),
    _against("4b", "The answers depend on the row's own signal (shuffled).", "shuffling the signal changes too little"),
    _against("4c", "The answers follow the signal (swapped).", "a swapped signal changes too little"),
    _exchange,
    _against("5", "A trained expert is needed.", "an untrained expert does as well: its features leak the input"),
    _against("6", "The expert is needed, not only the input.", "the bridge learns the task from the raw input"),
    _against("9", "The trainable budget alone does not do it.", "a bridge without an expert does as well"),
    _against("8", "The pretrained LLM is needed to relay the decision.",
             "a randomly initialised LLM relays it as well: the skill here is the expert's and the bridge's"),
    _against("7", "The LLM adds skill to the expert.",
             "a linear head on the expert, with no LLM, does as well: what the LLM adds is the words"),
    _against("2", "The LLM could not do this from words alone.", "the LLM told the input in words does as well"),
    _baseline("10", "a tool call", "The tool's words reach this LLM as text; the bridge's signal does not pass through "
                                   "its reading."),
    _told,
    _baseline("11", "a logit bias", "The bias acts only on the class names; the fusion leaves the words free."),
    _relay,
    _language,
)  # fmt: skip
