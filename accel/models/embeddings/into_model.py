"""Embeddings at export: into a pipeline's tokenizers and text encoders, as diffusers' `load_textual_inversion` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...bundle.kinds import KINDS
from ..config_files import clip_tokenizer
from .files import Spec
from .reading import Embedding, check_tokens, fitting

if TYPE_CHECKING:
    from torch import nn

TEXT_ENCODERS = KINDS["text_encoder"].names


def tokenizer_of(component: str) -> str:
    """The tokenizer's folder of a text encoder."""
    return component.replace("text_encoder", "tokenizer")


class Parts(Protocol):
    """A pipeline's parts, such as `accel.models.source.Source`."""

    def has(self, component: str) -> bool: ...

    def config(self, component: str) -> dict[str, Any]: ...

    def folder(self, component: str) -> Path: ...


def learned(specs: Sequence[Spec], source: Parts) -> tuple[Embedding, ...]:
    """Read embedding files for a pipeline.

    Raises:
        UserError: for a file that does not fit, or a token that a tokenizer has already.
    """
    encoders = [name for name in TEXT_ENCODERS if source.has(name)]
    embeddings = fitting(specs, {name: source.config(name).get("hidden_size", 512) for name in encoders})
    for name in encoders:
        tokenizer = clip_tokenizer(source.folder(tokenizer_of(name)), fast=True)
        check_tokens(embeddings, tokenizer.get_vocab(), tokenizer.added_tokens_encoder)
    return embeddings


def add_tokens(folder: Path, embeddings: Sequence[Embedding]) -> None:
    """Add the tokens to a tokenizer's folder, which is written anew."""
    tokenizer = clip_tokenizer(folder, fast=True)
    tokenizer.add_tokens(_tokens(embeddings))
    tokenizer.save_pretrained(folder)


def add_vectors(model: nn.Module, component: str, embeddings: Sequence[Embedding], folder: Path) -> None:
    """Add the vectors to a text encoder, in the rows that its tokenizer gives the tokens.

    Args:
        model: the text encoder, float32; its table grows.
        folder: of the tokenizer as it was, without these tokens.
    """
    import torch

    tokenizer, tokens = clip_tokenizer(folder, fast=True), _tokens(embeddings)
    tokenizer.add_tokens(tokens)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    rows = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    model.resize_token_embeddings(max(rows, max(ids) + 1), mean_resizing=False)  # type: ignore[operator]
    vectors = [torch.from_numpy(embedding.vectors[component]) for embedding in embeddings]
    with torch.no_grad():
        model.get_input_embeddings().weight[ids] = torch.cat(vectors)  # type: ignore[operator]


def _tokens(embeddings: Sequence[Embedding]) -> list[str]:
    return [token for embedding in embeddings for token in embedding.tokens]
