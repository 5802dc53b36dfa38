"""The fake `tensorrt` module itself."""

from __future__ import annotations

import pytest


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
