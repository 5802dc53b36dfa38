"""Prompts longer than the text encoder's 77 tokens, and weights of words.

A long prompt becomes several contexts of 75 tokens, each with start and end, which are encoded one by one and laid end
to end: the UNet's cross-attention takes any length. `(words:1.3)` counts by a factor: the embedding of each token is
moved along the line from that of the empty prompt, z = z_empty + w (z - z_empty), as the compel library does it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .tokenizer import ClipTokenizer

_GROUP = re.compile(r"(?<!\\)\(([^()]*?):\s*(-?\d+(?:\.\d*)?|\.\d+)\s*(?<!\\)\)")


@dataclass(frozen=True)
class Tokens:
    """Token ids int64 [chunks, length], a weight for each float32 [chunks, length], and the text that did not fit."""

    ids: np.ndarray
    weights: np.ndarray
    dropped: str


def parts(prompt: str) -> list[tuple[str, float]]:
    r"""A prompt as (text, weight) in order; `\(` and `\)` are plain brackets.

    Raises:
        UserError: for a weight outside 0 to 3.
    """
    found, end = [], 0
    for match in _GROUP.finditer(prompt):
        weight = float(match[2])
        if not 0 <= weight <= 3:
            raise UserError(f"invalid weight: {weight:g} in {match[0]!r} (expected 0 to 3)", "such as (red:1.3)")
        found += [(prompt[end : match.start()], 1.0), (match[1], weight)]
        end = match.end()
    found.append((prompt[end:], 1.0))
    clean = [(text.replace("\\(", "(").replace("\\)", ")"), weight) for text, weight in found]
    return [(text, weight) for text, weight in clean if text.strip()]


def tokens(tokenizer: ClipTokenizer, prompt: str, *, chunks: int = 1, weighted: bool = False) -> Tokens:
    """Token ids of a prompt in `chunks` contexts, each of them with start and end."""
    ids, weights, texts = [], [], []
    for text, weight in parts(prompt) if weighted else [(prompt, 1.0)]:
        pieces = tokenizer.pieces(text)
        ids += [i for i, _ in pieces]
        weights += [weight] * len(pieces)
        texts += [text[start:] for _, start in pieces]
    room = tokenizer.length - 2
    dropped = texts[chunks * room] if len(ids) > chunks * room else ""
    rows = np.full((chunks, tokenizer.length), tokenizer.pad, np.int64)
    factors = np.ones((chunks, tokenizer.length), np.float32)
    for chunk in range(chunks):
        kept = ids[chunk * room : (chunk + 1) * room]
        rows[chunk, : len(kept) + 2] = [tokenizer.bos, *kept, tokenizer.eos]
        factors[chunk, 1 : len(kept) + 1] = weights[chunk * room : (chunk + 1) * room]
    return Tokens(rows, factors, dropped)
