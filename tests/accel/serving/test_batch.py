"""Which images make the next call."""

import pytest

from accel.bundle.shape_profiles import Range
from accel.errors import UserError
from accel.serving.batch import PATIENCE, Candidate, Shapes, next_call


def names(candidates, rows, **how):
    return [one.id for one in next_call(candidates, rows, **how)]


def test_the_oldest_go_first_and_as_many_as_fit():
    waiting = [Candidate("c", 3, 4), Candidate("a", 1, 25, rows=2), Candidate("b", 2, 4)]
    assert names(waiting, 8) == ["a", "b", "c"]
    assert names(waiting, 3) == ["a", "b"]
    assert names(waiting, 1) == ["b"], "an image with guidance does not fit into one row"
    assert next_call([], 8) == []


def test_a_small_image_fills_the_row_that_a_large_one_left():
    waiting = [Candidate("a", 1, 4), Candidate("guided", 2, 4, rows=2), Candidate("b", 3, 4)]
    assert names(waiting, 2) == ["a", "b"]


def test_only_images_that_are_alike_share_a_call():
    waiting = [Candidate("a", 1, 4, key=512), Candidate("b", 2, 4, key=768), Candidate("c", 3, 4, key=512)]
    assert names(waiting, 8) == ["a", "c"]
    assert names(waiting[1:], 8) == ["b"]


def test_the_shortest_go_first_but_nobody_waits_for_ever():
    waiting = [Candidate("long", 0, 25), Candidate("short", 5, 2), Candidate("guided", 4, 2, rows=2)]
    assert names(waiting, 1, policy="shortest", now=6) == ["short"]
    assert names(waiting, 8, policy="shortest", now=6) == ["short", "guided", "long"]
    assert names(waiting, 1, policy="shortest", now=PATIENCE + 1) == ["long"]


@pytest.mark.parametrize(
    "shapes, rows, expected",
    [(Shapes(8), 3, 3), (Shapes(8, least=4), 3, 4), (Shapes(8, fixed=True), 3, 8), (Shapes(8), 8, 8)],
)
def test_a_call_is_filled_up_to_a_shape_that_the_engine_has(shapes, rows, expected):
    assert shapes.padded(rows) == expected


def test_the_shapes_are_those_of_the_unet():
    assert Shapes.of(Range(1, 4, 32), None) == Shapes(8, 1)
    assert Shapes.of(Range(1, 1, 4), None) == Shapes(4, 1)
    assert Shapes.of(Range(1, 4, 32), None, int8=True) == Shapes(8, 2)
    assert Shapes.of(Range(1, 1, 1), None, int8=True) == Shapes(1, 1, fixed=True)
    assert Shapes.of(Range(2, 2, 2), None) == Shapes(2, 2, fixed=True)
    with pytest.raises(UserError, match=r"invalid batch: 64 rows \(this UNet takes 1 to 32\)"):
        Shapes.of(Range(1, 4, 32), 64)
