"""What a new user would do wrong with engine files: each is refused before TensorRT sees it, with the fix."""

from __future__ import annotations

import json
import os
import shlex

import pytest

import accel
from accel.bundle import Bundle
from accel.cli import main
from accel.errors import UserError
from accel.export.tensorrt.build import build
from accel.trt import engine_files, preflight, trust
from accel.trt.engine_files import Here

NEWEST = pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)


def test_another_gpu_another_tensorrt_another_system(bundle, save, here):
    file = save()
    assert preflight.check(bundle, file, here).ok
    for other, reason in (
        (Here("9.9.9", here.gpu, here.compute_capability), "TensorRT"),
        (Here(here.tensorrt, "Other GPU", here.compute_capability), "Other GPU"),
        (Here(here.tensorrt, here.gpu, "8.6"), "8.6"),
        (Here(here.tensorrt, here.gpu, here.compute_capability, "Windows AMD64"), "Windows"),
    ):
        found = preflight.check(bundle, file, other)
        assert not found.ok and reason in found.reason and found.fix.startswith(f"accel build {bundle.path}")


@NEWEST
def test_the_command_that_helps_builds_the_same_engine_again(bundle, save, tensorrt, edit_manifest):
    """Its profiles and options, for this GPU; profiles only as far as the bundle still takes them."""
    options = dict(optimization_level=0, workspace=1 << 20, refittable=True)
    file = save(["batch=1,size=64", "batch=1-2,size=64-96"], **options)
    command = ["accel", "build", str(bundle.path), "--components", "vae_decoder"]
    given = ["--optimization-level", "0", "--workspace", "1048576", "--refittable"]
    other = Here("9.9.9", "Fake GPU", "9.0")
    words = shlex.split(preflight.check(bundle, file, other).fix)
    assert words == [*command, "--profile", "batch=1,size=64", "--profile", "batch=1-2,size=64-96", *given]
    file.path.unlink()
    assert main(words[1:]) == 0
    again = engine_files.find(bundle)[0]
    assert again.key == file.key

    narrowed = lambda data: data["components"]["vae_decoder"]["dims"]["images"].update(max=1)  # noqa: E731
    edit_manifest(bundle.path, narrowed)
    assert shlex.split(preflight.check(Bundle.open(bundle.path), again, other).fix) == [*command, *given]
    trust.key_file().unlink()  # a stranger's record is not repeated
    assert preflight.check(bundle, again, other).fix.startswith(" ".join(command) + "   (or,")


def test_where_compatible_engines_run(bundle, save):
    file = save(version_compatible=True, hardware_compatible="ampere_plus")

    def ok(version, capability="8.6"):
        return preflight.check(bundle, file, Here(version, "Other GPU", capability)).ok

    assert ok("11.99.0") and ok("12.0.0") and not ok("13.0.0") and not ok("11.0.0")
    assert not ok("11.4.0.106", "7.5")


def test_a_flipped_byte(bundle, save, fit, here):
    file = save()
    data = bytearray(file.path.read_bytes())
    data[len(data) // 2] ^= 1
    file.path.write_bytes(data)
    assert "changed after it was built" in fit(bundle).reason
    file.path.write_bytes(data[:-1])
    assert "bytes where" in fit(bundle).reason
    file.path.unlink()
    with pytest.raises(UserError, match="no TensorRT engine file"):
        preflight.choose(bundle, "vae_decoder", here)


@NEWEST
def test_contents_are_read_once_and_only_of_engine_files_that_fit(bundle, tensorrt, monkeypatch):
    read, changed = [], preflight.changed
    monkeypatch.setattr(preflight, "changed", lambda file, *data: read.append(file.key) or changed(file, *data))
    (file,) = build(bundle, ("vae_decoder",))
    with pytest.raises(UserError, match="it was built for Fake GPU"):
        preflight.choose(bundle, "vae_decoder", Here(tensorrt.__version__, "Other GPU", "9.0"))
    assert read == []
    assert accel.load_engine(bundle, "vae_decoder").name == "tensorrt" and read == [file.key]


def test_an_edited_record(bundle, save, fit):
    file = save()
    path = file.path.with_suffix(".json")
    whole = path.read_text()
    for change, reason in (
        (lambda r: r["identity"]["options"].update(version_compatible=True), "record was changed"),
        (lambda r: r["audit"].update(wanted="int8"), "signature"),
        (lambda r: r.update(key="0" * 32), "record was changed"),
    ):
        record = json.loads(whole)
        change(record)
        path.write_text(json.dumps(record))
        assert reason in fit(bundle).reason
    path.write_text(whole)
    assert fit(bundle).ok
    signature = path.with_suffix(".sig").read_text()
    for text in ("0" * 64, "", signature[:-2], "ü"):
        path.with_suffix(".sig").write_text(text)
        assert "signature" in fit(bundle).reason
    path.with_suffix(".sig").unlink()
    assert "signature" in fit(bundle).reason


def test_a_bundle_that_was_exported_again_has_stale_engine_files(bundle, save, fit, edit_manifest):
    save()
    manifest = bundle.path / "accel.json"
    original = manifest.read_text()
    for name, reason in (("model.onnx", "another ONNX graph"), ("model.safetensors", "weights")):
        edit_manifest(bundle.path, lambda data, name=name: data["files"][f"vae_decoder/{name}"].update(sha256="0" * 64))
        found = fit(Bundle.open(bundle.path))
        assert reason in found.reason and "accel build" in found.fix
        manifest.write_text(original)
    edit_manifest(bundle.path, lambda data: data["exporter"].update(opset=23))
    assert "another exporter" in fit(Bundle.open(bundle.path)).reason


def test_a_file_or_folder_that_others_may_write(bundle, save, fit):
    file = save()
    for place, mode in ((file.path.parent, 0o777), (file.path.parent, 0o775), (file.path, 0o664)):
        before = place.stat().st_mode
        place.chmod(mode)
        assert "others can write" in fit(bundle).reason
        place.chmod(before)
    assert fit(bundle).ok


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to somebody else")
def test_an_engine_file_of_another_user_is_not_loaded(bundle, save, fit):
    os.chown(save().path, 12345, -1)
    found = fit(bundle)
    assert "another user" in found.reason and found.fix.startswith("cp -r")
