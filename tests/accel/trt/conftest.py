"""Engine files as a build saves them, with contents that nobody runs: no TensorRT takes part."""

from __future__ import annotations

import pytest

from accel.bundle import Bundle
from accel.export.tensorrt import shapes
from accel.export.tensorrt.options import BuildOptions
from accel.trt import engine_files, preflight

COMPONENT = "vae_decoder"


@pytest.fixture
def bundle(bundle_copy, monkeypatch, tmp_path):
    """A bundle that a test may break, and a cache of its own: that is where this user's key lies."""
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    return Bundle.open(bundle_copy)


@pytest.fixture
def here() -> engine_files.Here:
    return engine_files.Here("11.4.0.106", "Fake GPU", "9.0")


@pytest.fixture
def save(bundle, here):
    """save(profiles, **options): an engine file of the VAE decoder, built here and signed."""

    def save(profiles=(), **options) -> engine_files.EngineFile:
        component, data = bundle.component(COMPONENT), b"a serialized engine"
        described = [shapes.described(bundle, component, p) for p in shapes.profiles_of(bundle, profiles)]
        identity = engine_files.identity(bundle, component, here, described, BuildOptions(**options).identity())
        record = {
            "component": COMPONENT,
            "key": engine_files.key_of(identity),
            "identity": identity,
            "plan": {"bytes": len(data), "sha256": engine_files.digest_bytes(data)},
            "audit": {"heavy": {"fp32": 1}, "wanted": "fp32"},
            "built": "2026-01-01T00:00:00+00:00",
        }
        return engine_files.save(bundle, data, record)

    return save


@pytest.fixture
def fit(here):
    """fit(bundle): the pre-flight's answer for the one engine file that the bundle has."""

    def fit(bundle) -> preflight.Fit:
        (file,) = engine_files.find(bundle)
        assert isinstance(file, engine_files.EngineFile), file
        return preflight.check(bundle, file, here)

    return fit
