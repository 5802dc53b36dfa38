"""`accel push`, `accel run` and `accel inspect` with a name of the hub."""

import json

REPO = "someone/digits"


def test_push_then_run_and_inspect_by_name(accel, hub, tmp_path):
    code, out, _ = accel("push", "digits/1step-int8", REPO)
    assert code == 0 and f"accel run {REPO} --prompt" in out
    image = tmp_path / "seven.png"
    run = ("run", REPO, "--prompt", "a handwritten seven", "--engine", "onnxruntime", "--threads", "1", "--out", image)
    code, _, err = accel(*run)
    assert code == 0 and image.is_file(), err
    code, out, _ = accel("inspect", REPO, "--json")
    found = json.loads(out)
    assert code == 0 and found["origin"]["repo"] == REPO and found["intact"] is True
    assert 0 < len(found["downloaded"]) < len(found["manifest"]["files"])
    code, out, _ = accel("inspect", REPO)
    assert "(downloaded); the others arrive when they are used" in out


def test_a_dry_run_sends_nothing(accel, hub):
    code, out, _ = accel("push", "digits/1step-int8", REPO, "--dry-run")
    assert code == 0 and out.startswith("---\nlicense: ") and "unet/weights.onnx_data" in out
    assert hub.requests == []
    code, out, _ = accel("push", "digits/1step-int8", REPO, "--dry-run", "--json")
    assert code == 0 and "unet/graph.onnx" in json.loads(out)["files"]


def test_a_licence_is_asked_for(refused, smallest_bundle):
    assert "--license" in refused("push", smallest_bundle, REPO)
