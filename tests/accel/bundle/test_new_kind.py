"""A kind of component is added by one entry in `KINDS`: it is exported, checked, reopened, loaded and run."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

import accel
from accel.bundle import Bundle
from accel.bundle.kinds import KINDS, Kind
from accel.bundle.tensor_spec import TensorSpec
from accel.errors import UserError
from accel.export.pipeline import export_pipeline
from accel.models.networks import Network


class RoundTrip(nn.Module):
    """sample [images, 3, H, W] -> the same image after the VAE [images, 3, H, W]."""

    def __init__(self, model, outputs=()):
        super().__init__()
        self.model = model

    def forward(self, sample):
        return (self.model.decode(self.model.encode(sample).latent_dist.mean, return_dict=False)[0],)


def round_trip(source, name, inputs):
    image = ("images", 3, "height", "width")
    specs = (TensorSpec("sample", "float32", image),), (TensorSpec("out_sample", "float32", image),)
    return Network(name, "vae_round_trip", RoundTrip(source.load("vae")), *specs)


@pytest.fixture
def added(monkeypatch):
    entry = Kind(
        names=("vae_round_trip",),
        wrapper=f"{__name__}:RoundTrip",
        network=f"{__name__}:round_trip",
        classes=("AutoencoderKL",),
        part="vae",
    )
    monkeypatch.setitem(KINDS, "vae_round_trip", entry)


def test_a_new_kind_is_exported_and_runs_beside_the_others(smallest, tmp_path, added, monkeypatch):
    bundle = export_pipeline(
        smallest,
        tmp_path / "out",
        profile="batch=1-4,size=32-64",
        components=("text_encoder", "unet", "vae_decoder", "vae_round_trip"),
        sampler={"name": "euler", "steps": 2, "guidance": 0},
    )
    assert Bundle.open(bundle.path).component("vae_round_trip").kind == "vae_round_trip"
    image = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 48)).astype(np.float32)
    vae = AutoencoderKL.from_pretrained(smallest / "vae")
    with torch.no_grad():
        expected = vae.decode(vae.encode(torch.from_numpy(image)).latent_dist.mean).sample.numpy()
    for engine in ("eager", "onnxruntime"):
        found = accel.load_engine(bundle, "vae_round_trip", engine)(sample=image)["out_sample"]
        assert np.abs(np.asarray(found) - expected).max() < 1e-4, engine

    pipe = accel.load(bundle, "onnxruntime", threads=1)
    assert pipe("the cat").images[0].size == (32, 32) and "vae_round_trip" not in pipe.engines.descriptions
    assert np.abs(pipe.engines["vae_round_trip"](sample=image)["out_sample"] - expected).max() < 1e-4

    monkeypatch.delitem(KINDS, "vae_round_trip")
    with pytest.raises(UserError, match="unknown kind 'vae_round_trip'"):
        Bundle.open(bundle.path)
    with pytest.raises(UserError, match="unknown component"):
        export_pipeline(smallest, tmp_path / "other", components=("vae_round_trip",))
