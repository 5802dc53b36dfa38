"""Files of textual inversion, as diffusers, A1111's web UI and trainers of SDXL write them, read for a model."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import MissingPackage, UserError
from ...files import sha256
from .. import weight_files
from .files import EmbeddingFile, Spec, check_token, embedding_files

MOST_VECTORS = 75  # tokens of a prompt: the 77 of CLIP's context without start and end
_MOST_BYTES = 64 << 20  # 75 vectors of SDXL's two encoders are 0.6 MB; pickles may hold an optimizer's state besides
# The two text encoders of SDXL, by the names that its files give them.
_SDXL = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_KNOWN = "known: diffusers' {token: vectors}, A1111's .pt and .safetensors, SDXL's clip_l with clip_g"
_MADE_FOR = {768: "SD1.x", 1024: "SD2.x", 1280: "SDXL's second text encoder"}


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learned token.

    Attributes:
        file: where it comes from.
        token: what stands for it in prompts.
        vectors: component (`text_encoder`, `text_encoder_2`) -> its vectors, float32 [n, width], the same n for both.
    """

    file: EmbeddingFile
    token: str
    vectors: Mapping[str, np.ndarray]

    @property
    def tokens(self) -> tuple[str, ...]:
        """A token for each vector, as diffusers names them: TOKEN, TOKEN_1, TOKEN_2, ..."""
        count = len(next(iter(self.vectors.values())))
        return (self.token, *(f"{self.token}_{i}" for i in range(1, count)))

    def record(self) -> dict[str, Any]:
        """What a manifest and a digest record."""
        file = {"name": self.file.path.name, "sha256": sha256(self.file.path)}
        return file | {"token": self.token, "vectors": len(self.tokens)}

    def __str__(self) -> str:
        return f"{self.token} ({self.file.path.name}{f', {len(self.tokens)} vectors' * (len(self.tokens) > 1)})"


def fitting(specs: Spec | Sequence[Spec] | None, widths: Mapping[str, int]) -> tuple[Embedding, ...]:
    """Read embedding files for a model.

    Args:
        specs: the files, each as FILE, FILE=TOKEN or (FILE, TOKEN).
        widths: text encoder -> width of its token vectors: one for SD1.x and SD2.x, two for SDXL.

    Raises:
        UserError: for a file that is missing, damaged, of an unknown kind, or not made for this model.
    """
    return tuple(_fitted(read(file), widths) for file in embedding_files(specs))


def read(file: EmbeddingFile) -> Embedding:
    """One file, its vectors by `clip_l` and `clip_g`, or under "" where they are for a single text encoder.

    Raises:
        UserError: for a file that cannot be read, is of an unknown kind, or holds what cannot be vectors of tokens.
    """
    path = file.path
    if path.suffix not in weight_files.SUFFIXES:
        raise UserError(f"{path} is not an embedding file", f"one of: {', '.join(weight_files.SUFFIXES)}")
    _check_bytes(path)
    name, tensors = _contents(path, weight_files.arrays(path) if _is_safe(path) else _unpickled(path))
    token = name if file.token is None else file.token
    check_token(token, path)
    return Embedding(file, token, {key: _vectors(path, value) for key, value in tensors.items()})


def check_tokens(embeddings: Iterable[Embedding], vocabulary: Collection[str], added: Collection[str]) -> None:
    """Refuse tokens that a tokenizer has already, or that two of the files would share.

    Args:
        vocabulary: every token of the tokenizer.
        added: those of them that stand for themselves wherever they occur: special and learned ones.

    Raises:
        UserError: with another name to give it.
    """
    taken, written = set(vocabulary), {token.lower() for token in added}
    for embedding in embeddings:
        path, reason = embedding.file.path, ""
        names = {*embedding.tokens, f"{embedding.token}_1"}  # which would continue it
        if found := sorted(names & taken):
            reason = f"the tokenizer has a token {found[0]!r} already"
        elif found := sorted(name for name in names if name.lower() in written):
            reason = f"{found[0]!r} and another learned token are the same in lower case, which is what is read"
        if reason:
            other = f"<{embedding.token.strip('<>')}-2>" if embedding.token[0] == "<" else f"<{embedding.token}>"
            raise UserError(f"{path}: {reason}", f"name it otherwise, for example '{path}={other}'")
        taken |= names
        written |= {name.lower() for name in names}


def _is_safe(path: Path) -> bool:
    return path.suffix == weight_files.SAFETENSORS


def _check_bytes(path: Path) -> None:
    """Refuse what cannot be an embedding before it is read: files of whole models, and archives that unpack to such."""
    size = path.stat().st_size
    if size <= _MOST_BYTES and not _is_safe(path) and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
        except (OSError, zipfile.BadZipFile, NotImplementedError):
            pass  # the reader says what is wrong with it
    if size > _MOST_BYTES:
        fix = "a LoRA goes with --lora; a model is what is exported"
        raise UserError(f"{path} has {size:,} bytes, too many for an embedding", fix)


