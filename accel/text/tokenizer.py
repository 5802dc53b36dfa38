"""CLIP's tokenizer from a diffusers `tokenizer/` folder, on the `tokenizers` package alone.

Byte-pair encoding over bytes with an end-of-word mark (CLIP, arXiv 2103.00020; BPE, arXiv 1508.07909): text is NFC,
runs of white space become one space, lower case, split into words, numbers digit by digit, and runs of punctuation.
A prompt becomes [start, tokens, end, padding...] of a fixed length, 77 for every Stable Diffusion.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from ..errors import UserError
from ..files import parse_json, read_bytes

_LENGTH = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"
# In transformers' order: one text may play several roles, and the last one decides how it is matched in a prompt.
_SPECIAL = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_PLAIN_WORDS = _WORDS.removeprefix(r"<\|startoftext\|>|<\|endoftext\|>|")
_PATTERNS = [{"Regex": pattern} for pattern in (r"\s+", _WORDS, _PLAIN_WORDS)]
_STEPS = {"normalizer": ("NFC", "Replace", "Lowercase"), "pre_tokenizer": ("Split", "ByteLevel")}
_BYTES, _LONGEST = 16 << 20, 4096
_FIX = "copy the tokenizer folder of the original pipeline again"


@dataclass(frozen=True, eq=False, kw_only=True)
class ClipTokenizer:
    """Prompts to token ids.

    Attributes:
        backend: the byte-pair encoder; adds no special tokens and does not cut or pad.
        bos, eos, pad: ids of start, end and padding; CLIP pads with its end token, SDXL's second encoder with `!`.
        length: number of ids of every prompt.
        several: what stands for a token of several vectors (textual inversion, arXiv 2208.01618): its id and those of
            its further ones, `TOKEN_1`, `TOKEN_2`, ..., as diffusers' `maybe_convert_prompt` writes them.
    """

    backend: Tokenizer
    bos: int
    eos: int
    pad: int
    length: int = _LENGTH
    several: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, path: str | Path, listed: Collection[str] | None = None) -> ClipTokenizer:
        """Reads `tokenizer.json`, or else `vocab.json` and `merges.txt`, with the configs that lie beside them.

        Args:
            path: the folder.
            listed: names of the files that may be read; None for all.

        Raises:
            UserError: naming the file that is missing, damaged or not of a CLIP tokenizer.
        """
        folder = Path(path)

        def has(name: str) -> bool:
            return (listed is None or name in listed) and (folder / name).exists()

        config = _json(folder / "tokenizer_config.json") if has("tokenizer_config.json") else {}
        special = (_json(folder / "special_tokens_map.json") if has("special_tokens_map.json") else {}) | config
        file = folder / "tokenizer.json"
        if has("tokenizer.json"):
            backend = _backend_from_json(file)
        else:
            file = folder / "vocab.json"
            backend = _backend_from_vocabulary(file, folder / "merges.txt")
        tokens = {role: _added_token(special.get(role) or default, file) for role, default in _SPECIAL.items()}
        for role, token in tokens.items():
            if backend.token_to_id(token.content) is None:
                fix = "use the tokenizer folder of a CLIP text encoder"
                raise UserError(f"{file} has no {role} {token.content!r}", fix)
        # Padding is a special token too: for SDXL's second encoder a `!` in a prompt is the id of `!`, not of `!</w>`.
        added = config.get("added_tokens_decoder") or {}
        if not isinstance(added, dict) or len(added) > 1000:
            raise UserError(f"{folder}: added_tokens_decoder is not a table of at most 1000 tokens", _FIX)
        for group in ([_added_token(token, file) for token in added.values()], list(tokens.values())):
            known = {token.content for token in backend.get_added_tokens_decoder().values()}
            backend.add_special_tokens([token for token in group if token.content not in known])
        ids = {role: backend.token_to_id(token.content) for role, token in tokens.items()}
        return cls(
            backend=backend,
            bos=ids["bos_token"],
            eos=ids["eos_token"],
            pad=ids["pad_token"],
            length=_length(folder / "tokenizer_config.json", config),
            several=_several({token.content: i for i, token in backend.get_added_tokens_decoder().items()}),
        )

    def with_tokens(self, rows: Mapping[str, int]) -> ClipTokenizer:
        """A tokenizer that reads learned tokens too (textual inversion), each as a row of the text encoder's table.

        Args:
            rows: token -> its row; TOKEN, TOKEN_1, TOKEN_2, ... are the vectors of one token, as in `several`.
        """
        if not rows:
            return self
        backend = Tokenizer.from_str(self.backend.to_str())
        backend.add_tokens(list(rows))
        several = _several(rows)
        own = {backend.token_to_id(token): several.get(row, (row,)) for token, row in rows.items()}
        return replace(self, backend=backend, several={**self.several, **own})

    def encode(self, prompt: str) -> tuple[np.ndarray, str]:
        """(ids int64 [length], the end of the prompt that did not fit). Whoever drops text should say so."""
        if not isinstance(prompt, str):
            raise UserError(f"a prompt is text, not {type(prompt).__name__}", "pass a str")
        found, room = self.pieces(prompt), self.length - 2
        dropped = prompt[found[room][1] :] if len(found) > room else ""
        ids = np.full(self.length, self.pad, dtype=np.int64)
        kept = [self.bos, *(i for i, _ in found[:room]), self.eos]
        ids[: len(kept)] = kept
        return ids, dropped

    def pieces(self, text: str) -> list[tuple[int, int]]:
        """Every token of a text without start and end: its id, and where it begins in the text."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        each = zip(encoding.ids, encoding.offsets, strict=True)
        return [(one, place[0]) for i, place in each for one in self.several.get(i, (i,))]

    def __call__(self, prompts: str | Sequence[str]) -> np.ndarray:
        """ids int64 [B, length]; what does not fit is cut silently, `encode` returns it."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return np.stack([self.encode(p)[0] for p in prompts]) if len(prompts) else np.empty((0, self.length), np.int64)


def _several(added: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """The ids of each added token that others of its name continue."""
    found = {}
    for token, number in added.items():
        more = list(takewhile(added.__contains__, (f"{token}_{i}" for i in count(1))))
        if more:
            found[number] = (number, *map(added.__getitem__, more))
    return found


def _backend_from_json(file: Path) -> Tokenizer:
    text = _json(file)
    if problem := _unusual(text):
        raise UserError(
            f"{file} has {problem}, unlike CLIP tokenizers; refused: it could take any time or memory", _FIX
        )
    try:
        backend = Tokenizer.from_str(json.dumps(text))
    except Exception as error:  # the package raises bare Exception
        raise UserError(f"{file} cannot be read: {error}", _FIX) from None
    if not isinstance(backend.model, models.BPE) or backend.model.end_of_word_suffix != "</w>":
        raise UserError(f"{file} is not a CLIP tokenizer", "use the folder of a CLIP text encoder's tokenizer")
    backend.no_truncation()
    backend.no_padding()
    return backend


def _unusual(content: Mapping[str, Any]) -> str:
    """The first step of a `tokenizer.json` before the vocabulary that CLIP's tokenizers do not have; "" for none."""
    for key, known in _STEPS.items():
        step = content.get(key) or {}
        sequence = isinstance(step, dict) and step.get("type") == "Sequence"
        steps = step.get(f"{key.replace('_', '')}s") if sequence else [step]
        for one in steps if isinstance(steps, list) and len(steps) <= 8 else ["too many steps"]:
            if not isinstance(one, dict) or one and one.get("type") not in known:
                return f"the {key} {one!r:.80}"
            pattern = one.get("pattern")
            if pattern is not None and (pattern not in _PATTERNS or one.get("content", " ") != " "):
                return f"the {key} pattern {pattern!r:.80}"
    return ""


