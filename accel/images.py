"""Images as arrays: what goes into a VAE encoder, a mask, a control network, and what comes out of a decoder.

Sizes, resampling (Lanczos) and thresholds are those of diffusers' image processor, so that images are comparable.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import is_torch, to_host
from .errors import UserError
from .files import read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # what decodes pixels and runs nothing
# Of the pictures that CLIP was trained on (arXiv 2103.00020), red, green and blue in [0, 1].
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PIXELS, _BYTES = 1 << 26, 1 << 28


def batch(images: Any, count: int, size: tuple[int, int], mode: str = "RGB") -> np.ndarray:
    """Float32 [count, channels, height, width] in [0, 1].

    Args:
        images: one image for all, or one for each of `count`: PIL images, file names, or arrays [H, W, C] or [H, W],
            uint8 or float in [0, 1]; torch tensors are [C, H, W], as diffusers has them. A list, or an array with one
            dimension more, holds several.
        size: height and width; images of another size are resized.
        mode: "RGB" or "L".

    Raises:
        UserError: for a file that is not an image, an array of another shape, or a wrong number of images.
    """
    listed = list(images) if isinstance(images, (list, tuple)) else [images]
    listed = [one for value in map(_channels_last, listed) for one in (value if _is_batch(value) else [value])]
    if len(listed) not in (1, count):
        raise UserError(f"{len(listed)} images for {count} images to make", "give one, or one for each")
    made = np.stack([_array(value, size, mode) for value in listed])
    return np.repeat(made, count, axis=0) if len(listed) == 1 else made


def _channels_last(value: Any) -> Any:
    """A torch tensor [..., C, H, W] as a numpy array [..., H, W, C]; anything else as it is."""
    if not is_torch(value):
        return value
    array = value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
    return array.movedim(-3, -1).numpy() if array.dim() > 2 else array.numpy()


def _is_batch(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 4


def masks(images: Any, count: int, size: tuple[int, int]) -> np.ndarray:
    """Float32 [count, 1, height, width], zeros (keep) and ones (paint), of images that are white where to paint."""
    return (batch(images, count, size, "L") >= 0.5).astype(np.float32)


def shrunk(mask: np.ndarray, factor: int) -> np.ndarray:
    """A mask in latent pixels: the upper left of each square, as nearest-neighbour interpolation takes it."""
    return mask[:, :, ::factor, ::factor]


def unit_range(pixels: Any) -> Any:
    """Float32 [N, H, W, C] in [0, 1] of a VAE decoder's output, [N, C, H, W] in about [-1, 1]; numpy, or torch on the
    device of the output.
    """
    if is_torch(pixels):
        return (pixels.permute(0, 2, 3, 1).float() / 2 + 0.5).clamp(0, 1)
    return np.clip(pixels.transpose(0, 2, 3, 1).astype(np.float32) / 2 + 0.5, 0, 1)


def clip_pixels(
    image: Any, size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> np.ndarray:
    """Float32 [3, size, size]: one image as CLIP's vision tower is shown it, equal to transformers' CLIPImageProcessor.

    What is transparent becomes white; the shorter side is resized to `size` (bicubic, in 8 bits), and the middle is cut
    out and normalised.

    Args:
        image: as in `batch`, one image.
        mean, std: of red, green and blue in [0, 1].
    """
    from PIL import Image

    picture = _opened(_channels_last(image))
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("RGB")
    short, long = sorted(picture.size)
    sides = [size if side == short else int(size * long / short) for side in picture.size]
    pixels = np.asarray(picture.resize((sides[0], sides[1]), Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    middle = (pixels[top : top + size, left : left + size] * (1 / 255)).astype(np.float32)
    return ((middle - np.array(mean, np.float32)) / np.array(std, np.float32)).transpose(2, 0, 1)


def to_pil(pixels: Any) -> list[Any]:
    """PIL images of float pixels [N, H, W, 3] in [0, 1], numpy or torch; bytes are made where the pixels lie."""
    from PIL import Image

    return [Image.fromarray(image) for image in to_host(_bytes(pixels))]


def _bytes(pixels: Any) -> Any:
    """uint8 of floats in [0, 1]."""
    if is_torch(pixels):
        import torch

        return (pixels * 255).round().to(torch.uint8).contiguous()
    return (pixels * 255).round().astype(np.uint8)


def canny(image: Any, low: float = 100, high: float = 200) -> Any:
    """White edges on black (Canny 1986), a PIL image: what canny control networks are shown.

    Args:
        image: as in `batch`, one image.
        low, high: hysteresis thresholds on a gradient of 8-bit pixels, as OpenCV counts them.

    Raises:
        MissingPackage: where neither opencv nor scikit-image is installed.
    """
    from PIL import Image

    from .errors import MissingPackage

    grey = np.asarray(_opened(image).convert("L"))
    try:
        import cv2

        edges = cv2.Canny(grey, low, high)
    except ImportError:
        try:
            from skimage.feature import canny as skimage_canny
        except ImportError:
            raise MissingPackage("scikit-image", "--canny", "control") from None
        # OpenCV sums |dx| + |dy| of a Sobel kernel of weight 4; scikit-image's gradient is that kernel's mean.
        edges = skimage_canny(grey.astype(float), 1.0, low / 4, high / 4).astype(np.uint8) * 255
    return Image.fromarray(edges).convert("RGB")


def decoded(data: bytes, name: str) -> Any:
    """A PIL image of a file's bytes, its pixels in memory; only a size that an image has is decoded.

    Raises:
        UserError: for another format than those of photos, a truncated or damaged file, or too many pixels.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > PIXELS:
            raise UserError(f"{name} has {image.width} x {image.height} pixels", f"give one of at most {PIXELS:,}")
        image.load()
        return image
    except UserError:
        raise
    except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise UserError(f"{name} is not an image that can be read", "use PNG, JPEG or WebP") from None


def _array(value: Any, size: tuple[int, int], mode: str) -> np.ndarray:
    from PIL import Image

    height, width = size
    image = _opened(value).convert(mode)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    array = np.asarray(image, np.float32) / 255
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _opened(value: Any) -> Any:
    from PIL import Image

    if isinstance(value, (str, Path)):
        if not Path(value).exists():
            raise UserError(f"no such image: {value}", "check the path")
        return decoded(read_bytes(Path(value), "the image", _BYTES), str(value))
    if isinstance(value, Image.Image):
        return value
    array = np.asarray(value)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise UserError(f"an image of shape {array.shape}", "give [height, width, 3], [height, width] or a PIL image")
    if array.dtype != np.uint8:
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise UserError("an image with values outside 0 to 1", "scale it, or give uint8 from 0 to 255")
        array = (array * 255).round().astype(np.uint8)
    return Image.fromarray(array)
