"""The order of examples: every row as often as its weight says, buckets in whole steps, and nothing twice by chance."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from accel.distill.data import rng
from accel.distill.data.buckets import Buckets, assign, shapes_of
from accel.distill.data.order import HELD_OUT, order_of, turn
from accel.errors import UserError


def row_of(order, index):
    rows, place, epoch = order(index)
    return int(rows[place]), epoch


def test_one_data_set_is_in_the_order_that_it_always_was():
    order = order_of([10], 3)
    assert [row_of(order, index) for index in range(40)] == [rng.row(index, 10, 3) for index in range(40)]


@pytest.mark.parametrize("weights", [[1], [3, 1], [1, 1, 1], [5, 0, 2, 11], [10**20, 1]])
def test_turns_number_each_stream_without_gaps_and_in_proportion(weights):
    counts = Counter()
    for number in range(500):
        which, own = turn(number, weights)
        assert own == counts[which]
        counts[which] += 1
        for stream, weight in enumerate(weights):
            assert abs(counts[stream] - (number + 1) * weight / sum(weights)) < len(weights)


def test_a_mixture_draws_by_weight_and_each_set_in_whole_epochs():
    order = order_of([30, 7], 0, shares=[Fraction(3, 4), Fraction(1, 4)])
    seen = Counter(row_of(order, index) for index in range(2048))
    first = sum(count for (row, _), count in seen.items() if row < 30)
    assert first == 1536 and max(seen.values()) == 1  # a row once in an epoch
    for rows in (range(30), range(30, 37)):
        epochs = [epoch for row, epoch in (row_of(order, index) for index in range(2048)) if row in rows]
        assert epochs == sorted(epochs) and epochs[0] == 0
    by_row = Counter(row for row, _ in seen.elements())
    assert max(by_row[row] for row in range(30)) - min(by_row[row] for row in range(30)) <= 1
    assert max(by_row[row] for row in range(30, 37)) - min(by_row[row] for row in range(30, 37)) <= 1


def test_turns_do_not_fall_in_step_with_the_phases_of_a_method():
    """One of five in equal distances would leave a phase of every fifth step without this data set."""
    order = order_of([50, 50], 0, shares=[Fraction(1, 5), Fraction(4, 5)])
    for phase in range(5):
        share = np.mean([row_of(order, index)[0] < 50 for index in range(phase, 5000, 5)])
        assert 0.15 < share < 0.25


def buckets_of(counts):
    of_row = np.repeat(np.arange(len(counts)), counts).astype(np.int16)
    return Buckets(tuple((64, 64 + 16 * number) for number in range(len(counts))), of_row)


@pytest.mark.parametrize("shares", [[Fraction(1)], [Fraction(1, 2), Fraction(1, 2)]])
def test_a_step_is_of_one_bucket_and_all_rows_are_shown_alike(shares):
    buckets = buckets_of([24, 12, 4])
    counts = [40] if len(shares) == 1 else [30, 10]
    order = order_of(counts, 1, shares=shares, buckets=buckets, group=8)
    for group in range(200):
        assert len({buckets.of_row[row_of(order, 8 * group + at)[0]] for at in range(8)}) == 1
    seen = Counter(row_of(order, index)[0] for index in range(40960))
    expected = np.repeat([float(share) / count for share, count in zip(shares, counts, strict=True)], counts) * 40960
    assert max(abs(seen[row] / expected[row] - 1) for row in range(40)) < 0.06


def test_another_division_of_a_step_shows_the_same_rows():
    order = order_of([40], 1, buckets=buckets_of([25, 15]), group=8)
    assert pickle.loads(pickle.dumps(order))(12345)[1:] == order(12345)[1:]
    assert row_of(order, 777) == row_of(order_of([40], 1, buckets=buckets_of([25, 15]), group=8), 777)


def test_what_is_held_out_is_never_trained_on():
    order = order_of([40], 1, held_out=6)
    held = {row_of(order, index)[0] for batch in order.held_out_batches(4) for index in batch}
    trained = {row_of(order, index)[0] for index in range(400)}
    assert len(held) == 6 and not held & trained and held | trained == set(range(40))
    assert [len(batch) for batch in order.held_out_batches(4)] == [4, 2] and order.count == 34
    with pytest.raises(UserError, match="leave none to train on"):
        order_of([40], 1, held_out=40)


def test_held_out_batches_are_of_one_bucket():
    buckets = buckets_of([25, 15])
    order = order_of([40], 1, buckets=buckets, group=8, held_out=9)
    batches = order.held_out_batches(4)
    assert sum(map(len, batches)) == 9 and batches[0][0] == HELD_OUT
    for batch in batches:
        assert len({buckets.of_row[row_of(order, index)[0]] for index in batch}) == 1


def test_the_frames_of_1024_px_are_those_of_sdxl():
    shapes = shapes_of(1024, 64)
    assert {(1024, 1024), (832, 1216), (896, 1152), (704, 1344), (512, 2048), (1536, 640), (1344, 768)} <= set(shapes)
    assert {(high, wide) for wide, high in shapes} == set(shapes)
    assert all(0.9 < wide * high / 1024**2 <= 1 and wide % 64 == high % 64 == 0 for wide, high in shapes)
    for step in (48, 2048):
        with pytest.raises(UserError, match="do not hold 1024 px"):
            shapes_of(1024, step)


def test_images_go_to_the_nearest_aspect_and_small_buckets_are_given_up():
    sizes = np.array([[100, 100]] * 5 + [[200, 100]] * 4 + [[100, 300]] + [[np.nan, np.nan]])
    buckets = assign(sizes, 1024, 64, least=1)
    shapes = [buckets.shape(row) if buckets.of_row[row] >= 0 else None for row in range(11)]
    assert shapes == [(1024, 1024)] * 5 + [(1408, 704)] * 4 + [(576, 1728), None]
    merged = assign(sizes, 1024, 64, least=4)
    assert merged.shapes == ((1024, 1024), (1408, 704)) and merged.shape(9) == (1024, 1024)
    assert assign(sizes, 1024, 64, least=100).shapes == ((1024, 1024),)
