"""Images as CLIP's vision model takes them: transformers' CLIPImageProcessor in PIL and numpy.

Resize the shortest edge, crop the centre, rescale to [0, 1], normalise; in this order, each rounded as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..images import PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = "feature_extractor/preprocessor_config.json"
_LARGEST_SIDE, _FILTERS = 1024, range(6)  # pixels that a vision model sees; PIL's resampling filters
# What the class takes where its config says nothing, or null.
_DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_CLASSES = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_KINDS = ("image_processor_type", "feature_extractor_type")
_WITHOUT_EFFECT = (
    "processor_class",
    "data_format",
    "_valid_processor_keys",
    "_valid_kwargs_names",
    "transformers_version",
)


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image; see `read` for where it comes from.

    Attributes:
        edge: pixels of the shortest edge after resizing; None where `resized` says the size, or nothing is resized.
        resized: height and width after resizing, whatever the aspect ratio.
        filter: PIL's number of the resampling filter.
        crop: height and width of the centre crop, filled with zeros where the image is smaller; None for none.
        scale: factor of 8-bit pixels; None for none.
        mean, std: of the channels, after scaling; None for none.
    """

    edge: int | None = 224
    resized: tuple[int, int] | None = None
    filter: int = 3
    crop: tuple[int, int] | None = (224, 224)
    scale: float | None = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of every result; None where they depend on the image."""
        return self.crop or self.resized

    def __call__(self, images: Sequence[Image]) -> np.ndarray:
        """Float32 [images, 3, height, width] of PIL images of any size, and any mode without transparency.

        Raises:
            UserError: for an image so narrow that it would be resized to more than `accel.images.PIXELS`.
        """
        return np.stack([self._one(image) for image in images])

    def _one(self, image: Image) -> np.ndarray:
        from PIL import Image as pil

        image = image if image.mode == "RGB" else image.convert("RGB")
        height, width = self._target(image.height, image.width)
        if height * width > PIXELS:
            raise UserError(
                f"an image of {image.height} x {image.width} would be resized to {height} x {width} for the checker",
                "draw images that are less narrow",
            )
        if self.edge or self.resized:
            image = image.resize((width, height), pil.Resampling(self.filter))
        array = np.asarray(image)
        if self.crop:
            array = _centre(_centre(array, 0, self.crop[0]), 1, self.crop[1])
        if self.scale is not None:
            array = array.astype(np.float64) * self.scale
        array = array.astype(np.float32)
        if self.mean is not None:
            array = (array - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return array.transpose(2, 0, 1)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing; the longer edge is rounded down."""
        if self.resized:
            return self.resized
        if not self.edge:
            return height, width
        longer = int(self.edge * max(height, width) / min(height, width))
        return (longer, self.edge) if width <= height else (self.edge, longer)


def read(config: Any, place: str) -> Preprocessing:
    """The preprocessing that a `preprocessor_config.json` of CLIP asks for.

    Args:
        config: as it was read; a missing or null field has the class's default.
        place: of the file, for messages.

    Raises:
        UserError: for another class, a field that is not known here and would do something, or a value that no
            preprocessing has.
    """
    if not isinstance(config, dict):
        raise UserError(f"{place} is not a JSON object", "get the file again")
    fields = {**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}

    def wrong(key: str, expected: str) -> UserError:
        return UserError(f"{place}: {key} is {fields[key]!r:.80} (expected {expected})", "get the file again")

    for key in _KINDS:
        if fields.get(key, _CLASSES[0]) not in _CLASSES:
            raise wrong(key, f"one of: {', '.join(_CLASSES)}")
    for key, value in fields.items():
        if key.startswith("do_") and key in _DEFAULTS and not isinstance(value, bool):
            raise wrong(key, "true or false")
        if key not in (*_DEFAULTS, *_KINDS, *_WITHOUT_EFFECT) and value is not False:
            raise UserError(f"{place}: {key!r:.80} = {value!r:.80} is not supported", "use CLIP's own preprocessing")

    def sides(key: str, *names: str) -> tuple[int, ...]:
        value = fields[key]
        found = [value.get(name) for name in names] if isinstance(value, dict) else [value] * len(names)
        if isinstance(value, dict) and {name for name in value if value[name] is not None} != set(names):
            raise wrong(key, " and ".join(names))
        if not all(type(side) is int and 1 <= side <= _LARGEST_SIDE for side in found):
            raise wrong(key, f"whole numbers of pixels, 1 to {_LARGEST_SIDE}")
        return tuple(found)

    def channels(key: str) -> tuple[float, ...]:
        value = fields[key]
        if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
            raise wrong(key, "three numbers")
        return tuple(map(float, value))

    edge = resized = crop = scale = mean = std = None
    if fields["do_resize"]:
        exact = isinstance(fields["size"], dict) and "shortest_edge" not in fields["size"]
        if exact:
            height, width = sides("size", "height", "width")
            resized = height, width
        else:
            (edge,) = sides("size", "shortest_edge")
        if type(fields["resample"]) is not int or fields["resample"] not in _FILTERS:
            raise wrong("resample", f"the number of a PIL filter, 0 to {_FILTERS[-1]}")
    if fields["do_center_crop"]:
        height, width = sides("crop_size", "height", "width")
        crop = height, width
    if fields["do_rescale"]:
        if not _is_number(fields["rescale_factor"]) or not 0 < fields["rescale_factor"] <= 1:
            raise wrong("rescale_factor", "above 0, at most 1")
        scale = float(fields["rescale_factor"])
    if fields["do_normalize"]:
        mean, std = channels("image_mean"), channels("image_std")
        if min(std) < 1e-6:
            raise wrong("image_std", "numbers above 0")
    return Preprocessing(edge, resized, int(fields["resample"]) if fields["do_resize"] else 3, crop, scale, mean, std)


def check_size(made: Preprocessing, side: int, place: str) -> None:
    """Refuse preprocessing whose results are not squares of this side, which is all that the network takes.

    Raises:
        UserError: with what the results are.
    """
    if made.size != (side, side):
        found = "of no fixed size" if made.size is None else f"{made.size[0]} x {made.size[1]} pixels"
        raise UserError(
            f"{place}: its images are {found}, and the safety checker's network takes {side} x {side}",
            "get the files of the model again",
        )


def _is_number(value: Any) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and abs(value) <= 1e6 and math.isfinite(value)


def _centre(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The middle of one axis; where that is shorter, zeros around it, the odd one before."""
    have = array.shape[axis]
    if have >= size:
        start = (have - size) // 2
        return array.take(range(start, start + size), axis)
    before = math.ceil((size - have) / 2)
    around = [(0, 0)] * array.ndim
    around[axis] = before, size - have - before
    return np.pad(array, around)
