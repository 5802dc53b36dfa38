"""Embeddings at run time: vectors in rows of a bundle's token table that no text reaches.

The table of a graph has a fixed number of rows, so learned vectors overwrite rows that stay unused
(`accel.text.free_rows`), and the tokenizer reads the learned tokens as those rows. Engines get the table as one more
tensor that is not the bundle's own (`Engine.set_weights`), as with LoRA files, and both go together.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...errors import Notice, UserError
from ...files import read_json
from ...text.free_rows import free_rows
from ...text.tokenizer import ClipTokenizer
from ..lora.for_bundle import Tensors, own
from .files import Spec, embedding_files
from .reading import Embedding, check_tokens, fitting

_TABLE = "token_embedding.weight"  # the end of the table's name in every text encoder


@dataclass(frozen=True)
class Placed:
    """Embeddings, and where they lie in a bundle.

    Attributes:
        embeddings: what was read.
        rows: text encoder -> token -> the row of its table that holds the token's vector.
    """

    embeddings: tuple[Embedding, ...] = ()
    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def tensors(self, bundle: Bundle, changed: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """The tensors that engines run with instead of the bundle's own.

        Args:
            changed: component -> tensors that are not the bundle's own already, such as those of LoRA files.

        Raises:
            UserError: for vectors that the bundle's dtype cannot hold.
        """
        return {**changed, **{name: self._with_rows(bundle, name, changed.get(name, {})) for name in self.rows}}

    def _with_rows(self, bundle: Bundle, component: str, changed: Tensors) -> Tensors:
        tensors = own(bundle, bundle.component(component))
        name = next((name for name in tensors if name.endswith(_TABLE)), "")
        if not name or tensors[name].dtype.kind != "f":
            what = f"stored as {tensors[name].dtype}" if name else "not found"
            raise UserError(
                f"the token table of the {component} is {what}, and cannot take an embedding", self._export(bundle)
            )
        table = np.array(changed.get(name, tensors[name]))
        with np.errstate(over="ignore"):
            for token, vector in self._vectors(component):
                table[self.rows[component][token]] = vector.astype(table.dtype)
                if not np.isfinite(table[self.rows[component][token]]).all():
                    raise UserError(
                        f"the vector of {token!r} does not fit {table.dtype}, which the {component} is stored in",
                        "a bundle of --precision fp32",
                    )
        return {**changed, name: table}

    def _vectors(self, component: str) -> Iterator[tuple[str, np.ndarray]]:
        for embedding in self.embeddings:
            yield from zip(embedding.tokens, embedding.vectors[component], strict=True)

    def _export(self, bundle: Bundle) -> str:
        return _export(bundle, self.embeddings)


def placed(bundle: Bundle, specs: Spec | Sequence[Spec] | None, tokenizers: Mapping[str, ClipTokenizer]) -> Placed:
    """Read embedding files and find room for them. No weights are read.

    Args:
        tokenizers: text encoder of the bundle -> its own tokenizer.

    Raises:
        UserError: for a file that cannot be read or does not fit, a token that is there already, or more vectors than
            there are rows.
    """
    if not (files := embedding_files(specs)):
        return Placed()
    configs: dict[str, Any] = {
        name: read_json(bundle.file(f"{name}/config.json"), f"the config of the {name}") for name in tokenizers
    }
    embeddings = fitting(files, {name: config.get("hidden_size", 512) for name, config in configs.items()})
    rows = {}
    for name, tokenizer in tokenizers.items():
        backend = tokenizer.backend
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        check_tokens(embeddings, backend.get_vocab(with_added_tokens=True), added)
        tokens = [token for embedding in embeddings for token in embedding.tokens]
        free = free_rows(backend, min(tokenizer.eos, configs[name].get("vocab_size", tokenizer.eos)))
        if len(tokens) > len(free):
            raise UserError(
                f"the embeddings have {len(tokens)} vectors, and the token table of the {name} has {len(free)} rows "
                "that no text reaches",
                _export(bundle, embeddings),
            )
        rows[name] = dict(zip(tokens, free, strict=False))
    if configs.get("text_encoder_2", {}).get("eos_token_id") == 2:
        text = (
            "the pooled text is read at the end of the prompt; diffusers and an export with --embedding read it at the "
        )
        warnings.warn(f"{text}learned token (eos_token_id 2 in text_encoder_2/config.json)", Notice, stacklevel=4)
    return Placed(embeddings, rows)


def _export(bundle: Bundle, embeddings: Sequence[Embedding]) -> str:
    """How to get these embeddings into a bundle for good."""
    model = bundle.path if hasattr(bundle, "source") else bundle.manifest.source["name"]
    files = [shlex.quote(f"{embedding.file.path}={embedding.token}") for embedding in embeddings]
    return f"accel export {shlex.quote(str(model))} BUNDLE --embedding {' --embedding '.join(files)}"
