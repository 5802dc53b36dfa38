"""Prompts to what the UNet is conditioned on: token ids, text embeddings, SDXL's pooled embedding and sizes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .arrays import concat
from .engines import Engine
from .errors import Notice, UserError
from .tokenizer import ClipTokenizer


def tokenize(tokenizer: ClipTokenizer, prompts: Sequence[str]) -> np.ndarray:
    """Token ids int64 [prompts, 77]; warns with the words that do not fit."""
    rows = []
    for prompt in prompts:
        ids, dropped = tokenizer.encode(prompt)
        if dropped:
            warnings.warn(f"the prompt is too long for the text encoder; ignored: {dropped!r}", Notice, stacklevel=3)
        rows.append(ids)
    return np.asarray(rows, dtype=np.int64)


def encode(encoders: Mapping[str, tuple[ClipTokenizer, Engine]], prompts: Sequence[str]) -> dict[str, Any]:
    """Text embeddings of prompts.

    Args:
        encoders: one (tokenizer, engine) for SD1.x and SD2.x; two for SDXL, in order.
        prompts: N texts.

    Returns:
        `encoder_hidden_states` [N, tokens, D]; for SDXL also `text_embeds` [N, P], the second encoder's pooled output.
    """
    hidden, pooled = [], None
    for tokenizer, engine in encoders.values():
        outputs = engine(input_ids=tokenize(tokenizer, prompts))
        if len(encoders) == 1:
            return {"encoder_hidden_states": outputs["last_hidden_state"]}
        # SDXL reads the last but one hidden state of both encoders (arXiv 2307.01952, section 2.1).
        layers = sum(name.startswith("hidden_states.") for name in outputs)
        hidden.append(outputs[f"hidden_states.{layers - 1}"])
        pooled = outputs.get("text_embeds", pooled)
    return {"encoder_hidden_states": concat(hidden, axis=-1), "text_embeds": pooled}


def time_ids(
    images: int, size: Sequence[int], original: Sequence[int] | None = None, crop: Sequence[int] = (0, 0),
    target: Sequence[int] | None = None,
) -> np.ndarray:
    """SDXL's size conditioning (arXiv 2307.01952, section 2.2): float32 [images, 6].

    Args:
        size: height and width of the picture in pixels.
        original: size of the picture before it was cropped; None for its own.
        crop: top and left of the crop.
        target: size it was cropped to; None for its own.
    """
    row = [*(original or size), *crop, *(target or size)]
    if len(row) != 6 or not all(isinstance(n, (int, float, np.number)) and n >= 0 for n in row):
        raise UserError(f"size conditioning {row} makes no sense", "give (height, width), and (top, left) for the crop")
    return np.tile(np.array(row, np.float32), (images, 1))


def guidance_embedding(images: int, guidance: float, width: int) -> np.ndarray:
    """The guidance scale as a sinusoidal embedding, for consistency models that take it as an input.

    LCM (arXiv 2310.04378): w = guidance - 1, scaled by 1,000, like a timestep. Returns float32 [images, width].
    """
    half = width // 2
    frequencies = np.exp(-np.log(10000.0) / (half - 1) * np.arange(half))
    angles = 1000.0 * (guidance - 1.0) * frequencies
    embedding = np.concatenate([np.sin(angles), np.cos(angles)])
    embedding = np.pad(embedding, (0, width - len(embedding)))
    return np.tile(embedding.astype(np.float32), (images, 1))
