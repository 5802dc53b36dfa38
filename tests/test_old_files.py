"""Files of version 0.1 load as before: bundles, int8, engine records, checkpoints, trained scales."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import accel
from accel.bundle import Bundle
from accel.cli import main
from accel.distill import recipes, registry
from accel.distill.data import examples, rng
from accel.distill.data.crop import place
from accel.distill.run import execute
from accel.int8 import trained_scales
from accel.parity import psnr
from accel.trt import engine_files, preflight

OLD = Path(__file__).parent / "old"


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(OLD, tmp_path_factory.mktemp("old") / "files"))


@pytest.mark.parametrize("name", ["bundle", "int8"])
def test_a_bundle_draws_the_image_that_it_drew(old, name):
    bundle = Bundle.open(old / name)
    bundle.verify()
    for record in bundle.manifest.components.values():
        file = load_file(bundle.file(record.weights))
        assert sum(t.numel() for t in file.values()) and record.parameters
    drawn = accel.load(bundle, "onnxruntime", threads=1)("the cat", seed=3, output_type="np").images
    stored = np.load(old / f"{name}-image.npy")
    if name == "bundle":  # processors differ in the last bits
        assert np.abs(drawn - stored).max() < 1e-4
    else:  # which int8 rounds the other way: 31 dB between two processors, in torch too; another seed is 14 dB away
        assert psnr(drawn, stored, data_range=1.0) > 28


@pytest.mark.parametrize("name", ["bundle", "int8"])
def test_eager_computes_with_the_very_weights_of_the_file(old, name):
    bundle = Bundle.open(old / name)
    stored = load_file(bundle.file(bundle.component("vae_decoder").weights))
    loaded = accel.load_engine(bundle, "vae_decoder", "eager", device="cpu").module.state_dict()
    shared = {key.removeprefix("model."): value for key, value in loaded.items()}.keys() & stored.keys()
    assert shared
    for key, value in loaded.items():
        if (short := key.removeprefix("model.")) in shared:
            assert torch.equal(value, stored[short]), short


def test_int8_is_described_and_inspected(old, capsys):
    assert main(["inspect", str(old / "int8"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["engines"]["onnxruntime"]["ok"]
    record = Bundle.open(old / "int8").component("unet")
    assert record.int8["layers"] and record.int8["audit"]["onnxruntime"]["share"] > 0.9


def test_the_record_of_an_engine_file_fits_the_bundle_that_it_was_built_of(old, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    bundle = Bundle.open(old / "int8")
    (file,) = engine_files.find(bundle, "unet")
    engine_files.sign(file.path, file.text)  # its signature was of another user's key
    for path in (file.path, file.path.parent):
        path.chmod(0o755)
    here = engine_files.Here(
        file.identity["tensorrt"], file.identity["gpu"], file.identity["compute_capability"], file.identity["platform"]
    )
    fit = preflight.check(bundle, file, here)
    assert fit.ok, fit


def test_training_goes_on_from_a_checkpoint(old, smallest, tmp_path, monkeypatch, images_of):
    """The settings it keeps are compared as they were written, so that the run is taken for the same one.

    0.1 drew whether an image is mirrored anew in every epoch; now both views of a crop in the middle take turns. That
    alone is put back here, all else gives the same bits.
    """

    def as_then(item, row, epoch, count, *, seed, **options):
        return place(item.image.size, rng=rng.generator(seed, epoch * count + row, "placement"), **options)

    monkeypatch.setattr(examples, "placement_of", as_then)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(smallest, "pipeline")
    images_of(Path("images"))
    shutil.copytree(old / "run" / "checkpoints", tmp_path / "tuned-run" / "checkpoints")
    recipe = recipes.changed(
        registry.recipe("finetune"),
        model="pipeline",
        data="images",
        resolution=32,
        cache="none",
        steps=2,
        batch=2,
        learning_rate=1e-3,
        checkpoint_every=1,
        sample_every=0,
        log="none",
        seed=1,
        keep=0,
        ema=0.9,
        qat="conv",
    )
    assert execute(recipe, Path("tuned")).steps == 2
    lines = (tmp_path / "tuned-run" / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]
    made, wanted = (
        load_file(path)
        for path in (tmp_path / "tuned/unet/diffusion_pytorch_model.safetensors", old / "run/expected.safetensors")
    )
    assert made.keys() == wanted.keys()
    worst = max(float((made[key].double() - wanted[key].double()).abs().max()) for key in wanted)
    assert worst < 1e-6  # a step of Adam is 1e-3


def test_trained_scales_are_read(old):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trained_scales.find(old / "run")
    stored = load_file(old / "run/int8.safetensors")
    assert found.config.level == "conv" and found.scales.keys() == stored.keys()
    assert all(torch.equal(found.scales[key], stored[key]) for key in stored)
