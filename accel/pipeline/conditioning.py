"""Conditioning of the UNet: prompts to token ids and text embeddings, SDXL's pooled embedding and sizes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..arrays import concat
from ..engines import Engine
from ..errors import Notice, UserError
from ..text.prompts import tokens
from ..text.tokenizer import ClipTokenizer


def tokenize(
    tokenizer: ClipTokenizer, prompts: Sequence[str], *, chunks: int = 1, weighted: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 and weights float32, [prompts, chunks, 77]; warns with the words that do not fit."""
    made = [tokens(tokenizer, prompt, chunks=chunks, weighted=weighted) for prompt in prompts]
    for row in made:
        if row.dropped:
            warnings.warn(
                f"the prompt is too long for the text encoder; ignored: {row.dropped!r}", Notice, stacklevel=3
            )
    return np.stack([row.ids for row in made]), np.stack([row.weights for row in made])


def encode(
    encoders: Mapping[str, tuple[ClipTokenizer, Engine]],
    prompts: Sequence[str],
    *,
    chunks: int = 1,
    weighted: bool = False,
    clip_skip: int = 0,
) -> dict[str, Any]:
    """Text embeddings of prompts.

    Args:
        encoders: one (tokenizer, engine) for SD1.x, SD2.x and SDXL's refiner; two for SDXL, in order.
        prompts: N texts.
        chunks: number of contexts of 77 tokens that the UNet takes.
        weighted: whether `(words:1.3)` counts (`accel.text.prompts`).
        clip_skip: how many of the encoders' last layers to do without, as diffusers counts them.

    Returns:
        `encoder_hidden_states` [N, chunks * 77, D]; for SDXL also `text_embeds` [N, P], the second encoder's pooled
        output of the first context.
    """
    hidden, pooled = [], None
    for tokenizer, engine in encoders.values():
        ids, weights = tokenize(tokenizer, prompts, chunks=chunks, weighted=weighted)
        outputs = _run(engine, ids.reshape(-1, ids.shape[-1]))
        # SDXL reads the last but one hidden state of its encoders (arXiv 2307.01952, section 2.1).
        layers = sum(name.startswith("hidden_states.") for name in outputs)
        name = hidden_state(layers, clip_skip)
        states = outputs[name]
        if (weights != 1).any():
            empty = _run(engine, tokenize(tokenizer, [""])[0][:, 0])[name]
            states = empty + engine.array(weights.reshape(-1, weights.shape[-1], 1)) * (states - empty)
        hidden.append(states.reshape(len(prompts), -1, states.shape[-1]))
        if layers and "text_embeds" in outputs:
            pooled = outputs["text_embeds"][::chunks]
    made = {"encoder_hidden_states": hidden[0] if len(hidden) == 1 else concat(hidden, axis=-1)}
    return made if pooled is None else made | {"text_embeds": pooled}


def hidden_state(layers: int, clip_skip: int) -> str:
    """The output of a text encoder that prompts are taken from.

    Args:
        layers: how many `hidden_states.N` it has: all of SDXL's encoders, none of others.
    """
    if layers:
        return f"hidden_states.{layers - 1 - clip_skip}"
    return f"clip_skip.{clip_skip}" if clip_skip else "last_hidden_state"


def _run(engine: Engine, ids: np.ndarray) -> dict[str, Any]:
    """The text encoder on any number of rows, within its own batch limits; too small a batch is filled up."""
    limits, count = engine.component.dims["images"], len(ids)
    ids = np.pad(ids, ((0, max(0, limits.min - (count % limits.max or limits.max))), (0, 0)), mode="edge")
    runs = [engine(input_ids=ids[i : i + limits.max]) for i in range(0, len(ids), limits.max)]
    made = runs[0] if len(runs) == 1 else {name: concat([run[name] for run in runs]) for name in runs[0]}
    return {name: value[:count] for name, value in made.items()}


def time_ids(
    images: int,
    size: Sequence[int],
    original: Sequence[int] | None = None,
    crop: Sequence[int] = (0, 0),
    target: Sequence[int] | None = None,
) -> np.ndarray:
    """SDXL's size conditioning (arXiv 2307.01952, section 2.2): float32 [images, 6].

    Args:
        size: height and width of the image in pixels.
        original: size of the image before it was cropped; None for its own.
        crop: top and left of the crop.
        target: size it was cropped to; None for its own.
    """
    row = [*(original or size), *crop, *(target or size)]
    _check_sizes(row)
    return np.tile(np.array(row, np.float32), (images, 1))


def _check_sizes(row: Sequence[float]) -> None:
    if len(row) != 6 or not all(isinstance(n, (int, float, np.number)) and n >= 0 for n in row):
        fix = "give (height, width) of the sizes, and (top, left) of the crop"
        raise UserError(f"invalid size conditioning: {row} (expected six numbers >= 0)", fix)


def scored_time_ids(
    images: int, size: Sequence[int], original: Sequence[int] | None, crop: Sequence[int], scores: Sequence[float]
) -> np.ndarray:
    """An SDXL refiner's size conditioning: original size, crop and aesthetic score, float32 [scores * images, 5].

    Args:
        scores: aesthetic scores (LAION's, 1 to 10): with guidance that of the rows without a prompt first.
    """
    row = [*(original or size), *crop]
    _check_sizes([*row, 0, 0])
    return np.repeat(np.array([[*row, score] for score in scores], np.float32), images, axis=0)


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
