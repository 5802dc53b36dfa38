"""Resize, crop and flip: torchvision's numbers, and SDXL's corner that follows the flip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from accel.distill.data.crop import Placement, pixels, place, time_ids

SIDES = st.integers(1, 90)
SEEDS = st.integers(0, 2**32)


def an_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def drawn(width, height, resolution, seed, *, center=False, flip=True) -> Placement:
    rng = np.random.default_rng(seed)
    return place((width, height), resolution, center_crop=center, random_flip=flip, rng=rng)


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(4, 40), SEEDS, st.booleans())
def test_flipping_the_resized_image_and_cutting_at_the_reported_corner_gives_the_pixels(w, h, size, seed, center):
    image = an_image(w, h, seed)
    placement = drawn(w, h, size, seed, center=center)
    high, wide, top, left, *target = time_ids(placement, image.size, size)
    whole = image.resize(placement.resized, Image.Resampling.BILINEAR)
    if placement.flipped:
        whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cut = np.asarray(whole, np.float32)[top : top + size, left : left + size]
    expected = torch.from_numpy((cut / 255 - 0.5) / 0.5).permute(2, 0, 1)
    assert torch.allclose(pixels(image, placement, size), expected, atol=1e-6)
    assert (high, wide, *target) == (h, w, size, size)


@settings(deadline=None, max_examples=200)
@given(SIDES, SIDES, st.integers(1, 64), SEEDS, st.booleans())
def test_the_square_lies_inside_and_the_short_side_is_the_resolution(w, h, size, seed, center):
    if max(w, h) > 32 * min(w, h):
        with pytest.raises(ValueError, match=f"{w} x {h} pixels is too narrow"):
            drawn(w, h, size, seed, center=center)
        return
    placement = drawn(w, h, size, seed, center=center)
    assert min(placement.resized) == size
    assert max(placement.resized) == int(size * max(w, h) / min(w, h))
    assert 0 <= placement.left <= placement.resized[0] - size
    assert 0 <= placement.top <= placement.resized[1] - size


def test_the_centre_is_torchvisions():
    # torchvision.transforms.functional.center_crop: int(round((H - h) / 2.0)), and Python rounds halves to even.
    for width, left in ((5, 0), (6, 1), (7, 2), (8, 2), (9, 2), (11, 4)):
        assert drawn(width, 4, 4, 0, center=True, flip=False) == Placement((width, 4), left, 0, False)
        assert drawn(4, width, 4, 0, center=True, flip=False) == Placement((4, width), 0, left, False)


def test_all_corners_and_both_directions_are_drawn_evenly():
    counts: dict[tuple[int, bool], int] = {}
    for seed in range(3000):
        placement = drawn(8, 4, 4, seed)
        counts[placement.left, placement.flipped] = counts.get((placement.left, placement.flipped), 0) + 1
    assert set(counts) == {(left, flip) for left in range(5) for flip in (False, True)}
    assert all(230 < count < 370 for count in counts.values())  # 300 expected, standard deviation 16


def test_without_flips_the_crop_stays_where_it_was():
    for seed in range(20):
        plain, either = drawn(30, 20, 10, seed, flip=False), drawn(30, 20, 10, seed)
        assert not plain.flipped
        assert (plain.left, plain.top) == (either.left, either.top)
    assert any(drawn(30, 20, 10, seed).flipped for seed in range(20))


def test_black_and_white_are_the_ends_of_the_range():
    image = Image.new("RGB", (4, 4), "white")
    image.paste("black", (0, 0, 2, 4))
    values = pixels(image, Placement((4, 4), 0, 0, True), 4)
    assert values.dtype == torch.float32 and values.shape == (3, 4, 4)
    assert values[:, :, :2].eq(1).all() and values[:, :, 2:].eq(-1).all()


def test_the_two_views_of_a_centre_crop_take_turns():
    """Two variants were the same flip for half of all images: each was drawn anew."""
    firsts = set()
    for row in range(20):
        flips = []
        for epoch in range(4):
            numbers = np.random.default_rng(row)
            made = place((64, 48), 32, center_crop=True, random_flip=True, rng=numbers, epoch=epoch)
            flips.append(made.flipped)
        assert flips == [flips[0], not flips[0]] * 2
        firsts.add(flips[0])
    assert firsts == {False, True}
    still = [
        place((64, 48), 32, center_crop=True, random_flip=False, rng=np.random.default_rng(0), epoch=e) for e in (0, 1)
    ]
    assert not any(one.flipped for one in still)


@settings(deadline=None, max_examples=200)
@given(SIDES, SIDES, st.integers(1, 64), st.integers(1, 64), SEEDS, st.booleans())
def test_a_frame_is_covered_by_the_smallest_image_that_does(w, h, wide, high, seed, center):
    if max(w, h) > 32 * min(w, h):
        return
    numbers = np.random.default_rng(seed)
    placement = place((w, h), (wide, high), center_crop=center, random_flip=True, rng=numbers)
    width, height = placement.resized
    assert (width == wide and height >= high) or (height == high and width >= wide)
    assert 0 <= placement.left <= width - wide and 0 <= placement.top <= height - high
    image = an_image(w, h, seed)
    assert pixels(image, placement, (wide, high)).shape == (3, high, wide)
    ids = time_ids(placement, image.size, (wide, high))
    left = width - placement.left - wide if placement.flipped else placement.left
    assert ids == [h, w, placement.top, left, high, wide]


@pytest.mark.parametrize(("size", "side"), [((64, 48), 32), ((48, 64), 32), ((31, 97), 20), ((50, 50), 17)])
def test_a_square_frame_is_a_resolution(size, side):
    def made(frame):
        return place(size, frame, center_crop=False, random_flip=True, rng=np.random.default_rng(1))

    assert made(side) == made((side, side))
