"""`accel build`, and `accel export --engine tensorrt`, which builds at once."""

from __future__ import annotations

import json

import pytest

from accel.bundle import Bundle
from accel.cli import main
from accel.export.tensorrt.build import build
from accel.trt import engine_files

pytestmark = pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)


@pytest.fixture
def bundle(bundle_copy):
    return Bundle.open(bundle_copy)


def test_build_and_inspect(bundle, tensorrt, capsys):
    assert main(["build", str(bundle.path), "--components", "vae_decoder", "--workspace", "256M"]) == 0
    told = capsys.readouterr()
    assert "--engine auto --prompt" in told.out and "building needs" in told.err
    assert main(["inspect", str(bundle.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    (entry,) = shown["engine_files"]
    assert entry["ok"] and entry["reason"] == "fits" and shown["plans"] == [entry]
    assert main(["build", str(bundle.path), "--components", "nothing"]) == 1
    assert "has no component" in capsys.readouterr().err
    assert main(["build", str(bundle.path), "--components", "vae_decoder", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["identity"]["options"]["workspace"] is None


def test_only_engine_files_that_fit_make_a_bundle_ready(
    bundle_copy, edit_manifest, tensorrt, fakes, monkeypatch, capsys
):
    edit_manifest(
        bundle_copy,
        lambda data: data.update(
            components={name: c for name, c in data["components"].items() if name in ("text_encoder", "vae_decoder")}
        ),
    )
    (file,) = build(Bundle.open(bundle_copy), ("vae_decoder",))
    file.path.write_bytes(b"hello")
    command = ["build", str(bundle_copy), "--components"]
    assert main([*command, "text_encoder"]) == 0 and "makes no image by itself" in capsys.readouterr().out
    monkeypatch.setattr("accel.commands.build.next_command", lambda bundle, how: f": accel run{how} --prompt")
    assert main([*command, "text_encoder"]) == 0 and "--engine auto --prompt" in capsys.readouterr().out
    assert main([*command, "vae_decoder"]) == 0 and "--engine tensorrt --prompt" in capsys.readouterr().out
    monkeypatch.setattr(fakes("cuda").Cuda, "names", ("Fake GPU", "Fake GPU"))
    assert main([*command, "vae_decoder", "--gpu", "1"]) == 0  # its name until 0.2
    assert "--engine tensorrt --device cuda:1 --prompt" in capsys.readouterr().out


def test_build_options_are_checked_before_an_export(tensorrt, tmp_path, capsys):
    command = ["export", str(tmp_path / "no model"), str(tmp_path / "out"), "--engine", "tensorrt"]
    assert main([*command, "--optimization-level", "6"]) == 1
    assert "use 0 (fast build) to 5" in capsys.readouterr().err
    assert main([*command, "--precision", "int8", "--refittable"]) == 1
    assert "leave out --refittable" in capsys.readouterr().err


def test_an_export_that_builds_at_once(sd15, tensorrt, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", str(sd15), str(out), "--components", "text_encoder", "--profile", "batch=1-2,size=64"]
    assert main([*command, "--engine", "tensorrt", "--refittable"]) == 0
    assert "text_encoder: building needs" in capsys.readouterr().err
    (file,) = engine_files.find(Bundle.open(out))
    assert file.identity["options"]["refittable"] and file.identity["profiles"][0]["shapes"]["input_ids"][2] == [2, 77]


def test_builds_of_tensorrt_rtx_say_where_they_run(bundle, tensorrt, tensorrt_rtx, monkeypatch, capsys):
    """Without a card here, the bundle is for elsewhere; options of the other flavour are refused."""
    command = ["build", str(bundle.path), "--components", "vae_decoder", "--engine", "tensorrt-rtx"]
    assert main([*command, "--targets", "sm89, SM120", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["identity"]["targets"] == ["sm89", "sm120"] and record["identity"]["engine"] == "tensorrt-rtx"
    monkeypatch.setattr("accel.trt.library.has_driver", lambda: False)
    assert main([*command, "--targets", "sm86"]) == 0
    assert "ready for machines with such a card" in capsys.readouterr().out
    assert main([*command, "--device", "cuda:0"]) == 1
    assert "does not take --device" in capsys.readouterr().err
    assert main([*command, "--targets", "sm90"]) == 1
    assert "no kernels for Hopper" in capsys.readouterr().err
    assert main(["build", str(bundle.path), "--targets", "sm89"]) == 1
    assert "TensorRT does not take --targets" in capsys.readouterr().err
    assert main(["inspect", str(bundle.path)]) == 0
    told = capsys.readouterr().out
    assert "TensorRT-RTX 1.7.1.116, sm86" in told and "there is no NVIDIA driver" in told


def test_an_export_for_tensorrt_rtx_checks_its_options_first(tensorrt, tensorrt_rtx, tmp_path, capsys):
    command = ["export", str(tmp_path / "no model"), str(tmp_path / "out")]
    assert main([*command, "--engine", "tensorrt-rtx", "--targets", "sm1"]) == 1
    assert "unknown target 'sm1'" in capsys.readouterr().err
    assert main([*command, "--engine", "tensorrt-rtx", "--version-compatible"]) == 1
    assert "does not take --version-compatible" in capsys.readouterr().err
    assert main([*command, "--targets", "sm89"]) == 1
    assert "add --engine tensorrt-rtx" in capsys.readouterr().err
