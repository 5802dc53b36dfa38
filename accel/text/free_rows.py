"""Rows of a text encoder's token table that no text reaches: where learned vectors can lie without a larger table."""

from __future__ import annotations

import json

from tokenizers import Tokenizer

_END_OF_WORD = "</w>"
# Bytes that remain unused: UTF-8 has none of these (RFC 3629), and in lower case no text has a capital letter of ASCII.
_BYTES = (*range(ord("A"), ord("Z") + 1), 0xC0, 0xC1, *range(0xF5, 0x100))
# Byte-level encoding (GPT-2's, which CLIP's tokenizer uses) writes each of these bytes as the character of its number.
UNREACHABLE = frozenset(map(chr, _BYTES))


def free_rows(backend: Tokenizer, below: int) -> tuple[int, ...]:
    """The ids of tokens that no text is encoded to, in ascending order.

    Byte-pair encoding only joins: a token is made of characters of its text, and an end-of-word mark. One that is
    written with a byte which the normalised text never contains is never made. That holds for byte-level encoding after
    a lower-case normaliser; of any other tokenizer nothing is known, and there are none. CLIP's vocabulary has 78: 26
    capital letters and 13 bytes, each with and without the end-of-word mark.

    Args:
        backend: the tokenizer.
        below: only ids below this one. With the end token's id, the highest id of a prompt stays the end token's, by
            which some text encoders find the end (transformers' CLIP with `eos_token_id` 2).
    """
    content = json.loads(backend.to_str())
    model = content["model"]
    steps = _types(content["normalizer"], "normalizers"), _types(content["pre_tokenizer"], "pretokenizers")
    plain = model["type"] == "BPE" and not model.get("byte_fallback") and not model.get("continuing_subword_prefix")
    plain = plain and model.get("end_of_word_suffix") == _END_OF_WORD
    if not plain or "Lowercase" not in steps[0] or "ByteLevel" not in steps[1]:
        return ()
    others = {token["content"] for token in content["added_tokens"]} | {model.get("unk_token")}
    found = (
        number
        for token, number in model["vocab"].items()
        if token not in others and UNREACHABLE.intersection(token.removesuffix(_END_OF_WORD))
    )
    return tuple(sorted(number for number in found if number < below))


def _types(step: dict | None, several: str) -> list[str]:
    """The kinds of a step, or of the steps of a sequence."""
    step = step or {}
    return [one["type"] for one in (step.get(several, []) if step.get("type") == "Sequence" else [step]) if one]
