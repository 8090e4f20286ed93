"""Tokens as bytes: what a text's tokens stand for is the text, in both kinds of vocabulary."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model_fusion.checkpoint.llm import resolve_llm
from model_fusion.errors import InputError
from model_fusion.tokenizer import surface
from model_fusion.tokenizer.surface import Speller, surfaces
from tiny_llm import word_tokenizer


def byte_level() -> Any:
    return AutoTokenizer.from_pretrained(resolve_llm("smollm2").path)


def sentence_piece() -> Any:
    """▁ for a space, <0x..> for bytes: what Gemma's tokenizer is made of."""
    words = ["▁the", "▁cat", "the", "▁", "c", "a", "t", "é"]
    table = {token: i for i, token in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    raw = Tokenizer(models.BPE(vocab=table, merges=[], byte_fallback=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


TOKENIZERS = {"byte_level": byte_level(), "sentence_piece": sentence_piece()}
LETTERS = st.characters(max_codepoint=0xDFFF, exclude_categories=("Cs", "Cc", "Co", "Cn"))
TABLES = {name: surfaces(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def check_is_the_text(tokenizer: Any, table: list[bytes | None], text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(table[i] or b"?" for i in ids) == text.encode()


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=40)
@given(
    text=st.text(alphabet=st.characters(max_codepoint=0xDFFF, exclude_categories=("Cs", "Cc", "Co", "Cn")), max_size=30)
)
def test_the_tokens_of_a_text_are_the_text(name: str, text: str) -> None:
    text = text.replace("▁", "")  # a space in one of them
    check_is_the_text(TOKENIZERS[name], TABLES[name], text)
    ids = Speller(TABLES[name]).spell(text.encode())
    assert ids is not None
    assert b"".join(TABLES[name][i] or b"?" for i in ids) == text.encode()


def test_a_letter_read_as_itself_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surface, "_letters", lambda: {chr(i): i & 255 for i in range(512)})
    with pytest.raises(AssertionError):
        check_is_the_text(TOKENIZERS["byte_level"], surfaces(TOKENIZERS["byte_level"]), "“a”")


def test_the_longest_token_comes_first_and_a_missing_byte_is_told() -> None:
    speller = Speller([b"a", b"ab", b"b", None])
    assert speller.spell(b"aba") == [1, 0]
    assert speller.spell(b"abc") is None


def test_special_tokens_stand_for_nothing_and_other_kinds_are_refused() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert TABLES["byte_level"][tokenizer.eos_token_id] is None
    with pytest.raises(InputError, match="neither byte-level"):
        surfaces(word_tokenizer(["a b"]))
