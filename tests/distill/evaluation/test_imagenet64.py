"""ImageNet-64's protocol: its classes, its noise, published statistics, and models that it does not measure."""

import dataclasses
import json
import shutil
from types import MappingProxyType

import numpy as np
import pytest
import torch
from PIL import Image

from accel.distill.edm.sampler import one_step, pixels, sample
from accel.distill.edm.source import open_edm
from accel.distill.evaluation import evaluate, metrics, protocols
from accel.distill.evaluation.protocols import IMAGENET64
from accel.errors import UserError
from accel.sampling import Sampling


@pytest.fixture
def small(monkeypatch):
    """The protocol for the tests' model, judged by the mean grey of a quarter of each image."""

    def see(images):
        arrays = np.stack([np.asarray(image, np.float64) for image in images]) / 255
        return arrays[:, :8, :8].mean((1, 2))[:, :2] + arrays[:, 8:, :8, :2].mean((1, 2)) * [[1.0, 2.0]]

    made = dataclasses.replace(
        IMAGENET64, images=6, classes=10, size=16, sampling=Sampling(sampler="heun", steps=2, guidance=0.0)
    )
    monkeypatch.setattr(metrics, "EXTRACTORS", {"edm": (lambda device: see, "numpy", "numpy")})
    monkeypatch.setattr(protocols, "PROTOCOLS", MappingProxyType({made.id: made}))
    monkeypatch.setattr(evaluate, "_statistics", lambda *_: (np.zeros(2), np.eye(2)))
    return made


@pytest.fixture
def reference(tmp_path):
    np.savez(tmp_path / "imagenet-64x64.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    return tmp_path / "imagenet-64x64.npz"


def drawn(out):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((out / "pictures").iterdir())])


def noise(seed, draws=1):
    own = torch.Generator().manual_seed(seed)
    return [torch.randn((1, 1, 16, 16), generator=own) for _ in range(draws)]


def test_the_classes_are_uniform_and_a_trial_has_the_first_of_them():
    labels = evaluate._labels(IMAGENET64)
    counts = np.bincount(labels, minlength=1000)
    assert len(labels) == 50_000 and len(counts) == 1000
    # Chi-square of 999 degrees of freedom: mean 999, standard deviation 45. DMD2's cyclic ones would give 0.
    assert abs(((counts - 50) ** 2 / 50).sum() - 999) < 5 * 45
    assert evaluate._prompts(IMAGENET64, None, None, 3)[0] == [str(label) for label in labels[:3]]


def test_published_statistics_are_read_as_they_are(reference):
    mean, covariance = evaluate._reference(IMAGENET64, reference)
    assert mean.shape == (2048,) and covariance.shape == (2048, 2048)
    with pytest.raises(UserError, match="needs real images") as error:
        evaluate._reference(IMAGENET64, None)
    assert "imagenet-64x64.npz" in error.value.fix


def test_a_teacher_is_drawn_as_edms_sampler_with_churn(small, edm, edm_bundle, reference, tmp_path):
    result = evaluate.evaluate(edm, small.id, tmp_path / "out", reference=reference, limit=4, batch=3)
    assert result["protocol"] == "imagenet64[images=4]" and result["figures"][0]["name"] == "FID"
    assert result["sampling"]["sampler"] == "heun" and result["reference"]["kind"] == "statistics"
    net, labels = open_edm(edm).load("unet"), evaluate._labels(small)
    for index, image in enumerate(drawn(tmp_path / "out")):
        z, *fresh = noise(index, 3)
        steps = iter(fresh)
        wanted = sample(
            net,
            z,
            torch.tensor(labels[index : index + 1]),
            steps=2,
            churn=small.churn,
            noise=lambda _, s=steps: next(s),
        )
        assert np.abs(image[..., 0].astype(int) - pixels(wanted).numpy()[0, ..., 0]).max() <= 1
    # A bundle on an engine draws the same, from the same noise.
    evaluate.evaluate(
        edm_bundle, small.id, tmp_path / "bundle", reference=reference, limit=4, engine="onnxruntime", batch=2
    )
    assert np.abs(drawn(tmp_path / "bundle").astype(int) - drawn(tmp_path / "out")).max() <= 1


def test_a_student_is_drawn_in_its_own_step_and_goes_on_where_it_stopped(small, edm, reference, tmp_path):
    folder = shutil.copytree(edm, tmp_path / "student")
    (folder / "sampler.json").write_text(json.dumps({"name": "dmd2", "timesteps": [999]}))
    evaluate.evaluate(folder, small.id, tmp_path / "out", reference=reference, limit=4)
    (tmp_path / "out" / "pictures" / "00002.png").unlink()
    result = evaluate.evaluate(folder, small.id, tmp_path / "out", reference=reference)
    assert result["protocol"] == "imagenet64" and result["pictures_made"] == 3
    net, labels = open_edm(folder).load("unet"), torch.tensor(evaluate._labels(small))
    with torch.no_grad():
        wanted = pixels(one_step(net, torch.cat([noise(index)[0] for index in range(6)]), labels))
    assert np.abs(drawn(tmp_path / "out")[..., :1].astype(int) - wanted.numpy()).max() <= 1


def test_what_it_does_not_measure_is_refused(small, edm, edm_maker, reference, tmp_path, monkeypatch):
    out = dict(reference=reference, out=tmp_path / "out")
    with pytest.raises(UserError, match="draws what a text says"):
        evaluate.evaluate("digits/4step", small.id, **out)
    with pytest.raises(UserError, match="no captions"):
        evaluate.evaluate(edm, small.id, captions="x.txt", **out)
    with pytest.raises(UserError, match="no guidance"):
        evaluate.evaluate(edm, small.id, guidance=3.0, **out)
    with pytest.raises(UserError, match="16 px and 10 classes, and other of 16 px and 4 classes"):
        evaluate.evaluate(edm_maker(tmp_path / "other", classes=4), small.id, **out)
    monkeypatch.setattr(protocols, "PROTOCOLS", {"digits": protocols.DIGITS})
    with pytest.raises(UserError, match="measures models of texts"):
        evaluate.evaluate(edm, "digits", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
