"""Images of classes on every engine: the numbers of EDM's sampler in torch, and calls that make no sense."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import accel
from accel.class_to_image import ClassPipeline
from accel.distill.edm import sampler as reference
from accel.distill.edm.source import open_edm
from accel.errors import UserError
from accel.sampling.noise import normal

LABELS, STEPS = [1, 2, 9, 0, 3], 3  # five: more than one call of the bundle takes
Z = normal(range(5), 0, (1, 16, 16))
FRESH = [normal(range(5), step + 1, (1, 16, 16)) for step in range(STEPS)]


@pytest.fixture(scope="module")
def wanted(edm):
    net, z, labels = open_edm(edm).load("unet"), torch.from_numpy(Z), torch.tensor(LABELS)
    churn = dict(churn=reference.Churn(2.0), noise=lambda step: torch.from_numpy(FRESH[step]))
    with torch.no_grad():
        return {
            "one step": reference.one_step(net, z, labels).numpy(),
            "heun": reference.sample(net, z, labels, steps=STEPS).numpy(),
            "churn": reference.sample(net, z, labels, steps=STEPS, **churn).numpy(),
        }


def drawn(pipe: ClassPipeline) -> dict[str, np.ndarray]:
    common = dict(latents=Z, output_type="latent")
    churn = dict(churn=reference.Churn(2.0), renoise=lambda step: FRESH[step])
    return {
        "one step": pipe(LABELS, sampler="dmd2", **common).images,
        "heun": pipe(LABELS, steps=STEPS, **common).images,
        "churn": pipe(LABELS, steps=STEPS, **churn, **common).images,
    }


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino", "auto"])
def test_every_engine_draws_what_edms_sampler_draws_in_torch(engine, edm_bundle, wanted):
    with accel.load(edm_bundle, engine=engine) as pipe:
        for name, images in drawn(pipe).items():
            assert images.shape == (5, 1, 16, 16) and images.dtype == np.float32
            assert np.linalg.norm(images - wanted[name]) < 2e-6 * np.linalg.norm(wanted[name]), name
    assert np.linalg.norm(wanted["heun"] - wanted["churn"]) > 1e-3 * np.linalg.norm(wanted["heun"])


def test_the_folder_as_it_is_runs_on_torch_bit_for_bit(edm, wanted):
    with accel.load(edm) as pipe:
        assert pipe.engines["denoiser"].name == "eager" and pipe.classes == 10
        made = drawn(pipe)
    assert all(np.array_equal(made[name], wanted[name]) for name in ("heun", "churn"))
    assert np.allclose(made["one step"], wanted["one step"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_torch_compile_draws_the_same(edm_bundle, wanted):
    with accel.load(edm_bundle, engine="compile") as pipe:
        images = pipe(LABELS[:4], steps=STEPS, latents=Z[:4], output_type="latent").images
    assert np.linalg.norm(images - wanted["heun"][:4]) < 1e-5 * np.linalg.norm(wanted["heun"])


def test_an_image_depends_on_its_seed_and_class_and_not_on_the_batch(edm_bundle):
    with accel.load(edm_bundle, engine="onnxruntime", threads=1) as pipe:
        several = pipe([4, 7], images_per_class=2, seed=5, steps=2, output_type="np")
        assert several.seeds == [5, 6, 7, 8] and several.images.shape == (4, 16, 16, 3)
        alone = pipe(7, seed=8, steps=2, output_type="np").images
        assert np.abs(several.images[3] - alone[0]).max() < 1e-5
        assert np.abs(pipe(6, seed=8, steps=2, output_type="np").images - alone).max() > 1e-3
        assert np.array_equal(several.images[..., 0], several.images[..., 2])  # grey
        assert pipe(7, seed=8, steps=2).images[0].size == (16, 16)
        assert set(several.seconds) == {"denoiser", "total"}


def test_a_student_of_several_steps_adds_fresh_noise_between_them(edm, tmp_path):
    import shutil

    folder = shutil.copytree(edm, tmp_path / "student")
    (folder / "sampler.json").write_text(json.dumps({"name": "dmd2", "timesteps": [999, 499]}))
    net, labels = open_edm(folder).load("unet"), torch.tensor(LABELS)
    with accel.load(folder) as pipe, torch.no_grad():
        sigmas = pipe.bundle.manifest.sampler["sigmas"]
        assert sigmas[0] == 80 and 1 < sigmas[1] < 5
        first = net(80 * torch.from_numpy(Z).double(), 80.0, labels)
        wanted = net(first + sigmas[1] * torch.from_numpy(FRESH[0]), sigmas[1], labels).numpy()
        made = pipe(LABELS, latents=Z, renoise=lambda step: FRESH[step], output_type="latent").images
        with pytest.raises(UserError, match="2 steps, not in 3"):
            pipe(1, steps=3)
    assert np.allclose(made, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "call", "problem"),
    [
        (10, {}, "10 is not one of the 10 classes"),
        (-1, {}, "-1 is not one of"),
        ([1, True], {}, "True is not one of"),
        ("a cat", {}, "not what a text says"),
        (None, {}, "no class is given"),
        ([], {}, "there is no class"),
        (1, {"prompt": "a cat"}, "prompt is for images of texts"),
        (1, {"guidance_scale": 3}, "guidance_scale is for images of texts"),
        (1, {"steps": 0}, "invalid steps"),
        (1, {"sampler": "ddim"}, "ddim"),
        (1, {"sampler": "dmd2", "churn": 40}, "no churn"),
        (1, {"churn": -1}, "invalid churn"),
        (1, {"seed": -1}, "invalid seed"),
        (1, {"output_type": "jpg"}, "output_type"),
        (1, {"latents": np.zeros((1, 3, 16, 16))}, "latents of shape"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_with_a_fix(labels, call, problem, edm_bundle):
    with accel.load(edm_bundle, engine="onnxruntime", threads=1) as pipe:
        with pytest.raises(UserError, match=problem) as error:
            pipe(labels, **call)
    assert error.value.fix


def test_what_is_for_texts_is_refused_before_anything_is_loaded(edm_bundle, edm):
    for options in ({"loras": ["x"]}, {"vae_tiling": True}, {"few_step": "lcm"}, {"embeddings": ["x"]}):
        with pytest.raises(UserError, match="draws images of classes"):
            accel.load(edm_bundle, **options)
    with pytest.raises(UserError, match="nothing is exported"):
        accel.load(edm_bundle, export={"precision": "fp16"})
    with pytest.raises(UserError, match="no component 'unet'"):
        accel.load(edm_bundle, engine={"unet": "eager"})
    with pytest.raises(UserError, match="models of texts alone"):
        accel.AccelPipeline.from_pretrained(str(edm))


def test_a_bundle_runs_without_torch(edm_bundle, tmp_path):
    code = """
import sys
sys.modules["torch"] = sys.modules["diffusers"] = None
import accel, numpy
pipe = accel.load(sys.argv[1], engine="onnxruntime", threads=1)
numpy.save(sys.argv[2], pipe(3, seed=1, steps=2, output_type="np").images)
"""
    file = tmp_path / "image.npy"
    subprocess.run([sys.executable, "-c", code, str(edm_bundle), str(file)], check=True, cwd="/")
    with accel.load(edm_bundle, engine="onnxruntime", threads=1) as pipe:
        assert np.array_equal(np.load(file), pipe(3, seed=1, steps=2, output_type="np").images)


def test_low_memory_closes_the_network_after_the_image(edm_bundle):
    with accel.load(edm_bundle, engine="onnxruntime", threads=1, low_memory=True) as pipe:
        first = pipe(3, seed=1, steps=1, output_type="np").images
        assert pipe.engines._loaded == {}
        assert np.array_equal(first, pipe(3, seed=1, steps=1, output_type="np").images)
    with pytest.raises(UserError, match="closed"):
        pipe(3)
