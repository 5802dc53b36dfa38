"""Results that are kept by all that they depend on, and no more of them than were asked for."""

from __future__ import annotations

from accel.text.cache import TextCache


def test_the_result_that_was_not_used_for_longest_goes_first():
    cache = TextCache(2)
    for key in "abacab":
        assert cache.get(key, key.upper) == key.upper()
    assert cache.made == 4  # b, which c drove out, was made twice
    cache.clear()
    assert cache.get("b", lambda: "again") == "again"


def test_nothing_is_kept_where_nothing_is_to_be():
    cache = TextCache(0)
    assert [cache.get("a", object) is cache.get("a", object), cache.made] == [False, 2]
