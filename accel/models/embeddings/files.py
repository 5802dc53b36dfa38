"""Embedding files as they are asked for: which file, and the token that stands for it in prompts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from ...errors import UserError

WEIGHT_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")  # of diffusers' folders
_EXAMPLE = "such as 'toy.safetensors', 'toy.safetensors=<toy>' or ('toy.safetensors', '<toy>')"


@dataclass(frozen=True)
class EmbeddingFile:
    """A file of learned vectors.

    Attributes:
        path: the file.
        token: what stands for it in prompts; None for what the file says, or else its name.
    """

    path: Path
    token: str | None = None


Spec = Union[str, "os.PathLike[str]", EmbeddingFile, Sequence[Any]]


def embedding_file(spec: Spec) -> EmbeddingFile:
    """What is meant by `FILE`, `FILE=TOKEN` or (FILE, TOKEN); a folder stands for diffusers' file in it.

    Raises:
        UserError: when there is no such file, or the token is not text.
    """
    if isinstance(spec, EmbeddingFile):
        return spec
    if isinstance(spec, (str, os.PathLike)):
        text = os.fspath(spec)
        if Path(text).exists() or "=" not in text:
            return _made(text, None)
        # A token may hold a = and so may a file's name: the shortest name of something that is there counts.
        cuts = [(text[: found.start()], text[found.end() :]) for found in re.finditer("=", text)]
        return _made(*next((cut for cut in cuts if Path(cut[0]).expanduser().exists()), cuts[0]))
    if isinstance(spec, Sequence) and len(spec) == 2:
        return _made(spec[0], spec[1])
    raise UserError(f"invalid embedding: {spec!r:.200}", _EXAMPLE)


def embedding_files(specs: Spec | Sequence[Spec] | None) -> tuple[EmbeddingFile, ...]:
    """Several of them; a single one is taken too, and None for none.

    Raises:
        UserError: as `embedding_file`.
    """
    if specs is None:
        return ()
    if isinstance(specs, (str, os.PathLike, EmbeddingFile)):
        specs = [specs]
    if not isinstance(specs, Sequence):
        raise UserError(f"invalid embeddings: {specs!r:.200} (expected a list)", _EXAMPLE)
    return tuple(embedding_file(spec) for spec in specs)


def _made(path: Any, token: Any) -> EmbeddingFile:
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"invalid embedding file: {path!r:.200}", _EXAMPLE)
    file = Path(path).expanduser()
    if file.is_dir():
        file = next((file / name for name in WEIGHT_NAMES if (file / name).is_file()), file / WEIGHT_NAMES[0])
    if not file.is_file():
        raise UserError(f"no such embedding file: {file}", "give a .safetensors, .pt or .bin file of textual inversion")
    if token is not None:
        check_token(token, file)
    return EmbeddingFile(file, token)


def check_token(token: Any, file: Path) -> None:
    """Refuse what cannot be a token in a prompt.

    Raises:
        UserError: for no text, no printable text, or more than 200 characters.
    """
    if not isinstance(token, str) or not token.strip() or len(token) > 200 or not token.isprintable():
        raise UserError(f"{file}: {token!r:.80} cannot be a token", f"name one: '{file}=<{file.stem:.40}>'")
    if token != token.strip():
        raise UserError(f"{file}: the token {token!r} begins or ends with a space", f"name it {token.strip()!r}")