def _backend_from_vocabulary(vocab_file: Path, merges_file: Path) -> Tokenizer:
    vocab = _json(vocab_file)
    if not all(isinstance(v, int) for v in vocab.values()):
        raise UserError(f"{vocab_file} must map tokens to numbers", _FIX)
    merges = [tuple(line.split()) for line in _read(merges_file).split("\n")]
    if merges[0] and merges[0][0].startswith("#version"):
        merges = merges[1:]
    merges = [pair for pair in merges if pair]
    wrong = next((pair for pair in merges if len(pair) != 2), None)
    if wrong:
        raise UserError(f"{merges_file}: a merge is two tokens, found {' '.join(wrong)!r}", _FIX)
    try:
        model = models.BPE(
            vocab=vocab, merges=merges, unk_token=_END, end_of_word_suffix="</w>", continuing_subword_prefix=""
        )
    except Exception as error:  # the package raises bare Exception
        raise UserError(f"{merges_file} does not fit {vocab_file.name}: {error}", _FIX) from None
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


def _added_token(value: Any, file: Path) -> AddedToken:
    """A special token as configs write it: the text, or a mapping with its matching flags."""
    if isinstance(value, str):
        return AddedToken(value, normalized=False, special=True)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise UserError(f"{file.parent}: {value!r:.80} is not a token", _FIX)
    flags = {k: bool(value[k]) for k in ("single_word", "lstrip", "rstrip", "normalized") if k in value}
    return AddedToken(str(value.get("content")), special=True, **flags)


def _length(file: Path, config: Mapping[str, Any]) -> int:
    value = config.get("model_max_length", _LENGTH)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 2:
        raise UserError(f"{file}: model_max_length = {value!r} is not a length", f"set it to {_LENGTH}")
    return min(int(value), _LONGEST) if value < 1e6 else _LENGTH  # an absurd number is how configs write "not known"


def _read(file: Path) -> str:
    if not file.exists():
        raise UserError(f"{file} is missing", _FIX)
    try:
        return read_bytes(file, "the tokenizer's file", _BYTES).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} cannot be read: {error}", _FIX) from None


def _json(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(_read(file))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text: UnicodeEncodeError
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}", _FIX) from None
    if not isinstance(value, dict):
        raise UserError(f"{file} does not hold a JSON object", _FIX)
    return value
