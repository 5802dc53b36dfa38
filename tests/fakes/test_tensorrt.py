"""The fake `tensorrt` module itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from accel.trt import library


def test_what_a_version_does_not_have_does_not_exist(tensorrt):
    with pytest.raises(AttributeError):
        tensorrt.BuilderFlag.SOME_FLAG  # noqa: B018
    with pytest.raises(AttributeError):
        tensorrt.Builder.platform_has_fast_fp64  # noqa: B018
    assert hasattr(tensorrt.BuilderFlag, "FP16") == tensorrt.__version__.startswith("10.")
    logger = type("Log", (tensorrt.ILogger,), {"log": lambda *_: None})()
    config = tensorrt.Builder(logger).create_builder_config()
    with pytest.raises(AttributeError, match="has no int8_calibratr"):
        config.int8_calibratr = None
    with pytest.raises(TypeError):
        config.set_flag("REFIT")
    with pytest.raises(TypeError):
        config.set_memory_pool_limit(pool=tensorrt.MemoryPoolType.WORKSPACE, size=1)
    with pytest.raises(TypeError):
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE)
    profile = tensorrt.Builder(logger).create_optimization_profile()
    with pytest.raises(TypeError):
        profile.set_shape("x", (1,), (1,), "12")
    if hasattr(tensorrt.BuilderFlag, "FP16"):
        assert tensorrt.BuilderFlag.FP16.value == 0
    with pytest.raises(NotImplementedError):
        config.set_preview_feature(tensorrt.PreviewFeature(0), True)


@pytest.mark.skipif(library.installed("tensorrt-rtx") is None, reason="TensorRT-RTX is not installed")
def test_what_the_fake_of_rtx_has_the_real_library_has():
    """Names, members of enumerations, and the arguments of functions, read off the library that is installed."""
    module = library.load("tensorrt-rtx").module
    api = json.loads((Path(__file__).parent / "tensorrt_api" / "rtx-1.7.1.116.json").read_text())
    for name, what in api.items():
        if name.startswith("_"):
            continue  # the fake's own
        real = module
        for part in name.split("."):
            assert hasattr(real, part), name
            real = getattr(real, part)
        if isinstance(what, dict):
            assert {member: int(value) for member, value in real.__members__.items()} == what["enum"], name
        elif isinstance(what, str) and what.startswith(f"{name.rpartition('.')[2]}("):
            told = (real.__doc__ or "").splitlines()[0]
            given, real_ones = (re.findall(r"(\w+): ", text.split(" -> ")[0]) for text in (what, told))
            assert given == real_ones, name
