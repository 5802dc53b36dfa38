"""Textual inversion: files of learned token vectors, at export and at run time."""

from .files import EmbeddingFile, embedding_file, embedding_files
from .reading import Embedding, fitting

__all__ = ["Embedding", "EmbeddingFile", "embedding_file", "embedding_files", "fitting"]
