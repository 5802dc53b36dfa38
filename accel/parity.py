"""How far apart two arrays, or two batches of images, are: numpy only, computed in float64.

A compiled model passes when its images are the eager model's images. No measure here turns a NaN into a number that
looks like success: non-finite input is an error in the single measures, and `finite = False` with None for every figure
in `compare`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .errors import UserError

# Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", section III.B.
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What `compare` measures. A figure is None where it has no meaning; `finite` says whether that is for NaN or inf.

    Attributes:
        finite: no NaN and no infinity in either array.
        relative_l2: ||a - b|| / ||b||; infinite where b is all zero and a is not.
        cosine: of the angle between the flattened arrays; None where one of them is all zero.
        max_abs: largest difference of two elements, in the arrays' own unit.
        psnr: in dB; infinite for equal arrays. None without a data range.
        ssim: -1..1, mean over the batch. None without a data range, or for what is not an image of 11 px and more.
    """

    finite: bool
    relative_l2: float | None = None
    cosine: float | None = None
    max_abs: float | None = None
    psnr: float | None = None
    ssim: float | None = None

    def as_dict(self) -> dict[str, float | bool | None]:
        """The figures by name. Infinity stays a float, which JSON proper has no word for."""
        return asdict(self)


def relative_l2(a: Any, b: Any) -> float:
    """||a - b||_2 / ||b||_2, with b the reference. 0 for equal arrays, inf where only b is all zero."""
    a, b = _pair(a, b)
    return _ratio(_norm(a - b), _norm(b))


def cosine(a: Any, b: Any) -> float:
    """a . b / (||a|| ||b||) of the flattened arrays, -1..1.

    Raises:
        UserError: where one array is all zero and has no direction; see the module for the rest.
    """
    value = _cosine(*_pair(a, b))
    if value is None:
        raise UserError("an array of zeros has no direction to compare", "use max_abs")
    return value


def max_abs(a: Any, b: Any) -> float:
    """Largest |a - b|."""
    a, b = _pair(a, b)
    return float(np.abs(a - b).max())


def psnr(a: Any, b: Any, data_range: float) -> float:
    """Peak signal-to-noise ratio 10 log10(data_range^2 / mean((a - b)^2)) in dB, over the whole batch.

    Args:
        data_range: highest minus lowest possible value: 255 for uint8, 1 or 2 for floats; never guessed.

    Returns:
        dB; inf for equal arrays.
    """
    a, b = _pair(a, b)
    return _psnr(a, b, _range(data_range))


