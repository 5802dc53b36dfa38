"""How a VAE's images are cut into tiles: as diffusers' `enable_vae_tiling()` cuts them for the VAE's class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ...bundle import Component
from ...errors import UserError
from .blend import Run, masked, ramped, spans


@dataclass(frozen=True)
class _Class:
    """What diffusers does with a class of VAE.

    Attributes:
        join: computes and blends the tiles.
        overlap: the part of a tile's side that it shares with the next one, 1 / overlap.
        own: config -> side of a tile in pixels.
        always: whether images that are no larger than a tile are cut as well.
        least: how many latent pixels tiles overlap by at least; diffusers' mask of one pixel is 0 / 0.
    """

    join: Callable[..., np.ndarray]
    overlap: int
    own: Callable[[Mapping[str, Any]], Any]
    always: bool = False
    least: int = 1


CLASSES: Mapping[str, _Class] = {
    "AutoencoderKL": _Class(ramped, 4, lambda config: config.get("sample_size", 32)),
    "AutoencoderTiny": _Class(masked, 8, lambda config: 512, always=True, least=2),
}


@dataclass(frozen=True)
class VaeTiling:
    """Decodes and encodes in tiles.

    Attributes:
        name: class of the VAE.
        tile: side of a tile in pixels.
        scale: pixels per latent pixel along a side.
    """

    name: str
    tile: int
    scale: int

    @classmethod
    def of(cls, config: Mapping[str, Any], scale: int, tile: int | None = None) -> VaeTiling:
        """The tiling of a VAE.

        Args:
            config: the VAE's.
            tile: side of a tile in pixels; None for the one that diffusers takes: the config's `sample_size`, or 512
                for an AutoencoderTiny.

        Raises:
            UserError: for a side that cannot be cut into overlaps of whole latent pixels.
        """
        config = config if isinstance(config, Mapping) else {}
        name = str(config.get("_class_name", "AutoencoderKL"))
        if name not in CLASSES:
            raise UserError(f"a VAE of class {name} has no tiles here", f"one of: {', '.join(CLASSES)}")
        chosen, step = CLASSES[name].own(config) if tile is None else tile, CLASSES[name].overlap * scale
        least = CLASSES[name].least * step
        if isinstance(chosen, bool) or not isinstance(chosen, int) or chosen < least or chosen % step:
            whose = "the VAE's sample_size" if tile is None else "vae_tile"
            raise UserError(
                f"{whose} is {chosen!r}, which makes no tiles: sides are multiples of {step} px, from {least} on",
                f"vae_tile={16 * step}",
            )
        return cls(name, chosen, scale)

    @property
    def _class(self) -> _Class:
        return CLASSES[self.name]

    def cuts(self, height: int, width: int) -> bool:
        """Whether an image of this size, in pixels, is cut at all."""
        return self._class.always or max(height, width) > self.tile

    def sides(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """The heights and the widths of the tiles of an image, in pixels."""
        if not self.cuts(height, width):
            return [height], [width]
        step = self.tile - self.tile // self._class.overlap
        high, wide = (spans(length, self.tile, step) for length in (height, width))
        return [part.stop - part.start for part in high], [part.stop - part.start for part in wide]

    def check(self, component: Component, height: int, width: int) -> None:
        """Refuse an image whose tiles a VAE component does not take.

        Nothing is padded: the group norms and the attention of a VAE see its whole input, so a padded tile comes out
        as another one.

        Raises:
            UserError: naming the tile, and what the component takes.
        """
        cut_in = self.sides(height, width)
        for side, length, tiles in zip(("height", "width"), (height, width), cut_in, strict=True):
            limits = component.dims[side]
            wrong = [px for px in tiles if not limits.admits(px)]
            if not wrong:
                continue
            cut = f"is cut into tiles of {', '.join(map(str, tiles))} px" if len(tiles) > 1 else "is one tile"
            why = " (tiles at the edge are smaller)" if len(tiles) > 1 and wrong[0] < self.tile else ""
            raise UserError(
                f"VAE tiling: a {side} of {length} px {cut}, and {component.name} takes {limits}{why}",
                f"another size, another vae_tile, or export with vae_tile={self.tile} in the --profile",
            )

    def decode(self, z: np.ndarray, run: Run) -> np.ndarray:
        """Pixels float32 [N, 3, H, W] of the VAE's latents [N, C, h, w]; `run` decodes a tile of them."""
        height, width = (side * self.scale for side in z.shape[2:])
        return self._joined(z, run, self.cuts(height, width), self.tile // self.scale, Fraction(self.scale))

    def encode(self, pixels: np.ndarray, run: Run) -> np.ndarray:
        """What the encoder gives for pixels [N, 3, H, W]: float32 [N, D, h, w]; `run` encodes a tile of them."""
        return self._joined(pixels, run, self.cuts(*pixels.shape[2:]), self.tile, Fraction(1, self.scale))

    def _joined(self, x: np.ndarray, run: Run, cut: bool, size: int, zoom: Fraction) -> np.ndarray:
        if not cut:
            return np.asarray(run(x), np.float32)
        return self._class.join(x, run, size=size, step=size - size // self._class.overlap, zoom=zoom)
