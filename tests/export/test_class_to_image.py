"""An EDM folder as a bundle: what the manifest says, how near the graph is, and what is refused before the work."""

import json
import shutil

import numpy as np
import pytest

import accel
from accel.bundle import Bundle
from accel.errors import UserError
from accel.export.class_to_image import takes
from accel.export.pipeline import export_pipeline


@pytest.fixture
def no_work(monkeypatch):
    """Nothing may be loaded: what is wrong is known before."""
    from accel.models.source import Source

    monkeypatch.setattr(Source, "load", lambda *_: pytest.fail("weights were loaded"))


def test_the_manifest_says_all_that_a_runtime_needs(edm_bundle):
    data = json.loads((edm_bundle / "accel.json").read_text())
    assert data["schema"] == 2 and data["family"] == "edm" and list(data["components"]) == ["denoiser"]
    assert data["sampler"] == {"name": "heun", "steps": 40, "guidance": 0.0}
    constants = {"classes": 10, "native_size": 16, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "sigma_data": 0.5}
    assert constants.items() <= data["pipeline"].items()
    bundle = Bundle.open(edm_bundle)
    bundle.verify()
    record = bundle.component("denoiser")
    assert bundle.manifest.by_class and record.parity["relative_l2"] < 1e-5 < record.parity["limit"]
    assert "heun in 40 steps" in bundle.title


def test_a_bundle_of_texts_keeps_its_schema_so_that_an_older_accel_reads_it():
    bundle = Bundle.open("digits/4step-int8")
    assert bundle.manifest.as_dict()["schema"] == 1 and not bundle.manifest.by_class


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data["pipeline"].update(classes=-1), "classes"),
        (lambda data: data["pipeline"].pop("sigma_data"), "sigma_data"),
        (lambda data: data["pipeline"].update(sigma_min=90.0), "sigma_min"),
        (lambda data: data["sampler"].update(sigmas=[0.0]), "sigmas"),
        (lambda data: data["pipeline"].update(classes=0), "inputs"),
    ],
)
def test_a_damaged_manifest_is_refused(change, problem, edm_bundle, tmp_path):
    folder = shutil.copytree(edm_bundle, tmp_path / "copy")
    data = json.loads((folder / "accel.json").read_text())
    change(data)
    (folder / "accel.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"damaged.*{problem}"):
        Bundle.open(folder)


def test_fp16_is_exported_and_measured(edm, tmp_path):
    bundle = export_pipeline(edm, tmp_path / "half", precision="fp16", profile="batch=2")
    record = bundle.component("denoiser")
    assert record.dtype == "float16" and record.inputs[1].dtype == "float32"  # c_noise stays exact
    assert 1e-5 < record.parity["relative_l2"] < record.parity["limit"]
    how = dict(steps=2, seed=3, output_type="latent")
    with accel.load(bundle, engine="onnxruntime", threads=1) as half, accel.load(edm) as whole:
        ours, exact = half([3, 4, 5], **how).images, whole([3, 4, 5], **how).images  # a fixed batch of two is filled up
    assert 0 < np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 0.02


def test_a_students_levels_come_along(edm, tmp_path, stored_graphs):
    folder = shutil.copytree(edm, tmp_path / "student")
    (folder / "sampler.json").write_text(json.dumps({"name": "dmd2", "timesteps": [999]}))
    bundle = export_pipeline(folder, tmp_path / "bundle")
    assert bundle.manifest.sampler == {"name": "dmd2", "timesteps": [999], "sigmas": [80.0], "guidance": 0.0}
    assert "dmd2 in 1 steps" in bundle.title


def test_which_models_it_takes(edm, edm_bundle, sd15, tmp_path):
    assert takes(edm) and takes(str(edm_bundle))
    assert not any(map(takes, (sd15, "digits", "digits/4step-int8", tmp_path, tmp_path / "nothing", "org/name")))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"precision": "int8"}, "images of prompts"),
        ({"adapter": True}, "adapter is for pipelines of texts"),
        ({"clip_skip": 1}, "clip_skip"),
        ({"profile": "sd-512"}, "512 px"),
        ({"profile": "batch=1-64"}, "63"),
        ({"profile": "native,vae_tile=64"}, "no VAE"),
        ({"sampler": {"name": "ddim"}}, "ddim does not sample"),
        ({"sampler": {"name": "heun", "steps": 0}}, "invalid steps"),
        ({"sampler": {"name": "dmd2", "steps": 4}}, "1 steps, not of 4"),
        ({"sampler": {"guidance": 3.0}}, "no guidance"),
    ],
)
def test_what_it_cannot_have_is_refused_before_the_work(options, problem, edm, tmp_path, no_work):
    with pytest.raises(UserError, match=problem) as error:
        export_pipeline(edm, tmp_path / "out", **options)
    assert error.value.fix and not (tmp_path / "out").exists()


def test_a_bundle_is_not_exported_again_and_a_folder_is_not_overwritten(edm, edm_bundle, tmp_path, no_work):
    with pytest.raises(UserError, match="bundle already"):
        export_pipeline(edm_bundle, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="out"):
        export_pipeline(edm, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").is_file()
