"""Folders of other exporters draw what their networks compute, and say what nobody told us."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import accel
from accel import Notice, UserError
from accel.bundle import Bundle, is_bundle
from accel.bundle.foreign import kind_of

CALL = dict(sampler="ddim", steps=3, guidance_scale=4.0, height=32, width=32, seed=3, output_type="np")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, request):
    """One cache for the folders of this file."""
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path_factory.getbasetemp() / "foreign-cache"))


@pytest.fixture(scope="module")
def image(smallest_bundle):
    with accel.load(smallest_bundle, engine="onnxruntime", threads=1) as pipe:
        return pipe("a cat", **CALL).images


@pytest.mark.parametrize(
    ("folder", "engine"),
    [("optimum_folder", "onnxruntime"), ("optimum_folder", "openvino"), ("openvino_folder", "openvino")],
)
def test_it_draws_the_image_of_its_networks(folder, engine, image, request):
    with accel.load(request.getfixturevalue(folder), engine=engine, threads=1) as pipe:
        assert np.abs(pipe("a cat", **CALL).images - image).max() < 1 / 255


def test_what_is_assumed_is_said_once(optimum_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    with pytest.warns(Notice, match="never compared with torch.*assumed: .*25 steps; guidance 7.5"):
        bundle = Bundle.open(optimum_folder)
    assert bundle.manifest.source["foreign"] == "onnx" and "25 steps" in bundle.manifest.source["assumed"]
    assert bundle.component("unet").parity == {}
    again = Bundle.open(optimum_folder)
    assert again.digest == bundle.digest
    again.verify()


def test_auto_takes_an_engine_that_reads_it(openvino_folder):
    with accel.load(openvino_folder, threads=1) as pipe:
        assert {engine.name for engine in pipe.engines.values()} == {"openvino"}


@pytest.mark.parametrize(("folder", "engine"), [("openvino_folder", "onnxruntime"), ("optimum_folder", "eager")])
def test_an_engine_that_does_not_read_it_says_which_do(folder, engine, request):
    with pytest.raises(UserError, match=f"the {engine} engine does not run") as refused:
        accel.load(request.getfixturevalue(folder), engine=engine)
    assert "openvino" in refused.value.fix


def test_a_folder_with_torch_weights_is_a_pipeline(optimum_folder, tmp_path):
    folder = shutil.copytree(optimum_folder, tmp_path / "both")
    assert kind_of(folder) == "onnx" and is_bundle(folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert kind_of(folder) is None and not is_bundle(folder)


def test_a_changed_folder_is_read_again(optimum_folder, tmp_path):
    folder = shutil.copytree(optimum_folder, tmp_path / "changed")
    first = Bundle.open(folder).path
    config = json.loads((folder / "vae_decoder/config.json").read_text())
    (folder / "vae_decoder/config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    second = Bundle.open(folder)
    assert second.path != first and second.manifest.pipeline["scaling_factor"] == 0.5


def broken(folder, change, tmp_path):
    made = shutil.copytree(folder, tmp_path / "broken")
    change(made)
    with pytest.raises(UserError) as refused:
        Bundle.open(made)
    assert refused.value.fix
    return refused.value.message


def test_what_is_damaged_or_missing_is_named(optimum_folder, tmp_path):
    def without_decoder(folder):
        (folder / "vae_decoder/model.onnx").unlink()

    assert "has no vae_decoder/model.onnx" in broken(optimum_folder, without_decoder, tmp_path)


def test_a_graph_that_is_no_onnx_is_named(optimum_folder, tmp_path):
    def spoilt(folder):
        (folder / "text_encoder/model.onnx").write_bytes(b"no graph")

    assert "is not a readable ONNX file" in broken(optimum_folder, spoilt, tmp_path)


def test_weights_outside_the_folder_are_not_read(optimum_folder, tmp_path):
    def elsewhere(folder):
        import onnx

        path = folder / "unet/model.onnx"
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../text_encoder/model.onnx"
        path.write_bytes(model.SerializeToString())

    assert "points outside the folder" in broken(optimum_folder, elsewhere, tmp_path)


def test_a_scheduler_that_no_sampler_equals_is_refused(optimum_folder, tmp_path):
    def other(folder):
        path = folder / "scheduler/scheduler_config.json"
        path.write_text(json.dumps({"_class_name": "VQDiffusionScheduler"}))

    assert "no sampler that equals VQDiffusionScheduler" in broken(optimum_folder, other, tmp_path)


def test_inspect_and_bench_take_it(optimum_folder, tmp_path, capsys):
    from accel.cli import main

    assert main(["inspect", str(optimum_folder)]) == 0
    shown = capsys.readouterr().out
    assert "an ONNX pipeline of optimum: never compared with torch" in shown and "assumed   images of height" in shown
    how = ["--engine", "onnxruntime", "--engine", "openvino", "--rounds", "2", "--threads", "1", "--prompt", "a cat"]
    assert main(["bench", str(optimum_folder), *how, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert any("does not run an ONNX pipeline of optimum" in note for note in document["notes"])
    assert all(row["status"] == "measured" for row in document["rows"] if row["engine"] in ("onnxruntime", "openvino"))
