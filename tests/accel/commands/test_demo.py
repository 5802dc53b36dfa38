"""The demo is the first thing a newcomer types: it must show true digits, true times and the same images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from accel.bench.contact_sheet import contact_sheet
from accel.cli import main


def test_contact_sheet_has_a_row_per_engine_and_keeps_the_pixels():
    red, blue = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = np.asarray(contact_sheet({"one": red, "two": blue}, ["a", "b"], cell=32))
    assert (sheet == [255, 0, 0]).all(-1).sum() == 2 * 32 * 32
    assert (sheet == [0, 0, 255]).all(-1).sum() == 2 * 32 * 32
    assert (sheet == [30, 30, 30]).all(-1).any()  # labels are written


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--out", str(out), "--rounds", "2"]) == 0
    return out


@pytest.mark.parametrize("name, steps", [("4step", 4), ("1step", 1)])
def test_demo_measures_speed_and_shows_the_same_image(demo, name, steps):
    document = json.loads((demo / f"{name}.json").read_text())
    assert document["work"]["steps"] == steps and document["work"]["guidance"] == 0
    rows = {row["variant"]: row for row in document["rows"]}
    assert {"eager", "onnxruntime"} <= set(rows)
    for variant, row in rows.items():
        assert row["status"] == "measured" and row["scopes"]["image"]["timing"]["p50_s"] > 0
        if variant != "eager":
            assert row["parity"]["image"]["max_abs"] <= 1  # in 1/255
            assert row["scopes"]["image"]["speedup"]["eager"]["ratio"] > 0
    assert "<html" in (demo / f"{name}.html").read_text()


@pytest.mark.parametrize("name", ["4step", "1step"])
def test_the_int8_bundle_that_ships_is_timed_against_eager(demo, name):
    rows = json.loads((demo / f"{name}-int8.json").read_text())
    assert "onnxruntime int8" in rows
    for row in rows.values():
        assert row["seconds"] > 0 and row["speedup"] > 0
        assert row["psnr"] > 15  # four steps of int8 on a processor that rounds otherwise: no less than this


def test_one_sheet_shows_every_model_on_every_engine(demo):
    width, height = Image.open(demo / "demo.png").size
    assert width > 900 and height > 2 * 3 * 96  # two engines at least and one of int8, of each model


@pytest.mark.parametrize("name", ["4step", "1step"])
def test_the_compiled_model_draws_the_digits_that_were_asked_for(demo, name):
    torch = pytest.importorskip("torch")
    import accel
    from accel.distill.evaluation.digits import prompt_accuracy
    from accel.distill.sources.digits import prompt_set

    texts, digits = zip(*prompt_set(2), strict=True)
    images = accel.load(demo / name, engine="onnxruntime")(list(texts), seed=0, output_type="np").images
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    assert prompt_accuracy(pixels, torch.tensor(digits)) >= 0.9


def test_two_models_of_one_name_are_refused(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), "--model", "digits/1step", "other/1step"]) == 1
    assert "two models of one name" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_demo_does_not_write_over_a_folder_that_is_in_use(demo, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in demo.iterdir()}
    assert main(["demo", "--out", str(demo)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert before == {path.name: path.stat().st_mtime_ns for path in demo.iterdir()}
