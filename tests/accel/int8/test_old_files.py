"""int8 bundles and trained scales that 0.1 wrote are read, and mean what they meant."""

import json

import pytest
import torch
from safetensors.torch import save_file

from accel import records
from accel.bundle import Bundle, manifest
from accel.bundle.manifest import Component
from accel.files import digest_of, read_json
from accel.int8 import trained_scales
from accel.int8.config import Int8Config
from accel.trt import engine_files

OLD_CONFIG = {
    "level": "ff",
    "keep": ["a"],
    "collector": "max",
    "percentile": 99.9,
    "smooth": 0.5,
    "bos_apart": False,
    "outputs": True,
}
CONFIG = Int8Config(level="ff", keep=("a",), observer="max", percentile=99.9, smooth=0.5, exclude_bos=False)


def read(name: str, entry: dict) -> Component:
    return records.read(Component, manifest._present(entry) | {"name": name}, "component")


def test_an_old_config_is_read_by_its_old_names():
    assert Int8Config.from_dict(OLD_CONFIG) == CONFIG == Int8Config.from_dict(CONFIG.as_dict())


@pytest.mark.parametrize("student", ["4step", "tiny-1step"])
def test_the_shipped_bundles_are_read_in_the_present_words(student):
    bundle = Bundle.open(f"digits/{student}-int8")
    written = read_json(bundle.path / "accel.json", "the manifest")["components"]
    assert "verdict" in written["unet"]["int8"], "the file is one of 0.1, or this test shows nothing"
    for name, component in bundle.manifest.components.items():
        old, new = written[name]["int8"], component.int8
        assert new["config"] == old["recipe"] and Int8Config.from_dict(new["config"]).observer == "mse"
        assert new["acceptance"]["enabled_engines"] == old["verdict"]["offered"]
        assert not {"recipe", "verdict"} & set(new) and "offered" not in new["acceptance"]
        assert read(name, json.loads(json.dumps(component.as_dict()))) == component


def test_modules_with_a_float32_output_are_read_by_their_old_name():
    component = Bundle.open("digits/4step-int8").component("unet").as_dict()
    assert read("unet", component | {"wide": ["a", "b"]}).fp32_output == ("a", "b")
    assert read("unet", component | {"fp32_output": ["c"]}).fp32_output == ("c",)


@pytest.mark.parametrize(
    ("student", "component", "digest"),
    [
        ("4step", "unet", "7d1ea385722394902260fda5edddd776"),
        ("4step", "vae_decoder", "db4d0f6f847913579ff80119c1035155"),
        ("tiny-1step", "text_encoder", "3663befaead46b157a24516076c2c1f3"),
    ],
)
def test_engine_files_of_old_bundles_still_fit(student, component, digest):
    """The digests were taken with 0.1: an engine file is found by them."""
    bundle = Bundle.open(f"digits/{student}-int8")
    assert digest_of(engine_files.sources(bundle, bundle.component(component)))[:32] == digest


def test_trained_scales_of_an_old_file_are_read(tmp_path):
    scales = {"conv.input_scale": torch.tensor(0.5)}
    save_file(scales, tmp_path / trained_scales.FILE, metadata={"recipe": json.dumps(OLD_CONFIG)})
    found = trained_scales.find(tmp_path)
    assert found.config == CONFIG and torch.equal(found.scales["conv.input_scale"], scales["conv.input_scale"])
    trained_scales.write(tmp_path, found)
    assert trained_scales.find(tmp_path).config == CONFIG
