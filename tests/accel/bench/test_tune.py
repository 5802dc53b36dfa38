"""`accel tune` measures engines for each network, keeps the best, and `auto` takes it while it can run."""

from __future__ import annotations

import json

import numpy as np
import pytest

import accel
from accel import cli
from accel.bench import tune
from accel.bundle import Bundle, tuned
from accel.bundle.tuned import Choice
from accel.engines import choose, select
from accel.engines.base import Status

BUNDLE = "digits/1step-int8"
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@pytest.fixture
def bundle(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    return Bundle.open(BUNDLE)


def test_the_fastest_is_kept_and_auto_takes_it(bundle, capsys):
    assert cli.main(["tune", BUNDLE, "--seconds", "0.5", "--json", "--quiet"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert tuned.file_of(bundle).is_file() and set(said["choices"]) == {"text_encoder", "unet", "vae_decoder"}
    ran = {title.split(",")[0] for title in said["measured"]["unet"]}
    assert ran == {"onnxruntime", "openvino"}  # eager rounds in float, and torch.compile is never auto's
    for name, choice in tuned.read(bundle).items():
        with accel.load_engine(bundle, name) as engine:
            assert engine.name == choice.engine
    assert said["image"]["tuned"] <= said["image"]["single"]
    assert cli.main(["tune", BUNDLE, "--forget"]) == 0 and not tuned.read(bundle)
    assert "forgotten" in capsys.readouterr().out


def test_options_of_the_record_reach_the_engine(bundle, monkeypatch):
    tuned.write(bundle, {"unet": Choice("onnxruntime", {"folds": False, "threads": 1}, 0.1)}, {})
    loaded = []
    monkeypatch.setattr(select, "_load", lambda name, bundle, component, options: loaded.append((name, options)))
    accel.load_engine(bundle, "unet")
    accel.load_engine(bundle, "unet", threads=2)
    accel.load_engine(bundle, "unet", engine="openvino")
    assert loaded[0] == ("onnxruntime", {"folds": False, "threads": 1})
    assert loaded[1][1] == {"threads": 2} and loaded[2] == ("openvino", {})  # what is asked for goes before the record


def test_an_engine_that_cannot_run_any_more_is_passed_over(bundle, monkeypatch):
    tuned.write(bundle, {"unet": Choice("openvino")}, {})
    record = bundle.component("unet")
    assert choose("auto", record, bundle) == "openvino"
    status = select.status
    monkeypatch.setattr(select, "status", lambda name: Status(False, "gone") if name == "openvino" else status(name))
    assert choose("auto", record, bundle) == "onnxruntime"


@pytest.mark.parametrize(
    "change",
    [
        dict(machine="another processor, 64 threads"),
        dict(versions={"torch": "1.0"}),
        dict(schema="accel-tuned/0"),
        dict(choices={"unet": {"engine": "openvino", "options": {"device": "GPU"}}}),
        dict(choices={"unet": {"engine": 3}}),
        dict(choices={"unet": "openvino"}),
        dict(choices=None),
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_record_of_another_place_or_with_other_things_counts_for_nothing(bundle, change):
    file = tuned.write(bundle, {"unet": Choice("openvino")}, {})
    assert tuned.read(bundle) == {"unet": Choice("openvino")}
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert tuned.read(bundle) == {}
    file.write_text("nonsense")
    assert tuned.read(bundle) == {}


def test_a_mixture_that_is_no_faster_is_not_kept(bundle, monkeypatch):
    measured = {"onnxruntime": 1.0, "openvino": 2.0}, {"onnxruntime": 2.0, "openvino": 1.5}
    by_name = dict(zip(("unet", "vae_decoder"), measured, strict=True))
    monkeypatch.setattr(tune, "component_names", lambda bundle: list(by_name))

    def found(bundle, name, seconds):
        return {engine: Choice(engine, {}, taken) for engine, taken in by_name[name].items()}, by_name[name]

    monkeypatch.setattr(tune, "_of_component", found)
    for seconds, engines in ((2.0, {"onnxruntime", "openvino"}), (3.0, {"onnxruntime"})):
        times = {"tuned": seconds, "single": 2.9}
        monkeypatch.setattr(tune, "_images", lambda *args, times=times: (dict(times), {}))
        result = tune.tune(bundle)
        assert result.single == "onnxruntime" and {c.engine for c in result.choices.values()} == engines
        assert result.image["tuned"] == min(seconds, 2.9) and result.psnr is None


@pytest.mark.parametrize(("noise", "taken"), [(1e-3, True), (0.1, False)])
def test_bfloat16_is_taken_only_where_the_image_stays_the_same(bundle, monkeypatch, noise, taken):
    ways = {"openvino": Choice("openvino", {}, 2.0), "openvino, dtype=bf16": Choice("openvino", {"dtype": "bf16"}, 1.0)}
    monkeypatch.setattr(tune, "component_names", lambda bundle: ["unet"])
    seconds = {title: way.seconds for title, way in ways.items()}
    monkeypatch.setattr(tune, "_of_component", lambda *args: (ways, seconds))
    picture = np.zeros((4, 4, 3))

    def images(bundle, choices, seconds):
        low = "dtype" in choices["tuned"]["unet"].options
        return {"tuned": 1.0 if low else 2.0, "single": 2.0}, {"tuned": picture + noise, "single": picture}

    monkeypatch.setattr(tune, "_images", images)
    result = tune.tune(bundle)
    assert result.choices["unet"].options == ({"dtype": "bf16"} if taken else {})
    assert result.psnr == pytest.approx(-20 * np.log10(noise))
    tuned.write(bundle, result.choices, {})
    assert tuned.read(bundle)["unet"].options == result.choices["unet"].options


def test_the_images_that_are_compared_begin_with_the_same_noise(bundle):
    ways = {way: {name: Choice("onnxruntime") for name in tune.component_names(bundle)} for way in ("tuned", "single")}
    _, pictures = tune._images(bundle, ways, 0.1)
    np.testing.assert_array_equal(pictures["tuned"], pictures["single"])


def test_nonsense_is_refused(bundle, capsys):
    assert cli.main(["tune", BUNDLE, "--seconds", "0"]) != 0 and "makes no sense" in capsys.readouterr().err
