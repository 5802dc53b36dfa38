"""Conditioning of the UNet: prompts to embeddings, SDXL's pooled embedding and sizes, pictures as prompts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import images
from ..arrays import cast, concat
from ..bundle import Manifest
from ..bundle.shape_profiles import Range
from ..engines import Engine
from ..engines.base import to_numpy
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
    how = dict(chunks=chunks, weighted=weighted)
    words = [Tokens.of(tokenizer, prompts, **how) for tokenizer, _ in encoders.values()]
    return encoded([engine for _, engine in encoders.values()], words, (clip_skip,))[clip_skip]


@dataclass(frozen=True)
class Tokens:
    """What a text encoder is shown of N prompts.

    Attributes:
        ids: int64 [N, chunks, 77].
        weights: float32, alike.
        empty: the ids of no prompt, [1, 77].
    """

    ids: np.ndarray
    weights: np.ndarray
    empty: np.ndarray

    @classmethod
    def of(cls, tokenizer: ClipTokenizer, prompts: Sequence[str], *, chunks: int = 1, weighted: bool = False) -> Tokens:
        ids, weights = tokenize(tokenizer, prompts, chunks=chunks, weighted=weighted)
        return cls(ids, weights, tokenize(tokenizer, [""])[0][:, 0])

    @property
    def key(self) -> tuple[Any, ...]:
        """All that it says, to be compared."""
        return self.ids.shape, self.ids.tobytes(), self.weights.tobytes(), self.empty.tobytes()


def encoded(
    engines: Sequence[Engine], words: Sequence[Tokens], clip_skips: Sequence[int] = (0,)
) -> dict[int, dict[str, Any]]:
    """Text embeddings of what each text encoder is shown, in one call of each that takes as many rows.

    Args:
        clip_skips: how many of the last layers to do without; each is a result of its own, of the same calls.

    Returns:
        {clip_skip: as `encode` has it}.
    """
    hidden: dict[int, list[Any]] = {skip: [] for skip in clip_skips}
    pooled = None
    for engine, shown in zip(engines, words, strict=True):
        count, chunks, length = shown.ids.shape
        outputs = _run(engine, shown.ids.reshape(-1, length))
        # SDXL reads the last but one hidden state of its encoders (arXiv 2307.01952, section 2.1).
        layers = sum(name.startswith("hidden_states.") for name in outputs)
        empty = _run(engine, shown.empty) if (shown.weights != 1).any() else None
        for skip, states in hidden.items():
            name = hidden_state(layers, skip)
            made = outputs[name]
            if empty is not None:
                made = empty[name] + engine.array(shown.weights.reshape(-1, length, 1)) * (made - empty[name])
            states.append(made.reshape(count, -1, made.shape[-1]))
        if layers and "text_embeds" in outputs:
            pooled = outputs["text_embeds"][::chunks]
    more = {} if pooled is None else {"text_embeds": pooled}
    return {
        skip: {"encoder_hidden_states": states[0] if len(states) == 1 else concat(states, axis=-1)} | more
        for skip, states in hidden.items()
    }


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


def image_prompts(manifest: Manifest, given: Any, count: int) -> np.ndarray:
    """Pictures for an IP-Adapter (arXiv 2308.06721) as its image encoder is shown them.

    Args:
        given: a picture; a list with one for each of `count` images; or a list of lists of pictures that are shown
            together, one for all images or one for each.

    Returns:
        Float32 [1 or count, pictures, 3, S, S].

    Raises:
        UserError: for a bundle without an IP-Adapter, a wrong number of pictures, or a file that is no image.
    """
    name = manifest.source["name"]
    unet = manifest.components["unet"]
    embeds = next((spec for spec in unet.inputs if spec.name == "image_embeds"), None)
    if embeds is None or "image_encoder" not in manifest.components:
        raise UserError(
            f"{name} was exported without IP-Adapter: an image prompt has no effect",
            "export again with --ip-adapter FILE --image-encoder FOLDER",
        )
    rows = list(given) if isinstance(given, (list, tuple)) else [given]
    rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in rows]
    if len(rows) not in (1, count):
        raise UserError(
            f"{len(rows)} image prompts for {count} images to make",
            "give one, or one for each; several that are shown together are a list of their own: [[a, b]]",
        )
    limits = unet.dims[str(embeds.shape[1])]
    lengths = {len(row) for row in rows}
    if len(lengths) > 1 or not all(map(limits.admits, lengths)):
        raise UserError(
            f"{' and '.join(map(str, sorted(lengths)))} image prompts together, where {name} takes {limits}",
            "give every image equally many" if len(lengths) > 1 else "give as many as that (a profile of one batch: 1)",
        )
    side = int(manifest.components["image_encoder"].inputs[0].shape[-1])
    return np.stack([np.stack([images.clip_pixels(picture, side) for picture in row]) for row in rows])


def image_embeddings(engine: Engine, pixels: np.ndarray, guided: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """What a UNet's IP-Adapter is given of pictures, and of none.

    Args:
        engine: the image encoder.
        pixels: float32 [rows, pictures, 3, S, S].
        guided: whether the half without a prompt is needed: zeros, or the hidden states of zeros, as in diffusers.

    Returns:
        [rows, pictures, width] or [rows, pictures, tokens, width], and the same of no picture.
    """
    (spec,), (output,) = engine.component.inputs, engine.component.outputs
    limit = engine.component.dims["images"]

    def run(values: np.ndarray) -> np.ndarray:
        """In as many calls as the encoder's own batch limits ask for."""
        made = [
            to_numpy(engine(pixel_values=cast(engine.array(part), spec.dtype))[output.name])
            for part in _parts(values, limit)
        ]
        return np.concatenate(made)[: len(values)]

    flat = run(pixels.reshape(-1, *pixels.shape[2:]))
    shown = flat.reshape(*pixels.shape[:2], *flat.shape[1:])
    if not guided:
        return shown, None
    if output.name == "image_embeds":
        return shown, np.zeros_like(shown)
    none = run(np.zeros_like(pixels[0, :1]))
    return shown, np.broadcast_to(none, shown.shape)


def _parts(values: np.ndarray, limits: Range) -> Iterator[np.ndarray]:
    """Batches within the limits; the last one is filled up with its last row."""
    for start in range(0, len(values), limits.max):
        part = values[start : start + limits.max]
        lacking = max(limits.min - len(part), 0)
        yield np.concatenate([part, np.repeat(part[-1:], lacking, axis=0)])