def ssim(a: Any, b: Any, data_range: float) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03.

    Args:
        a, b: images [H, W], [H, W, C] or [B, H, W, C], C at most 4, each channel for itself; 11 px at least.
        data_range: as in `psnr`.

    Returns:
        Mean over every place where the window fits inside the image, all channels, whole batch.

    Raises:
        UserError: for images under 11 px, in which no window fits; for arrays that are not channels-last images.
    """
    a, b = _pair(a, b)
    if problem := _not_an_image(a.shape):
        raise UserError(f"SSIM of arrays of shape {a.shape}: {problem}", "pass [B, H, W, C] images of 11 px and more")
    return _ssim(a, b, _range(data_range))


def compare(a: Any, b: Any, data_range: float | None = None) -> Parity:
    """All figures of two arrays of one shape, b the reference.

    Args:
        data_range: as in `psnr`. None: 255 if both are uint8, otherwise psnr and ssim are None.

    Raises:
        UserError: for different shapes, empty or non-numeric arrays. Not for NaN: look at `finite`.
    """
    raw_a, raw_b = np.asarray(a), np.asarray(b)
    a, b = _pair(raw_a, raw_b, finite=False)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Parity(finite=False)
    if data_range is None and raw_a.dtype == raw_b.dtype == np.uint8:
        data_range = 255
    known = data_range is not None
    return Parity(
        finite=True,
        relative_l2=_ratio(_norm(a - b), _norm(b)),
        cosine=_cosine(a, b),
        max_abs=float(np.abs(a - b).max()),
        psnr=_psnr(a, b, _range(data_range)) if known else None,
        ssim=_ssim(a, b, _range(data_range)) if known and not _not_an_image(a.shape) else None,
    )


def _pair(a: Any, b: Any, *, finite: bool = True) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for name, value in (("first", a), ("second", b)):
        value = np.asarray(value)
        if value.dtype.kind not in "buif" and not _is_float(value.dtype):
            raise UserError(f"the {name} array has dtype {value.dtype}", "pass real numbers")
        arrays.append(value.astype(np.float64))
    a, b = arrays
    if a.shape != b.shape:
        raise UserError(f"shapes differ: {a.shape} and {b.shape}", "compare outputs of the same call")
    if a.size == 0:
        raise UserError("the arrays are empty", "compare at least one number")
    if finite:
        for name, value in (("first", a), ("second", b)):
            bad = int(value.size - np.isfinite(value).sum())
            if bad:
                message = f"the {name} array has {bad} NaN or infinite values of {value.size}"
                raise UserError(message, "find out what overflows; compare() reports it as finite = False")
    return a, b


def _is_float(dtype: np.dtype) -> bool:
    # bfloat16 and the like of ml_dtypes are of kind V and convert to float32 without loss.
    return dtype.kind == "V" and dtype.names is None and np.can_cast(dtype, np.float32)


def _range(data_range: float) -> float:
    if not (math.isfinite(data_range) and data_range > 0):
        raise UserError(f"data_range = {data_range}", "use highest minus lowest possible value, 255 for uint8 images")
    return float(data_range)


def _norm(a: np.ndarray) -> float:
    # Scaled, so that squares neither overflow nor vanish.
    scale = float(np.abs(a).max())
    return scale * float(np.linalg.norm(a / scale)) if scale else 0.0


def _ratio(error: float, reference: float) -> float:
    if error == 0:
        return 0.0
    return error / reference if reference else math.inf


def _cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    norm_a, norm_b = _norm(a), _norm(b)
    if not norm_a or not norm_b:
        return None
    return float(np.clip(np.vdot(a / norm_a, b / norm_b), -1, 1))


def _psnr(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    error = _norm(a - b) / math.sqrt(a.size)
    return 20 * math.log10(data_range / error) if error else math.inf


def _not_an_image(shape: tuple[int, ...]) -> str:
    """Why an array of this shape has no SSIM; empty if it has one."""
    if len(shape) not in (2, 3, 4):
        return "not [H, W], [H, W, C] or [B, H, W, C]"
    if len(shape) > 2 and shape[-1] > 4:
        return f"{shape[-1]} channels; the last axis must hold 1 to 4"
    height, width = shape if len(shape) == 2 else shape[-3:-1]
    if min(height, width) < _WINDOW:
        return f"the window needs {_WINDOW} px, the image is {height} x {width}"
    return ""


def _ssim(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    if a.ndim == 2:
        a, b = a[..., None], b[..., None]
    if a.ndim == 3:
        a, b = a[None], b[None]
    # One image at a time keeps memory at a few images.
    return float(np.mean([_ssim_map(x, y, data_range).mean() for x, y in zip(a, b, strict=True)]))


def _ssim_map(x: np.ndarray, y: np.ndarray, data_range: float) -> np.ndarray:
    mu_x, mu_y = _smooth(x), _smooth(y)
    var_x, var_y = _smooth(x * x) - mu_x**2, _smooth(y * y) - mu_y**2
    cov = _smooth(x * y) - mu_x * mu_y
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    return ((2 * mu_x * mu_y + c1) * (2 * cov + c2)) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))


def _smooth(x: np.ndarray) -> np.ndarray:
    """Gaussian-weighted mean of [H, W, C] over H and W, only where the window lies inside."""
    offset = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-0.5 * (offset / _SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        span = x.shape[axis] - _WINDOW + 1
        x = sum(w * x.take(range(i, i + span), axis=axis) for i, w in enumerate(weights))
    return x
