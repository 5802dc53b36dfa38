"""`accel inspect` and `accel doctor`: reports for people and for machines."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize("verb", [["inspect"], ["run", "--prompt", "x"]])
def test_a_path_that_does_not_exist_or_is_no_bundle(refused, tmp_path, smallest, verb):
    out = ["--out", tmp_path / "o.png"] if verb[0] == "run" else []
    verb, *rest = verb
    assert "no such folder" in refused(verb, tmp_path / "nothing", *rest, *out)
    (tmp_path / "photos").mkdir()
    assert "is not a bundle" in refused(verb, tmp_path / "photos", *rest, *out)
    if verb == "inspect":  # run takes a pipeline folder as it is
        assert f"fix: accel export {smallest}" in refused(verb, smallest, *rest, *out)
    assert not (tmp_path / "o.png").exists()


def test_inspect_for_people_names_every_component_and_engine(accel, smallest_bundle):
    code, out, _ = accel("inspect", smallest_bundle)
    assert code == 0
    for word in ("text_encoder", "unet", "vae_decoder", "onnxruntime", "eager", "files match", "latent_sample"):
        assert word in out


def test_inspect_and_doctor_print_json(accel, smallest_bundle):
    code, out, _ = accel("inspect", smallest_bundle, "--json")
    report = json.loads(out)
    assert code == 0 and report["intact"] is True and report["problem"] is None
    assert report["manifest"]["components"].keys() == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    code, out, _ = accel("doctor", "--fast", "--json")
    assert code == 0
    assert json.loads(out)["engines"]["onnxruntime"]["ok"]
