"""Interleaved timing, and the statistics of its samples."""

from __future__ import annotations

import time

import numpy as np
import pytest

from accel.bench import timing


def test_rounds_are_interleaved_and_rotate():
    order, samples = [], {"s": {"a": [], "b": [], "c": []}}
    calls = {"s": {name: lambda name=name: order.append(name) for name in "abc"}}
    timing.interleave(calls, samples, rounds=3, lead_in={"s": False}, failed=lambda *_: None)
    assert order == list("abcbcacab")
    assert {len(values) for values in samples["s"].values()} == {3}


def test_a_short_call_follows_an_untimed_one():
    order, samples = [], {"s": {"a": []}}
    timing.interleave(
        {"s": {"a": lambda: order.append(1)}}, samples, rounds=2, lead_in={"s": True}, failed=lambda *_: None
    )
    assert len(order) == 4 and len(samples["s"]["a"]) == 2


def test_a_gpu_is_kept_at_work_until_its_clocks_are_up():
    order, samples = [], {"s": {"a": []}}
    call = lambda: (order.append(time.perf_counter()), time.sleep(0.002))  # noqa: E731
    timing.interleave(
        {"s": {"a": call}}, samples, rounds=1, lead_in={"s": True}, lead_in_s=0.03, failed=lambda *_: None
    )
    assert order[-1] - order[0] >= 0.03 and len(order) > 3 and len(samples["s"]["a"]) == 1


def test_the_time_budget_waits_for_five_rounds():
    samples = {"s": {"a": []}}
    calls = {"s": {"a": lambda: time.sleep(0.002)}}
    timing.interleave(calls, samples, rounds=50, seconds=1e-6, lead_in={"s": False}, failed=lambda *_: None)
    assert len(samples["s"]["a"]) == timing.MINIMUM_ROUNDS


@pytest.mark.parametrize("rounds", [5, 9])
def test_it_stops_when_the_caller_has_enough_and_not_before_five_rounds(rounds):
    samples = {"s": {"a": []}}
    enough = lambda: len(samples["s"]["a"]) in (1, rounds)  # noqa: E731
    timing.interleave(
        {"s": {"a": lambda: None}}, samples, rounds=50, lead_in={"s": False}, failed=lambda *_: None, enough=enough
    )
    assert len(samples["s"]["a"]) == rounds


def test_a_variant_that_breaks_leaves_the_others_running():
    def broken():
        raise RuntimeError("lost the device")

    samples, told = {"s": {"a": [], "b": []}}, []
    timing.interleave(
        {"s": {"a": broken, "b": lambda: None}},
        samples,
        rounds=3,
        lead_in={"s": False},
        failed=lambda name, error: told.append((name, str(error))),
    )
    assert told == [("a", "lost the device")]
    assert (len(samples["s"]["a"]), len(samples["s"]["b"])) == (0, 3)


def test_statistics():
    found = timing.summary([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (found.n, found.min_s, found.p50_s, found.mean_s) == (5, 1.0, 3.0, 22.0)
    assert found.p90_s == pytest.approx(np.percentile([4, 1, 2, 3, 100], 90))
    assert timing.summary([]) is None


def test_a_paired_ratio_ignores_what_slowed_both_down():
    noise = np.random.default_rng(1).uniform(1, 10, 30)
    found = timing.speedup(2 * noise, noise)
    assert found.ratio == pytest.approx(2) and found.low == pytest.approx(2) and found.high == pytest.approx(2)


def test_an_uncertain_ratio_has_a_wide_interval_and_few_rounds_have_none():
    values = np.random.default_rng(2).uniform(1, 10, (2, 30))
    found = timing.speedup(*values)
    assert found.low < found.ratio < found.high and found.high - found.low > 0.2
    assert timing.speedup([1.0, 1.0], [2.0, 2.0]) == timing.Ratio(ratio=0.5, low=None, high=None)
    assert timing.speedup([], [1.0]) is None
