"""Textual inversion: files of learned token vectors, at export and at run time."""

from .files import EmbeddingFile, embedding_file, embedding_files
from .files import Spec as EmbeddingSpec
from .reading import Embedding, fitting

__all__ = ["Embedding", "EmbeddingFile", "EmbeddingSpec", "embedding_file", "embedding_files", "fitting"]
