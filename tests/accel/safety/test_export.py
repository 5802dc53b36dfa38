"""The checker is exported where it is asked for, stays float32, and the command line says what it finds."""

from __future__ import annotations

import json

import pytest

from accel.bundle import Bundle
from accel.cli import main
from accel.errors import Notice, UserError
from accel.export.int8.quantize import quantize
from accel.export.int8.settings import Int8Settings, complete
from accel.export.pipeline import export_pipeline
from accel.safety.preprocessing import FILE

SHORT = dict(components=("vae_encoder",), profile="batch=1-4,size=32-64")
CLI = ["--components", "vae_encoder", "--profile", "batch=1-4,size=32-64", "--json"]


def test_it_is_exported_on_request_alone_and_the_note_names_the_flag(checked, checked_bundle, tmp_path):
    with pytest.warns(Notice, match="--safety-checker"):
        bundle = export_pipeline(checked, tmp_path / "out", **SHORT)
    assert list(bundle.manifest.components) == ["vae_encoder"] and FILE not in bundle.manifest.files
    record = checked_bundle.component("safety_checker")
    assert record.dims["images"].max == 4 and FILE in checked_bundle.manifest.files
    assert [spec.shape for spec in record.outputs] == [("images", 3), ("images", 17)]
    assert record.parity["relative_l2"] < 1e-5


@pytest.mark.filterwarnings("error::accel.errors.Notice")
def test_it_stays_float32_in_a_half_precision_bundle(checked, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(checked), str(out), *CLI, "--precision", "fp16", "--safety-checker"]) == 0
    components = Bundle.open(out).manifest.components
    assert components["vae_encoder"].dtype == "float16" and components["safety_checker"].dtype == "float32"
    assert "thousandths" in components["safety_checker"].parity["precision_reason"]


def test_a_model_without_one_and_a_checker_that_cannot_be_run_are_refused_before_the_export(
    smallest, sdxl, checked_copy, edit_json, tmp_path
):
    for model in (smallest, sdxl):
        with pytest.raises(UserError, match="has no safety checker") as error:
            export_pipeline(model, tmp_path / "out", **SHORT, safety_checker=True)
        assert error.value.fix == "leave --safety-checker out"
    edit_json(checked_copy / FILE, do_pad=True)
    with pytest.raises(UserError, match="'do_pad' = True is not supported"):
        export_pipeline(checked_copy, tmp_path / "out", **SHORT, safety_checker=True)
    assert not (tmp_path / "out").exists()


def test_it_is_no_component_of_the_usual_list(checked, tmp_path, capsys):
    with pytest.raises(UserError, match="unknown component"):
        export_pipeline(checked, tmp_path / "out", components=("safety_checker",))


def test_an_exported_bundle_is_not_given_one_by_int8(checked_bundle, tmp_path, capsys):
    command = ["export", str(checked_bundle.path), str(tmp_path / "out"), "--precision", "int8", "--safety-checker"]
    assert main(command) == 1 and "safety-checker" in capsys.readouterr().err


def test_int8_is_calibrated_on_images_that_nobody_blackened(checked_bundle, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(pipeline, *_):
        assert pipeline.safety_checker is None and "safety_checker" not in pipeline.engines
        raise Stop

    monkeypatch.setattr("accel.export.int8.quantize.calibrate", stop)
    with pytest.raises(Stop):
        quantize(checked_bundle, tmp_path / "out", complete(Int8Settings(precision="int8"), "checked"))


# ------------------------------------------------------------------------------------------------------- accel run


def run(model, tmp_path, capsys, *more: str) -> tuple[dict, str]:
    """What `accel run --json` prints, and its notes."""
    capsys.readouterr()
    command = ["run", str(model), "--prompt", "the cat", "--images", "4", "--steps", "2", "--engine", "eager"]
    assert main([*command, "--out", str(tmp_path / "image.png"), "--overwrite", "--json", *more]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_the_command_line_says_which_images_are_black(
    checked, checked_bundle, smallest, edit_thresholds, tmp_path, capsys
):
    strict = edit_thresholds(checked, -2.0)  # every image is rejected
    record, notes = run(strict, tmp_path, capsys)
    assert record["nsfw_content_detected"] == [True] * 4 and record["seconds"]["safety_checker"] > 0
    assert "images 1, 2, 3, 4 of 4 are black: the safety checker rejected" in notes
    record, notes = run(strict, tmp_path, capsys, "--no-safety-checker")
    assert record["nsfw_content_detected"] is None and "black" not in notes
    record, notes = run(edit_thresholds(checked, 2.0), tmp_path, capsys)
    assert record["nsfw_content_detected"] == [False] * 4 and "black" not in notes
    assert len(run(checked_bundle.path, tmp_path, capsys)[0]["nsfw_content_detected"]) == 4
    assert run(smallest, tmp_path, capsys)[0]["nsfw_content_detected"] is None
