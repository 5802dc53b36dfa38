"""What an error for an unknown name says."""

from accel.errors import unknown


def test_the_nearest_name_is_suggested_and_no_empty_one_is_listed():
    error = unknown("decoupled", "hybird", ("", "full", "hybrid"))
    assert error.message == "unknown decoupled 'hybird'" and error.fix == "did you mean hybrid? one of: full, hybrid"
    assert unknown("engine", "x", ["toy"], of="this bundle").message == "unknown engine 'x' of this bundle"
