"""Four sharply different kinds of text: dialogue, Python code, old English prose, arithmetic.

python benchmarks/language_texts.py --kjv kjv.txt --out benchmarks/language_data

Writes the held-out texts that the language bench reads (`DOMAIN.validation.txt`, `DOMAIN.test.txt`, committed). The
training texts are made by `training_text`, from the package chitchat-dataset (MIT), the standard library of the running
Python, the King James Bible (the output of Debian's `bible Gen1:1-Rev22:21`) and a generator. A document never stands
on two sides.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sysconfig
from importlib.util import find_spec
from pathlib import Path

DOMAINS = ("dialogue", "code", "prose", "arithmetic")
HELD_OUT = 24_000
"""Characters of each held-out text."""


def dialogue() -> list[str]:
    found = find_spec("chitchat_dataset")
    if found is None or found.origin is None:
        raise SystemExit("the dialogues need chitchat-dataset: pip install chitchat-dataset")
    talks = json.loads(Path(found.origin).with_name("dataset.json").read_text(encoding="utf-8"))
    out = []
    for key in sorted(talks):
        lines = []
        for number, turn in enumerate(talks[key]["messages"]):
            said = " ".join(message["text"].strip() for message in turn)
            lines.append(f"{'AB'[number % 2]}: {said}")
        out.append("\n".join(lines))
    return [text for text in out if 400 < len(text) < 4000 and text.isascii()]


def code() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(library.rglob("*.py")) if not {"test", "tests", "site-packages"} & set(p.parts)]
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in files if 2000 < p.stat().st_size < 60_000]
    return [text for text in texts if text.isascii()]


def prose(kjv: Path) -> list[str]:
    chapters = re.split(r"\n(?=[1-3]?[A-Z][A-Za-z ]+ \d+\n)", kjv.read_text(encoding="utf-8"))
    bare = [re.sub(r"\s+", " ", re.sub(r"(?m)^\s*\d+ ", "", c.partition("\n")[2])).strip() for c in chapters]
    return [text for text in bare if len(text) > 500]


def arithmetic(documents: int = 400) -> list[str]:
    return [_sums(random.Random(number)) for number in range(documents)]


def _sums(random: random.Random) -> str:
    lines = []
    for _ in range(40):
        a, b = random.randint(2, 99), random.randint(2, 99)
        kind = random.randrange(5)
        if kind == 0:
            lines.append(f"{a} + {b} = {a + b}")
        elif kind == 1:
            lines.append(f"{max(a, b)} - {min(a, b)} = {max(a, b) - min(a, b)}")
        elif kind == 2:
            lines.append(f"{a % 12 + 1} * {b % 12 + 1} = {(a % 12 + 1) * (b % 12 + 1)}")
        elif kind == 3:
            lines.append(f"{a * (b % 9 + 2)} / {b % 9 + 2} = {a}")
        else:
            lines.append(f"double of {a} is {2 * a}, half of {2 * b} is {b}")
    return "\n".join(lines)


def sides(domain: str, kjv: Path) -> dict[str, list[str]]:
    """Documents of `domain`, each on one side by the hash of its text: train 8, validation 1, test 1 in ten."""
    documents = {"dialogue": dialogue, "code": code, "prose": lambda: prose(kjv), "arithmetic": arithmetic}[domain]()
    out: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for text in documents:
        place = hashlib.sha256(text.encode()).digest()[0] % 10
        out["validation" if place == 8 else "test" if place == 9 else "train"].append(text)
    return out


def training_text(domain: str, kjv: Path) -> list[str]:
    return sides(domain, kjv)["train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kjv", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "language_data")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        for side, documents in sides(domain, a.kjv).items():
            print(domain, side, len(documents), "documents", sum(map(len, documents)), "characters")
            if side != "train":
                taken = [text[:3000] for text in documents]
                random.Random(0).shuffle(taken)
                (a.out / f"{domain}.{side}.txt").write_text("\n\n".join(taken)[:HELD_OUT] + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
