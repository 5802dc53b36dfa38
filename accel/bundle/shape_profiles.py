"""Named shape profiles: which batches and sizes an exported pipeline accepts.

A profile speaks the user's units (images per call, pixels, tokens). `dims` turns it into the symbolic dimensions of
the tensors, which is what the exporter, the engines and TensorRT's optimization profiles need.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from ..errors import UserError, unknown


@dataclass(frozen=True)
class Range:
    """An inclusive range with the value to optimise for, in steps of `multiple`."""

    min: int
    opt: int
    max: int
    multiple: int = 1

    @property
    def fixed(self) -> bool:
        return self.min == self.max

    def admits(self, value: int) -> bool:
        return self.min <= value <= self.max and value % self.multiple == 0

    def __str__(self) -> str:
        step = f" in steps of {self.multiple}" if self.multiple > 1 and not self.fixed else ""
        return str(self.min) if self.fixed else f"{self.min} to {self.max}{step}"

    def scaled(self, numerator: int, denominator: int = 1) -> Range:
        """The range of `value * numerator / denominator`; the step never shrinks below one."""
        low, opt, high = (v * numerator // denominator for v in (self.min, self.opt, self.max))
        return Range(low, opt, high, max(1, self.multiple * numerator // denominator))

    def shrunk(self, stride: int) -> Range:
        """The range of `value / stride`, rounded up: what convolutions of stride 2 leave of a side."""
        low, opt, high = (-(-value // stride) for value in (self.min, self.opt, self.max))
        return Range(low, opt, high, max(1, self.multiple // stride))

    def common(self, other: Range) -> Range | None:
        """The values that both admit; None where there are none."""
        step = math.lcm(self.multiple, other.multiple)
        low, high = -(-max(self.min, other.min) // step) * step, min(self.max, other.max) // step * step
        if low > high:
            return None
        return Range(low, min(max(round_to(self.opt, step), low), high), high, step)


MOST_PROMPT_IMAGES = 4


def fixed(value: int) -> Range:
    return Range(value, value, value)


@dataclass(frozen=True)
class Profile:
    """What one exported pipeline accepts.

    Attributes:
        name: the word users type.
        batch: images per call (guidance doubles the UNet's batch on top of this).
        height, width: pixels; the network decides in which steps (see `dims`).
        tokens: length of the text context.
        step: pixels between one size and the next of a range; 0 for what the UNet halves exactly, see `dims`.
        vae_tile: largest side that the VAE takes, in pixels: it sees tiles of larger images (`accel.pipeline.tiling`).
            0 for a VAE that takes what the UNet takes.
    """

    name: str
    batch: Range
    height: Range
    width: Range
    tokens: int = 77
    step: int = 0
    vae_tile: int = 0

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)  # digests of bundles without the younger fields stay what they were
        return {key: value for key, value in found.items() if value or key not in ("step", "vae_tile")}

    def dims(
        self, *, vae_scale: int, latent_multiple: int, guidance: bool, edits: bool = False, component: str = "unet"
    ) -> dict[str, Range]:
        """The symbolic dimensions of the tensors of a component.

        A fixed side may be any multiple of `vae_scale`. A range goes by default in steps that the UNet halves exactly,
        which keeps the graph simple; where it does not, an inner side is rounded up, as a convolution of stride 2 does.

        Args:
            vae_scale: pixels per latent pixel along one side (8 for Stable Diffusion).
            latent_multiple: the latent sides that the UNet halves exactly are its multiples (2 ** number of
                downsamplers).
            guidance: whether the pipeline uses classifier-free guidance, which doubles the UNet's batch. A batch range
                always leaves room for it; a fixed batch is fixed to one or the other.
            edits: whether it is guided by an image too (InstructPix2Pix), which makes it three times the batch.
            component: its name; a VAE's can take any multiple of `vae_scale`, and only tiles.

        Raises:
            UserError: when a size of the profile is not a multiple of what the network can represent.
        """
        of_vae = component.startswith("vae_")
        step = self._step(vae_scale, latent_multiple)
        guided = 3 if edits else 2
        batch = self.batch.scaled(guided if guidance else 1)
        if not self.batch.fixed:
            batch = Range(self.batch.min, batch.opt, self.batch.max * guided)
        dims = {"images": self.batch, "batch": batch}
        # Pictures that an IP-Adapter is shown for one image.
        dims["prompt_images"] = _ONE if self.batch.fixed else Range(1, 1, MOST_PROMPT_IMAGES)
        for side, pixels in (("height", self.height), ("width", self.width)):
            self._check(side, pixels, vae_scale if pixels.fixed else step, vae_scale)
            if of_vae and self.vae_tile:
                snapped = Range(vae_scale, self.vae_tile, self.vae_tile, vae_scale)
            elif pixels.fixed:
                snapped = pixels
            else:
                opt = min(max(round_to(pixels.opt, step), pixels.min), pixels.max)
                snapped = Range(pixels.min, opt, pixels.max, vae_scale if of_vae else step)
            dims[side] = snapped
            dims[f"latent_{side}"] = snapped.scaled(1, vae_scale)
            for stride in (2, 4, 8):  # the inner resolutions, where adapters add their features
                if latent_multiple % stride == 0:
                    dims[f"latent_{side}_{stride}"] = dims[f"latent_{side}"].shrunk(stride)
        return dims

    def _step(self, vae_scale: int, latent_multiple: int) -> int:
        """Pixels from one size of a range to the next."""
        if self.step % vae_scale:
            fix = f"step={vae_scale}, or a multiple of it; without it the step is {vae_scale * latent_multiple}"
            raise UserError(f"profile {self.name!r}: step={self.step} is no multiple of {vae_scale} px", fix)
        if self.vae_tile % (4 * vae_scale):
            fix = f"use a multiple of {4 * vae_scale}, for example vae_tile={64 * vae_scale}"
            raise UserError(f"profile {self.name!r}: vae_tile={self.vae_tile} makes no tiles that overlap", fix)
        return self.step or vae_scale * latent_multiple

    def _check(self, side: str, pixels: Range, step: int, vae_scale: int) -> None:
        """Refuse a side that the network cannot represent."""
        if not pixels.min % step and not pixels.max % step:
            return
        finer = f"; or add step={vae_scale} to allow all multiples of {vae_scale}" if step > vae_scale else ""
        raise UserError(
            f"profile {self.name!r}: {side} {pixels} is not a multiple of {step} px, which this model needs",
            f"use multiples of {step}, for example {side}={round_to(pixels.opt, step)}{finer}",
        )


def round_to(value: int, step: int) -> int:
    return max(step, (value + step // 2) // step * step)


def _square(name: str, size: int, batch: Range) -> Profile:
    return Profile(name, batch, fixed(size), fixed(size))


_TO_4, _ONE = Range(1, 1, 4), fixed(1)
# Width and height of SDXL's usual images, all of about a million pixels (the list on SSD-1B's model card).
SDXL_ASPECTS = (
    (1024, 1024),
    (1152, 896),
    (896, 1152),
    (1216, 832),
    (832, 1216),
    (1344, 768),
    (768, 1344),
    (1536, 640),
    (640, 1536),
)
_PROFILES = (
    _square("sd-256", 256, _TO_4),
    _square("sd-512", 512, _TO_4),
    _square("sd-512-static", 512, _ONE),
    _square("sd-768", 768, _TO_4),
    _square("sdxl-512", 512, _TO_4),
    _square("sdxl-1024", 1024, _TO_4),
    _square("sdxl-1024-static", 1024, _ONE),
    Profile("dynamic", Range(1, 1, 8), Range(256, 512, 1024), Range(256, 512, 1024)),
    *(Profile(f"sdxl-{w}x{h}", _TO_4, fixed(h), fixed(w)) for w, h in SDXL_ASPECTS),
    Profile("sdxl-aspects", Range(1, 1, 4), Range(640, 1024, 1536), Range(640, 1024, 1536)),
    Profile("sdxl-dynamic", Range(1, 1, 4), Range(512, 1024, 1536), Range(512, 1024, 1536)),
    Profile("digits", Range(1, 4, 16), fixed(64), fixed(64)),
    Profile("digits-dynamic", Range(1, 4, 16), Range(64, 64, 128), Range(64, 64, 128)),
)
PROFILES: Mapping[str, Profile] = MappingProxyType({profile.name: profile for profile in _PROFILES})

_FIELD = re.compile(r"^(batch|height|width|size|tokens|step|vae_tile)=(\d+)(?:-(\d+))?$")
_NUMBERS = ("tokens", "step", "vae_tile")


def native_sides(native: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a model's own images, in pixels, from `native_size` of a manifest: one number for both, or
    two."""
    return (native, native) if isinstance(native, int) else (native[0], native[1])


def profile(text: str, *, native: int | Sequence[int] | None = None) -> Profile:
    """A profile by name, `static` / `native` for the model's own size, or spelled out.

    Args:
        text: a name from `PROFILES`; `native` (batch 1-4 at the model's own size); `static` (batch 1 at that size);
            or `batch=1-4,height=256-768,width=512[,tokens=77][,step=8][,vae_tile=512]` with `size=` for both sides at
            once. `step` and `vae_tile` may follow a name as well.
        native: the model's own image size in pixels, or (height, width), needed by `native` and `static`.

    Raises:
        UserError: for an unknown name or a malformed specification.
    """
    if text in PROFILES:
        return PROFILES[text]
    if text in ("static", "native"):
        assert native is not None, "the caller knows the model's own size"
        height, width = map(fixed, native_sides(native))
        return Profile(text, _ONE if text == "static" else _TO_4, height, width)
    first, _, rest = text.partition(",")
    if first in PROFILES or first in ("static", "native"):
        more = _fields(text, rest)
        if others := set(more) - {"step", "vae_tile"}:
            fix = f"spell it out, such as batch=1-4,{others.pop()}=..., or leave that out"
            raise UserError(f"profile {text!r}: only step and vae_tile may follow a name", fix)
        step, vae_tile = (more[key].max if key in more else 0 for key in ("step", "vae_tile"))
        return replace(profile(first, native=native), name=text, step=step, vae_tile=vae_tile)
    fields = _fields(text, text)
    if native is not None:
        fields = dict(zip(("height", "width"), map(fixed, native_sides(native)), strict=True)) | fields
    if not {"height", "width"} <= set(fields):
        raise UserError(f"profile {text!r} names no height and width", "add size=512 or height=...,width=...")
    numbers = {key: fields[key].max for key in _NUMBERS if key in fields}
    return Profile(text, fields.get("batch", _ONE), fields["height"], fields["width"], **numbers)


def _fields(text: str, parts: str) -> dict[str, Range]:
    """The fields of a profile that is spelled out, `size` as both sides.

    Args:
        text: the whole profile, for the errors.
        parts: the part of it that has fields.
    """
    fields: dict[str, Range] = {}
    for part in parts.split(","):
        match = _FIELD.match(part.strip())
        if not match:
            error = unknown("profile", text, [*PROFILES, "native", "static"])
            error.fix += "; or spelled out, such as batch=1-4,height=256-768,width=512"
            raise error
        key, low, high = match[1], int(match[2]), int(match[3] or match[2])
        if not 1 <= low <= high:
            raise UserError(f"profile {text!r}: {part.strip()!r} is an empty range", "write low-high: batch=1-4")
        if key in _NUMBERS and low != high:
            raise UserError(
                f"profile {text!r}: {key} is one number, not a range", f"leave it out, or write {key}={high}"
            )
        for name in ("height", "width") if key == "size" else (key,):
            if name in fields:
                raise UserError(f"profile {text!r} gives {name} twice", "size= is height= and width= at once")
            fields[name] = Range(low, low if key == "batch" else high, high)
    return fields
