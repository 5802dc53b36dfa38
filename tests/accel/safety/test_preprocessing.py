"""What CLIP is shown is what transformers' CLIPImageProcessor makes of an image, for any size and mode."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from accel.errors import UserError
from accel.safety.preprocessing import check_size, read

SMALL = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 4), np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def of_transformers(config: dict, images: list) -> np.ndarray:
    return np.stack([CLIPImageProcessor(**config)(image).pixel_values[0] for image in images]).astype(np.float32)


@pytest.mark.parametrize(
    "config",
    [
        {},
        SMALL,
        {"size": 40, "crop_size": 32},  # as the published SD1.5 writes it
        {"size": {"height": 33, "width": 47}, "do_center_crop": False},
        {"do_resize": False, "crop_size": 64},
        {"size": 15, "crop_size": {"height": 32, "width": 21}},  # the crop reaches over the border
        SMALL | {"do_rescale": False},
        SMALL | {"do_normalize": False, "rescale_factor": 1 / 127.5},
        SMALL | {"do_normalize": False, "do_rescale": False, "do_convert_rgb": False},
        *(SMALL | {"resample": number} for number in range(6)),
        SMALL | {"image_mean": [0, 0.5, 1], "image_std": [1, 0.5, 0.01]},
    ],
    ids=str,
)
def test_it_equals_transformers_over_odd_sizes(config):
    images = [noise(*size) for size in ((32, 32), (31, 45), (101, 33), (7, 200), (224, 224), (1, 1), (64, 223))]
    found = read(config, "here")(images)
    expected = of_transformers(config, images)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-6 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_images_of_other_modes_become_rgb_as_there(mode):
    images = [noise(50, 41, mode), noise(32, 32, mode)]
    assert np.abs(read(SMALL, "here")(images) - of_transformers(SMALL, images)).max() <= 1e-6


def test_files_of_old_and_new_versions_are_read_alike(tmp_path):
    CLIPImageProcessor(**SMALL).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 32, "size": 40, "resample": 3}
    old |= {key: True for key in ("do_center_crop", "do_convert_rgb", "do_normalize", "do_resize")}
    old |= {key: saved[key] for key in ("image_mean", "image_std")}
    fast = saved | {"image_processor_type": "CLIPImageProcessorFast", "data_format": "channels_first", "device": None}
    assert read(saved, "") == read(old, "") == read(fast, "") == read(SMALL, "")


NAN, ENDLESS = float("nan"), float("inf")
HOSTILE = [
    [],
    "text",
    {"image_processor_type": "SiglipImageProcessor"},
    {"feature_extractor_type": ["CLIPFeatureExtractor"]},
    {"do_resize": 1},
    {"do_normalize": "no"},
    *({"size": value} for value in (0, -1, True, 2.5, "224", 1 << 40, [224], {"shortest_edge": 1 << 20}, {"x": 1})),
    {"size": {"shortest_edge": 40, "longest_edge": 80}},
    {"size": {"height": 40}},
    {"size": {}},
    *({"crop_size": value} for value in (0, 1 << 20, {"height": 32}, {"height": 32, "width": -1}, NAN)),
    *({"resample": value} for value in (6, -1, "bicubic", 2.0, True)),
    *({"rescale_factor": value} for value in (0, -1, NAN, ENDLESS, 1e300, "1", True)),
    *({"image_mean": value} for value in ([0.5], [0.5] * 4, 0.5, ["a"] * 3, [NAN] * 3, [10**400] * 3, [1e30] * 3)),
    *({"image_std": value} for value in ([0, 1, 1], [1, 1, -1], [1e-300] * 3, [ENDLESS] * 3, {})),
    {"do_pad": True},
    {"use_square_size": True},
    {"custom_step": "reverse"},
    {"\x1b[2J": 1},
]


@pytest.mark.parametrize("config", HOSTILE, ids=lambda config: ascii(config)[:60])
def test_what_no_preprocessing_of_clip_says_is_refused(config):
    with pytest.raises(UserError, match="^here") as error:
        read(config, "here")
    assert error.value.fix and len(error.value.message) < 400


def test_what_is_switched_off_is_not_looked_at():
    assert read({"do_pad": False, "do_rescale": False, "rescale_factor": "x"}, "").scale is None
    assert read({"do_normalize": False, "image_std": [0, 0, 0]}, "").std is None


def test_a_result_that_the_network_does_not_take_is_refused():
    check_size(read(SMALL, ""), 32, "here")
    with pytest.raises(UserError, match="32 x 32 pixels, and the safety checker's network takes 224 x 224"):
        check_size(read(SMALL, ""), 224, "here")
    with pytest.raises(UserError, match="no fixed size"):
        check_size(read(SMALL | {"do_center_crop": False}, ""), 32, "here")


def test_an_image_like_a_thread_does_not_take_all_memory():
    started = time.monotonic()
    with pytest.raises(UserError, match="would be resized to 819200 x 1000"):
        read({"size": 1000}, "")([Image.new("RGB", (10, 8192))])
    assert time.monotonic() - started < 1
