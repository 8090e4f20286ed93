"""What bytes of text a token stands for, so that tokens of different vocabularies can be compared."""

from __future__ import annotations

import re
from typing import Any

from model_fusion.errors import InputError

_HEX = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def surfaces(tokenizer: Any) -> list[bytes | None]:
    """The bytes of each id of a fast tokenizer; None for special tokens, added ones and unused ids.

    Byte-level vocabularies (GPT-2's) write a byte as one letter; those of SentencePiece write a space as ▁ and a
    byte as <0x0A>. Raises InputError for other kinds (WordPiece, whole words), which do not say where spaces are."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    out: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    added = set(tokenizer.get_added_vocab())
    decoder = str(tokenizer.backend_tokenizer.decoder)
    bytewise = "ByteLevel" in decoder
    if not bytewise and "▁" not in decoder:
        raise InputError("this tokenizer is neither byte-level nor of SentencePiece's kind: its tokens are no text")
    letters = _letters()
    for token, number in vocabulary.items():
        if token in added:
            continue
        if bytewise:
            if all(letter in letters for letter in token):
                out[number] = bytes(letters[letter] for letter in token)
        elif found := _HEX.fullmatch(token):
            out[number] = bytes([int(found[1], 16)])
        else:
            out[number] = token.replace("▁", " ").encode()
    return out


def _letters() -> dict[str, int]:
    """Letter → byte, as byte-level vocabularies write it: printable bytes as themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Speller:
    """Writes any bytes as ids of one vocabulary, the longest token first."""

    def __init__(self, table: list[bytes | None]) -> None:
        self.ids: dict[bytes, int] = {}
        for number, piece in enumerate(table):
            if piece:
                self.ids.setdefault(piece, number)
        self.longest = max(map(len, self.ids))

    def spell(self, text: bytes) -> list[int] | None:
        """The ids, or None where the vocabulary has no token for some byte."""
        out, start = [], 0
        while start < len(text):
            for end in range(min(len(text), start + self.longest), start, -1):
                if (number := self.ids.get(text[start:end])) is not None:
                    out.append(number)
                    start = end
                    break
            else:
                return None
        return out
