"""`accel export`: wrong options, interrupts and full disks leave everything as it was."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--opset", "7"], "opset 7"),
        (["--precision", "fp4"], "fp4"),
        (["--profile", "huge"], "huge"),
        (["--profile", "size=102"], "multiple"),
        (["--components", "unet,brain"], "brain"),
        (["--steps", "0"], "steps"),
        (["--guidance", "nan"], "guidance"),
        (["--guidance", "-1"], "guidance"),
        (["--sampler", "plms"], "plms"),
        (["--sampler", "dmd2", "--steps", "0"], "steps"),
    ],
)
def test_an_export_with_wrong_options_says_so_and_leaves_nothing(refused, smallest, tmp_path, args, words):
    assert words in refused("export", smallest, tmp_path / "a" / "out", *args)
    assert not (tmp_path / "a").exists() or list((tmp_path / "a").iterdir()) == []


def test_an_export_of_nan_weights_names_the_weight_and_keeps_the_old_bundle(
    refused, smallest, bundle_copy, tmp_path, contents
):
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(smallest, tmp_path / "source"))
    (path,) = (source / "text_encoder").glob("*.safetensors")
    state = load_file(path)
    name = next(key for key in state if key.endswith("fc2.weight"))
    state[name][0, 0] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    before = contents(bundle_copy)
    err = refused("export", source, bundle_copy, "--components", "text_encoder", "--overwrite")
    assert name.removeprefix("text_model.") in err and "not finite" in err
    assert contents(bundle_copy) == before
    assert [p.name for p in bundle_copy.parent.iterdir() if p.name.startswith(".")] == []


def test_an_export_to_where_something_is_keeps_it(refused, smallest, bundle_copy, tmp_path, contents):
    before = contents(bundle_copy)
    assert "--overwrite" in refused("export", smallest, bundle_copy)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "me.jpg").write_text("me")
    assert "not something accel wrote" in refused("export", smallest, photos, "--overwrite")
    assert "not something accel wrote" in refused("export", smallest, smallest, "--overwrite")
    assert contents(bundle_copy) == before and contents(photos) == {"me.jpg": b"me"}


def test_an_export_to_a_place_without_permission_is_refused_at_once(refused, smallest, user_folder, drop_privileges):
    source = shutil.copytree(smallest, user_folder / "source")
    locked = user_folder / "locked"
    locked.mkdir(mode=0o555)
    drop_privileges()
    assert "no permission" in refused("export", source, locked / "out", "--components", "vae_decoder")


def test_an_export_prints_its_manifest_as_json(accel, smallest, tmp_path):
    code, out, _ = accel(
        "export",
        smallest,
        tmp_path / "out",
        "--components",
        " vae_decoder",
        "--profile",
        "static",
        "--json",
        "--sampler",
        "dmd2",
        "--steps",
        2,
    )
    assert code == 0
    manifest = json.loads(out)
    assert list(manifest["components"]) == ["vae_decoder"]
    assert len(manifest["sampler"]["timesteps"]) == 2 and manifest["sampler"]["guidance"] == 0
    code, out, _ = accel("inspect", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["manifest"] == manifest | json.loads((tmp_path / "out" / "accel.json").read_text())


def running_export(source: Path, out: Path) -> subprocess.Popen:
    """An export in a process of its own, caught in the middle: its folder is there and not yet in place."""
    command = [sys.executable, "-m", "accel", "export", source, out]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A suite that was started in the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list(out.parent.glob(f".{out.name}.partial-*/*/model.onnx")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    return process


def test_ctrl_c_in_the_middle_of_an_export_leaves_nothing(smallest, tmp_path):
    process = running_export(smallest, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_is_never_taken_for_a_bundle_and_the_next_one_tidies_up(refused, accel, smallest, tmp_path):
    process = running_export(smallest, tmp_path / "out")
    process.kill()
    process.communicate()
    (partial,) = tmp_path.glob(".out.partial-*")
    refused("inspect", partial)
    refused("inspect", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []  # whoever meets what is left tidies up
    code, _, _ = accel("export", smallest, tmp_path / "out", "--components", "text_encoder", "--profile", "static")
    assert code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_really_full_is_named(refused, smallest, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", disk], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        # As if the estimate had been met when the work began: somebody else fills the disk meanwhile.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("accel.export.pipeline.require_space", lambda *_: None)
            err = refused("export", smallest, disk / "out", "--components", "text_encoder", "--profile", "static")
        assert "no space left" in err
        assert list(disk.iterdir()) == []
        assert "are needed" in refused("export", smallest, disk / "out", "--components", "text_encoder")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
