"""Measures against scikit-image, against closed forms, and against inputs that want to pass without being equal."""

import dataclasses
import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from accel.errors import UserError
from accel.parity import Parity, compare, cosine, max_abs, psnr, relative_l2, ssim

RNG = np.random.default_rng(0)


def image(height=64, width=48, channels=3, smooth=True):
    """An image with flat, sloped and noisy parts, in 0..1."""
    y, x = np.mgrid[0:height, 0:width]
    rows = np.cos(y[..., None] / (5 + np.arange(channels)))
    base = 0.5 + 0.4 * np.sin(x / 7)[..., None] * rows
    return np.clip(base + (0.02 if smooth else 0.3) * RNG.standard_normal(base.shape), 0, 1)


def skimage_ssim(a, b, data_range, channel_axis=None):
    """Reference, cut to where the window lies inside, as skimage does in its own mean (pad = 5)."""
    return structural_similarity(
        a,
        b,
        data_range=data_range,
        gaussian_weights=True,
        use_sample_covariance=False,
        sigma=1.5,
        channel_axis=channel_axis,
    )


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.05, 0.5])
@pytest.mark.parametrize("shape", [(64, 48, 3), (11, 11, 1), (12, 200, 4)])
def test_ssim_equals_scikit_image(shape, noise):
    a = image(*shape)
    b = np.clip(a + noise * RNG.standard_normal(shape), 0, 1)
    assert ssim(a, b, 1.0) == pytest.approx(skimage_ssim(a, b, 1.0, channel_axis=-1), abs=1e-10)
    a8, b8 = (a * 255).astype(np.uint8), (b * 255).astype(np.uint8)
    assert ssim(a8, b8, 255) == pytest.approx(skimage_ssim(a8, b8, 255, channel_axis=-1), abs=1e-10)
    assert ssim(a[..., 0], b[..., 0], 1.0) == pytest.approx(skimage_ssim(a[..., 0], b[..., 0], 1.0), abs=1e-10)


def test_ssim_of_a_batch_is_the_mean_of_its_images():
    a, b = np.stack([image(), image()]), np.stack([image(smooth=False), image()])
    assert ssim(a, b, 1.0) == pytest.approx((ssim(a[0], b[0], 1.0) + ssim(a[1], b[1], 1.0)) / 2, abs=1e-12)


def test_ssim_of_equal_negative_and_flat_images():
    a = image()
    assert ssim(a, a, 1.0) == 1.0
    assert ssim(a, 1 - a, 1.0) < 0
    flat = np.full((16, 16), 0.7)
    assert ssim(flat, flat, 1.0) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(10, 64), (64, 10, 3), (2, 3, 64, 64), (64,), (1, 1, 64, 64, 3)])
def test_ssim_refuses_what_is_no_channels_last_image_of_11_px(shape):
    a = np.zeros(shape)
    with pytest.raises(UserError, match="SSIM"):
        ssim(a, a, 1.0)
    assert compare(a, a, 1.0).ssim is None


def test_psnr_equals_scikit_image():
    a, b = image(), image(smooth=False)
    assert psnr(a, b, 1.0) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0), rel=1e-12)
    assert psnr(a, a, 1.0) == math.inf
    assert psnr(np.zeros(4), np.ones(4), 255) == pytest.approx(20 * math.log10(255))


def test_uint8_differences_do_not_wrap_around():
    assert max_abs(np.uint8([0]), np.uint8([255])) == 255
    assert relative_l2(np.uint8([3]), np.uint8([4])) == 0.25


def test_relative_l2_and_cosine():
    assert relative_l2([3.0, 4.0], [3.0, 4.0]) == 0
    assert relative_l2([3.0, 5.0], [3.0, 4.0]) == pytest.approx(0.2)
    assert relative_l2([1.0], [0.0]) == math.inf
    assert relative_l2([0.0], [0.0]) == 0
    assert cosine([1.0, 0.0], [1.0, 1.0]) == pytest.approx(math.sqrt(0.5))
    assert cosine([1.0, 2.0], [-2.0, -4.0]) == pytest.approx(-1)
    with pytest.raises(UserError, match="zeros"):
        cosine([0.0], [1.0])


