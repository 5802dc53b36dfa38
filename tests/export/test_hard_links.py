"""A LoRA's bundle shares what it has in common with its base."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accel.bundle import Bundle
from accel.errors import Notice, UserError
from accel.export.hard_links import link_equal_files
from accel.export.pipeline import export_pipeline
from accel.models.source import open_source


def small_lora(source: Path, out: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    state = {}
    for name, module in open_source(source).load("unet").named_modules():
        if name.endswith(("attn2.to_q", "attn1.to_v")):
            state[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.weight.shape[1])
            state[f"unet.{name}.lora_B.weight"] = torch.randn(module.weight.shape[0], 2) * 0.1
    save_file(state, out)
    return out


@pytest.fixture(scope="module")
def shared(sd15, sd15_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    loras = [
        f"{small_lora(sd15, folder / f'{name}.safetensors', seed)}={scale}"
        for name, seed, scale in (("style", 1, 0.7), ("subject", 2, 0.4))
    ]
    base = Path(shutil.copytree(sd15_bundle, folder / "base"))
    bundle = export_pipeline(
        sd15,
        folder / "with-lora",
        profile="batch=1-4,size=64-128",
        components=("unet", "vae_decoder"),
        loras=loras,
        share=base,
    )
    return base, bundle


def test_equal_files_are_the_same_file_and_the_changed_network_is_not(shared):
    base, bundle = shared
    both = [name for name in bundle.manifest.files if (base / name).exists()]
    same = [name for name in both if os.path.samefile(base / name, bundle.path / name)]
    assert "vae_decoder/model.safetensors" in same and "tokenizer/tokenizer.json" in same
    assert "unet/model.safetensors" not in same
    assert [lora["scale"] for lora in bundle.manifest.source["loras"]] == [0.7, 0.4]
    bundle.verify()


def test_deleting_the_base_leaves_the_bundle_whole(shared, tmp_path):
    base, bundle = shared
    shutil.rmtree(base / "vae_decoder")
    Bundle.open(bundle.path).verify()


def test_where_links_are_not_possible_files_are_copied_audibly(sd15_bundle, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(sd15_bundle, tmp_path / "copy"))

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("accel.export.hard_links.os.link", refuse)
    with pytest.warns(Notice, match="no hard links"):
        assert link_equal_files(copy, Bundle.open(sd15_bundle)) == 0
    Bundle.open(copy).verify()


def test_a_base_that_is_no_bundle_is_refused(sd15, tmp_path):
    with pytest.raises(UserError):
        export_pipeline(sd15, tmp_path / "out", share=sd15)
    assert not (tmp_path / "out").exists()
