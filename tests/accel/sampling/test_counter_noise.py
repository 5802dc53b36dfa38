"""Counter-based noise: the published words of Philox, and the noise that torch draws on a CUDA device."""

import numpy as np
import pytest

from accel.sampling import counter_noise


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known answers for philox4x32-10
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_words_are_philoxs(counter, key, expected):
    words = counter_noise.words(np.array(counter, np.uint32)[:, None], key)[:, 0]
    assert " ".join(f"{word:08x}" for word in words) == expected


def test_it_is_torchs_noise_of_a_cuda_device():
    """torch.randn(12) of seed 0 on a CUDA device, as A1111's documentation of its own generator quotes it."""
    torchs = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564]
    torchs += [-0.62285122, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497]
    assert np.abs(counter_noise.normal([0], 0, (12,))[0] - torchs).max() < 1e-6


def test_every_image_and_every_draw_has_its_own():
    made = counter_noise.normal([5, 6], 0, (4, 8, 8))
    assert made.shape == (2, 4, 8, 8) and made.dtype == np.float32
    assert np.array_equal(made[1:], counter_noise.normal([6], 0, (4, 8, 8)))
    assert not np.array_equal(made[0], counter_noise.normal([5], 1, (4, 8, 8))[0])


def test_it_is_normal():
    x = counter_noise.normal(range(64), 0, (4, 16, 16)).reshape(64, -1).astype(np.float64)
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02 and abs((x**4).mean() - 3) < 0.15
    assert np.abs(np.corrcoef(x) - np.eye(64)).max() < 0.16  # five deviations of 1/sqrt(1024)