def test_neither_overflow_nor_underflow():
    assert relative_l2(np.float64([1e200, 0]), np.float64([0, 1e200])) == pytest.approx(math.sqrt(2))
    assert relative_l2(np.float64([2e-300]), np.float64([1e-300])) == pytest.approx(1)
    assert max_abs(np.float16([60000]), np.float16([-60000])) == 120000 - 2 * (60000 - float(np.float16(60000)))
    assert cosine(np.float64([1e200]), np.float64([1e-200])) == pytest.approx(1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_non_finite_values_never_pass(bad, side):
    a, b = image(), image()
    if side in (0, 2):
        a[3, 3, 0] = bad
    if side in (1, 2):
        b[3, 3, 0] = bad
    found = compare(a, b, 1.0)
    assert found == Parity(finite=False)
    assert set(found.as_dict().values()) == {False, None}
    for measure in (relative_l2, cosine, max_abs):
        with pytest.raises(UserError, match="1 NaN or infinite"):
            measure(a, b)
    for measure in (psnr, ssim):
        with pytest.raises(UserError, match="1 NaN or infinite"):
            measure(a, b, 1.0)


def test_an_overflow_to_infinity_in_both_is_not_equality():
    assert compare([np.inf], [np.inf]).finite is False


@pytest.mark.parametrize("measure", [relative_l2, cosine, max_abs, compare])
@pytest.mark.parametrize(
    "a, b, message",
    [
        (np.zeros(3), np.zeros((3, 1)), "shapes differ"),
        (np.zeros(3), np.zeros(1), "shapes differ"),
        (np.zeros(0), np.zeros(0), "empty"),
        (np.array(["1"]), np.array(["1"]), "dtype"),
        (np.array([1j]), np.array([1j]), "dtype"),
        (np.array([None]), np.array([None]), "dtype"),
    ],
)
def test_wrong_use(measure, a, b, message):
    with pytest.raises(UserError, match=message):
        measure(a, b)


@pytest.mark.parametrize("data_range", [0, -1, math.nan, math.inf])
def test_data_range(data_range):
    for measure in (psnr, ssim, compare):
        with pytest.raises(UserError, match="data_range"):
            measure(image(), image(), data_range)


def test_compare_agrees_with_the_single_measures():
    a, b = image(), image(smooth=False)
    assert compare(a, b, 1.0) == Parity(
        finite=True,
        relative_l2=relative_l2(a, b),
        cosine=cosine(a, b),
        max_abs=max_abs(a, b),
        psnr=psnr(a, b, 1.0),
        ssim=ssim(a, b, 1.0),
    )
    assert compare(a, b).psnr is None and compare(a, b).ssim is None
    a8, b8 = (a * 255).astype(np.uint8), (b * 255).astype(np.uint8)
    assert compare(a8, b8).psnr == psnr(a8, b8, 255) and compare(a8, b8).ssim == ssim(a8, b8, 255)
    assert compare(np.zeros(3), np.zeros(3)) == Parity(finite=True, relative_l2=0.0, cosine=None, max_abs=0.0)


def test_result_is_plain_data():
    found = compare(image().astype(np.float32), image().astype(np.float32), 1)
    assert all(type(v) in (float, bool) for v in found.as_dict().values())
    assert set(found.as_dict()) == {field.name for field in dataclasses.fields(Parity)}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int32, np.bool_])
def test_dtypes_of_engines(dtype):
    a = np.array([0, 1, 1, 0]).astype(dtype)
    assert compare(a, a).relative_l2 == 0 and cosine(a, a) == pytest.approx(1)


FLOATS = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@given(arrays(np.float32, (2, 5), elements=FLOATS), arrays(np.float32, (2, 5), elements=FLOATS))
def test_bounds(a, b):
    found = compare(a, b, 1.0)
    assert found.finite and found.relative_l2 >= 0 and found.max_abs >= 0
    assert found.cosine is None or -1 <= found.cosine <= 1
    assert (found.max_abs == 0) == (found.relative_l2 == 0) == (found.psnr == math.inf)
    assert compare(b, a, 1.0).psnr == found.psnr


def test_imports_no_torch():
    code = "import sys, accel.parity; assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
