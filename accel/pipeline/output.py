"""What a pipeline returns, in the form that was asked for, and how a notebook shows it."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from ..arrays import to_host
from ..bundle import Manifest
from ..errors import Notice, UserError
from ..images import to_pil, unit_range

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_SHOWN = 16  # images in a notebook


@dataclass(frozen=True, repr=False)
class Output:
    """What a pipeline returns.

    Attributes:
        images: PIL images; or float32 numpy [N, H, W, 3] in [0, 1]; or the same as torch [N, 3, H, W]; or latents
            [N, C, h, w].
        latents: float32 numpy [N, C, h, w], as the sampler left them.
        seeds: the seed of each image, drawn where none was given; empty where a generator made the noise.
        seconds: wall time of `text_encoder`, `unet` (all steps), `vae_decoder` and `total`; with an image to start
            from also `vae_encoder`, with a safety checker also `safety_checker`.
        nsfw_content_detected: whether each image was rejected by the safety checker and is black; None where none
            looked at them: without a checker, and for "latent".
    """

    images: Any
    latents: np.ndarray
    seeds: list[int]
    seconds: dict[str, float]
    nsfw_content_detected: list[bool] | None = None

    @property
    def seed(self) -> int | None:
        """The seed of the first image: given again, it makes the same images."""
        return self.seeds[0] if self.seeds else None

    def __repr__(self) -> str:
        first = self.images[0]
        height, width = first.size[::-1] if hasattr(first, "getpixel") else self._sides(first)
        what = "latents" if self.images is self.latents else "image" if len(self.images) == 1 else "images"
        unit = "" if what == "latents" else " px"
        seeds = f", {_listed('seed', self.seeds)}" if self.seeds else ""
        black = f", {count} of them black (rejected by the safety checker)" if (count := self.rejected) else ""
        seconds = f"{self.seconds['total']:.2f} s"
        return f"<Output: {len(self.images)} {what} of {height} x {width}{unit}{seeds}{black}, {seconds}>"

    @property
    def rejected(self) -> int:
        """How many images the safety checker rejected."""
        return sum(self.nsfw_content_detected or ())

    def _sides(self, first: Any) -> tuple[int, int]:
        channels_last = isinstance(first, np.ndarray) and self.images is not self.latents
        return tuple(first.shape[:2]) if channels_last else tuple(first.shape[-2:])

    def _repr_html_(self) -> str:
        images = self.images if isinstance(self.images, list) else []
        if not images and self.images is not self.latents:
            pixels = self.images if isinstance(self.images, np.ndarray) else self.images.permute(0, 2, 3, 1).numpy()
            images = to_pil(pixels)
        shown = "".join(f'<img src="data:image/png;base64,{_png(image)}" alt=""/> ' for image in images[:_SHOWN])
        return f"<div>{shown}</div><small>{escape(repr(self))}</small>"


def of_type(kind: str, pixels: Any, latents: np.ndarray) -> Any:
    """The images of an output type.

    Args:
        kind: one of `OUTPUT_TYPES`.
        pixels: [N, 3, H, W] in about [-1, 1], numpy or torch on any device; None for "latent".
    """
    if pixels is None:
        return latents
    pixels = unit_range(pixels)
    if kind == "pil":
        return to_pil(pixels)
    host = np.ascontiguousarray(to_host(pixels))
    if kind == "np":
        return host
    import torch

    return torch.from_numpy(np.ascontiguousarray(host.transpose(0, 3, 1, 2)))


def table(title: str, rows: Mapping[str, str]) -> str:
    """A title and named lines, as HTML."""
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
    return f"<b>{escape(title)}</b><table>{lines}</table>"


def _listed(word: str, values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:4])) + (", ..." if len(values) > 4 else "")
    return f"{word}{'s' if len(values) > 1 else ''} {shown}"


def _png(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def note_rejected(nsfw: Sequence[bool]) -> None:
    """Say which images are black, and why."""
    found = [number for number, one in enumerate(nsfw, 1) if one]
    if found:
        which = "the image is" if len(nsfw) == 1 else f"{_listed('image', found)} of {len(nsfw)}"
        which += "" if len(nsfw) == 1 else " is" if len(found) == 1 else " are"
        text = f"{which} black: the safety checker rejected what was drawn. Try another prompt or seed"
        warnings.warn(text, Notice, stacklevel=4)


def not_finite(manifest: Manifest, descriptions: Mapping[str, str]) -> UserError:
    """The error of an image that is NaN or infinite.

    Args:
        descriptions: component -> what it ran on.
    """
    low = [name for name, part in manifest.components.items() if part.dtype != "float32"]
    on = {name: text for name, text in descriptions.items() if "float16" in text}
    if low:
        fix = "this precision overflows on this model: export with --precision fp32, or choose another dtype"
    elif on:
        fix = "that overflows on this model: choose dtype 'fp32', or 'bf16'"
    else:
        fix = "nothing of it is below float32: compare with engine 'eager', and with the weights it was made from"
    ran = on or {"unet": descriptions.get("unet", "")}
    return UserError(
        f"the image is NaN or infinite ({', '.join(f'{name}: {text}' for name, text in ran.items())})", fix
    )