def _unpickled(path: Path) -> Mapping[str, Any]:
    try:
        return weight_files.read_pickle(path)
    except ImportError:
        raise MissingPackage("torch", f"reading {path.name}", "export") from None


def _contents(path: Path, state: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The name that a file gives its token, and its tensors by text encoder ("" where it is for a single one)."""
    if "string_to_param" in state:  # A1111's .pt
        kept, name = state["string_to_param"], state.get("name")
        if not isinstance(kept, Mapping) or len(kept) != 1:
            raise UserError(f"{path}: string_to_param does not hold one tensor", _KNOWN)
        return name if isinstance(name, str) and name.strip() else path.stem, {"": next(iter(kept.values()))}
    if "emb_params" in state:  # A1111's .safetensors
        return path.stem, {"": state["emb_params"]}
    if found := set(state) & set(_SDXL):
        if missing := set(_SDXL) - found:
            raise UserError(f"{path} has {found.pop()} without {missing.pop()}", "get the whole file of the embedding")
        return path.stem, {key: state[key] for key in _SDXL}
    if len(state) != 1:
        names = ", ".join(f"{name!r:.40}" for name in sorted(map(str, state))[:4])
        more = " and more" * (len(state) > 4)
        raise UserError(f"{path} is not an embedding: it holds {len(state)} entries, {names}{more}", _KNOWN)
    ((name, tensor),) = state.items()
    return name, {"": tensor}


def _vectors(path: Path, tensor: Any) -> np.ndarray:
    """float32 [n, width] of a tensor [width] or [n, width]."""
    shape = getattr(tensor, "shape", None)
    if shape is None:
        raise UserError(f"{path} holds a {type(tensor).__name__} where vectors are expected", _KNOWN)
    shape = tuple(shape)
    rows, width = shape if len(shape) == 2 else (1, *shape) if len(shape) == 1 else (0, 0)
    if not rows or not width:
        raise UserError(f"{path}: {list(shape)} is not the shape of token vectors (expected [n, width])", _KNOWN)
    if rows > MOST_VECTORS:
        fix = f"train an embedding of at most {MOST_VECTORS}"
        raise UserError(f"{path} has {rows:,} vectors, and a prompt has room for {MOST_VECTORS} tokens", fix)
    if not isinstance(tensor, np.ndarray):
        if not tensor.is_floating_point() or tensor.device.type != "cpu" or tensor.is_sparse:
            raise UserError(f"{path} holds a tensor of type {tensor.dtype}, not vectors of numbers", _KNOWN)
        tensor = tensor.detach().float().numpy()
    if not np.isfinite(tensor).all():
        raise UserError(f"{path} holds NaN or infinite numbers", "its training failed, or the file is damaged")
    return np.array(tensor, np.float32).reshape(rows, width)


def _fitted(embedding: Embedding, widths: Mapping[str, int]) -> Embedding:
    """The embedding with its vectors by text encoder of this model."""
    path = embedding.file.path
    if len(widths) > 1 and "" in embedding.vectors:
        fix = "an embedding that was trained for SDXL, with clip_l and clip_g"
        made_for = _made_for(embedding.vectors[""])
        raise UserError(
            f"{path} has vectors for one text encoder{made_for}, and this SDXL model has {len(widths)}", fix
        )
    if "text_encoder_2" not in widths and "" not in embedding.vectors:
        (width,) = widths.values()
        family = f", such as one for {_MADE_FOR[width]}" if width in _MADE_FOR else ""
        fix = f"an embedding with vectors of {width} numbers{family}"
        raise UserError(f"{path} is made for SDXL (clip_l and clip_g), and this model has one text encoder", fix)
    names = {"": next(iter(widths))} | _SDXL  # SDXL's refiner has the second one alone
    vectors = {names[key]: value for key, value in embedding.vectors.items() if names[key] in widths}
    for name, value in vectors.items():
        if value.shape[1] != widths[name]:
            raise UserError(
                f"{path} has vectors of {value.shape[1]} numbers{_made_for(value)}, and the {name} of this model "
                f"takes {widths[name]}",
                "an embedding that was trained for a model of this family",
            )
    if len({len(value) for value in vectors.values()}) > 1:
        counts = " and ".join(f"{len(value)} for the {name}" for name, value in vectors.items())
        raise UserError(f"{path} has unequal numbers of vectors: {counts}", "get the file again")
    return replace(embedding, vectors=vectors)


def _made_for(vectors: np.ndarray) -> str:
    """For messages: the model whose vectors are of this width."""
    width = vectors.shape[1]
    return f" (it is made for {_MADE_FOR[width]})" if width in _MADE_FOR else ""
