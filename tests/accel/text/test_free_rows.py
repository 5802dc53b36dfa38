"""Rows that no text reaches: none is ever read, and everything else can be."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from accel.assets import DIGITS
from accel.text.free_rows import UNREACHABLE, free_rows
from accel.text.tokenizer import ClipTokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("c", "a"), ("ca", "t</w>"), ("A", "B"), ("t", "A</w>"), ("Ã", "©")]
# Capitals of every script, letters that become ASCII by normalisation (the Kelvin sign, ligatures), and the words
# themselves: what would be most likely to reach a row.
ODD = st.sampled_from(
    ["A", "AB", "tA", "A</w>", "Z</w>", "\u212a", "\u212b", "\ufb00", "\u0130", "\u1e9e", "é", "À", "ÿ"]
)
TEXTS = st.lists(st.one_of(ODD, st.text(max_size=8), st.characters(max_codepoint=0x17F)), max_size=12).map("".join)


def written(folder, **changes):
    """A CLIP tokenizer over bytes, with some merges; `changes` to its tokenizer.json."""
    words = [*ALPHABET, *(f"{c}</w>" for c in ALPHABET), *("".join(pair) for pair in MERGES)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES)]))
    made = ClipTokenizer.from_folder(folder)
    if changes:
        content = json.loads(made.backend.to_str())
        for path, value in changes.items():
            *parents, last = path.split("__")
            place = content
            for name in parents:
                place = place[name]
            place[last] = value
        (folder / "tokenizer.json").write_text(json.dumps(content))
        made = ClipTokenizer.from_folder(folder)
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return written(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def digits():
    return ClipTokenizer.from_folder(DIGITS / "teacher/tokenizer")


def test_they_are_capitals_and_bytes_that_utf8_never_has(tokenizer, digits):
    for made, more in ((tokenizer, {"AB", "tA</w>"}), (digits, set())):
        found = {made.backend.id_to_token(row) for row in free_rows(made.backend, made.eos)}
        assert found == {c + end for c in UNREACHABLE for end in ("", "</w>")} | more
        assert len(found) == 78 + len(more) and {"A", "Z</w>", "\xc0", "\xff</w>"} <= found


@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
def test_no_text_reaches_one(tokenizer, digits, text):
    for made in (tokenizer, digits):
        free = set(free_rows(made.backend, made.eos))
        assert not free & {i for i, _ in made.pieces(text)}
        assert not free & set(made.encode(text)[0].tolist())


def test_every_other_byte_is_reached_by_some_text(tokenizer):
    """The rows are all that there are: each other single byte is a token of some text."""
    reached: set[str] = set()
    for text in [chr(c) for c in range(0x500)] + [
        chr(c) for c in range(0x500, 0x110000, 61) if not 0xD800 <= c < 0xE000
    ]:
        for form in (text, f"{text}{text}", f"a{text}a"):
            reached |= {tokenizer.backend.id_to_token(i) for i, _ in tokenizer.pieces(form)}
    bytes_ = {byte for byte in ALPHABET if {byte, f"{byte}</w>"} & reached}
    spaces = {pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(c)[0][0] for c in "\t\n\x0b\x0c\r "}
    assert set(ALPHABET) - bytes_ - UNREACHABLE <= spaces | {"\u0120"}


def test_an_added_token_is_not_free_and_none_lies_behind_the_end(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens(["A", "new"])
    assert backend.token_to_id("A") not in free_rows(backend, tokenizer.eos)
    assert free_rows(tokenizer.backend, 40) == tuple(i for i in free_rows(tokenizer.backend, 999) if i < 40)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": None},
        {"pre_tokenizer": None},
        {"model__byte_fallback": True},
        {"model__continuing_subword_prefix": "A", "model__merges": []},
    ],
)
def test_of_another_tokenizer_nothing_is_known(tmp_path, changes):
    made = written(tmp_path, **changes)
    assert free_rows(made.backend, made.eos) == ()


def test_the_unknown_token_is_not_free(tmp_path):
    made = written(tmp_path, model__unk_token="A")
    rows = free_rows(made.backend, made.eos)
    assert rows and made.backend.token_to_id("A") not in rows
