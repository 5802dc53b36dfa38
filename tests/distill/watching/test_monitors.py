"""A run that goes wrong says why."""

import dataclasses

from accel.distill import recipes, settings
from accel.distill.few_step.dmd2 import DMD2
from accel.distill.run import execute
from accel.distill.watching import monitors
from accel.distill.watching.monitors import Monitor, Watch

LATE = Monitor("critic/lag", 1.5, "it lags", "--ratio 9")


def test_one_value_says_nothing_and_many_say_it_once():
    watch = Watch([LATE])
    said = [text for value in [9.0] + [1.0] * 200 for text in watch.see({"critic/lag": value})]
    assert said == []
    said = [text for _ in range(200) for text in watch.see({"critic/lag": 2.0, "other": 7.0})]
    assert len(said) == 1 and "critic/lag is" in said[0] and "it lags" in said[0] and "--ratio 9" in said[0]


def test_a_figure_that_is_not_there_is_not_waited_for():
    watch = Watch([LATE])
    assert [text for _ in range(200) for text in watch.see({"loss": 2.0})] == []


def test_a_run_names_its_symptoms_once(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(monitors, "WINDOW", 2)
    monkeypatch.setattr(
        DMD2,
        "monitors",
        [dataclasses.replace(one, above=one.above * low) for one, low in zip(DMD2.monitors, (0, 10), strict=True)],
    )
    recipe = recipes.changed(
        settings.DMD2Recipe(),
        model=str(small),
        data="digits",
        resolution=64,
        random_flip=False,
        cache="none",
        steps=4,
        batch=2,
        few_steps=1,
        ratio=1,
        sample_every=0,
        log="none",
    )
    execute(recipe, tmp_path / "out")
    said = capsys.readouterr().err
    assert said.count("does not keep up") == 1 and "--ratio" in said and "no slope" not in said
