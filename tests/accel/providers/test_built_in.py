"""What ONNX Runtime's GPU providers are told."""

from __future__ import annotations

import os

import pytest

from accel.bundle import Bundle
from accel.engines import load_engine
from accel.errors import UserError
from accel.providers.built_in import cache_for, chain, shapes


@pytest.fixture
def bundle(sd15_bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    return Bundle.open(sd15_bundle)


def test_one_engine_takes_every_shape_of_the_bundle(bundle):
    found = shapes(bundle.component("unet"))
    assert found["trt_profile_min_shapes"] == "sample:1x4x16x16,encoder_hidden_states:1x77x32"
    assert found["trt_profile_max_shapes"] == "sample:8x4x32x32,encoder_hidden_states:8x77x32"
    assert set(found) == {f"trt_profile_{end}_shapes" for end in ("min", "opt", "max")}


def test_the_chain_falls_to_cuda_and_cpu_and_own_options_win(bundle):
    component = bundle.component("unet")
    (first, options), (second, cuda), third = chain("tensorrt", 1, bundle, component, {"trt_fp16_enable": True})
    assert (first, second, third) == ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["device_id"] == cuda["device_id"] == 1 and options["trt_fp16_enable"] is True
    assert options["trt_load_user_initializer"] is True  # without it graphs over 2 GB fail
    assert options["trt_engine_cache_path"].startswith(options["trt_timing_cache_path"])
    assert cuda["use_tf32"] == "0" and chain("cuda", 0, bundle, component, {"use_tf32": "1"})[0][1]["use_tf32"] == "1"
    assert chain("cpu", 0, bundle, component) == ["CPUExecutionProvider"]
    with pytest.raises(UserError, match="no provider options"):
        load_engine(bundle, "unet", "onnxruntime", provider="cpu", provider_options={"a": 1})


def test_the_cache_is_private_and_changes_with_the_versions(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    before = os.umask(0o002)  # new folders are open to the user's group
    try:
        first = cache_for(bundle, "room", {"tensorrt": "11.3.0"})
    finally:
        os.umask(before)
    assert first.stat().st_mode & 0o077 == 0 and first == cache_for(bundle, "room", {"tensorrt": "11.3.0"})
    second = cache_for(bundle, "room", {"tensorrt": "11.4.0"})
    assert second != first
    assert cache_for(bundle, "room", {"tensorrt": "11.4.0"}, "unet") == second / "unet"
    second.chmod(0o777)
    for component in ("", "unet"):
        with pytest.raises(UserError, match="written by others"):
            cache_for(bundle, "room", {"tensorrt": "11.4.0"}, component)
