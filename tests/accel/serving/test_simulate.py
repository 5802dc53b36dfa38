"""The simulator against what can be computed by hand."""

import json

import pytest

from accel.serving import simulate as simulator
from accel.serving.simulate import Load, Times, simulate

# A call costs 1 s and 0.1 s for each row: sharing pays.
TIMES = Times({1: 1.1, 8: 1.8}, image=0.5)


def test_one_image_takes_its_steps_and_its_decoding():
    made = simulate(Load([3.0], [4], [1]), TIMES)
    assert made.p50 == pytest.approx(4 * 1.1 + 0.5) and made.batch == 1 and made.busy == pytest.approx(1)


def test_images_that_arrive_together_share_calls():
    load = Load([0.0] * 8, [4] * 8, [1] * 8)
    shared, alone = simulate(load, TIMES), simulate(load, TIMES, share=False)
    assert shared.seconds == pytest.approx(4 * 1.8 + 8 * 0.5) and shared.batch == 8
    assert alone.seconds == pytest.approx(8 * (4 * 1.1 + 0.5)) and alone.batch == 1


def test_an_image_joins_at_the_next_step_and_does_not_wait_for_the_end():
    times = Times({1: 1.0, 2: 1.0})
    made = simulate(Load([0.0, 0.5], [10, 2], [1, 1]), times)
    assert made.seconds == pytest.approx(10) and made.p50 == pytest.approx((2.5 + 10) / 2)


def test_short_ones_overtake_with_the_policy_for_it():
    load = Load([0.0, 0.0, 0.0], [20, 20, 1], [1, 1, 1])
    fifo, shortest = (simulate(load, Times({1: 1.0}), rows=1, policy=p) for p in ("fifo", "shortest"))
    assert shortest.p50 == fifo.p50 - 19 and shortest.seconds == fifo.seconds == 41


def test_two_machines_make_twice_as_much():
    load = Load([0.0] * 40, [4] * 40, [1] * 40)
    one, two = (simulate(load, TIMES, machines=n, rows=4) for n in (1, 2))
    assert two.rate == pytest.approx(2 * one.rate) and two.busy == pytest.approx(1)


def test_a_load_is_the_same_for_the_same_seed_and_has_its_rate():
    mix = {(4, 1): 3, (25, 2): 1}
    load = Load.poisson(5, 4000, mix)
    assert load == Load.poisson(5, 4000, mix)
    assert load.arrived[-1] == pytest.approx(4000 / 5, rel=0.1)
    assert sum(steps == 4 for steps in load.steps) == pytest.approx(3000, rel=0.1)


def test_times_between_and_beyond_what_was_measured():
    assert TIMES.of(1) == 1.1 and TIMES.of(16) == pytest.approx(3.6) and 1.1 < TIMES.of(4) < 1.8


def test_it_runs_on_what_the_benchmark_writes(tmp_path, capsys):
    measured = {"step_seconds": {"1": 0.01, "8": 0.05}, "image_seconds": 0.01}
    measured["mix"] = [{"steps": 4, "rows": 1, "share": 0.8}, {"steps": 25, "rows": 2, "share": 0.2}]
    (tmp_path / "m.json").write_text(json.dumps(measured))
    assert simulator.main([str(tmp_path / "m.json"), "--rate", "20", "--images", "200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step batching") and "images/s" in lines[1]
