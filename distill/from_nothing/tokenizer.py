"""The tokenizer of a pipeline that is trained from nothing: CLIP's, with merges learned from the prompts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

START, END = "<|startoftext|>", "<|endoftext|>"


def learn_merges(corpus: Iterable[str], most: int | None = None) -> list[tuple[str, str]]:
    """Byte pair encoding (Sennrich et al. 2016) of `most` merges, or until every word of the corpus is one token.

    The most frequent neighbouring pair is merged first; ties go to the alphabet, so that the result is always the same.
    """
    counts = Counter(corpus)
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += counts[word]
        if not pairs or len(merges) == most:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merged(parts, best) for word, parts in spelled.items()}


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for part in parts:
        # A part made by this very merge is longer than pair[0], so it cannot be merged a second time here.
        if result and (result[-1], part) == pair:
            result[-1] = "".join(pair)
        else:
            result.append(part)
    return result


def write_tokenizer(folder: Path, words: Iterable[str], merges: int | None = None) -> Any:
    """Write a complete `CLIPTokenizer` to a folder and load it.

    The vocabulary is laid out as CLIP's: 256 bytes, 256 bytes that end a word, merges, start, end. So any text at all
    has tokens, and the words of the prompts, as long as merges are not limited, have one each.

    Args:
        words: every word of every prompt in ASCII, with repetitions.
        merges: at most so many; None for as many as it takes.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    learned = learn_merges(words, merges)
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in learned), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in learned)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=77,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    # Which of the files the library writes differs between its versions; the three above are there in any case.
    tokenizer.save_pretrained(folder)
    return tokenizer


def token_ids(tokenizer: Any, texts: list[str], length: int = 77) -> torch.Tensor:
    """Token ids [len(texts), length], padded as the pipeline pads them."""
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
