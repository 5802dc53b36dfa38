"""ONNX Runtime's CUDA and TensorRT providers are believed when they ran something, not because a build lists them."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

import accel
from accel.engines import attempt, choose
from accel.errors import Notice, UserError
from accel.providers import gpu
from accel.providers.built_in import PROVIDERS
from accel.trt import library

PYPROJECT = (Path(accel.__file__).parents[1] / "pyproject.toml").read_text()


@pytest.fixture
def lists_cuda(monkeypatch):
    """A build that was compiled with the GPU providers, on a machine where they have no libraries."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(PROVIDERS.values()))
    for probe in (gpu.trouble, gpu.preload):
        probe.cache_clear()
    yield
    for probe in (gpu.trouble, gpu.preload):
        probe.cache_clear()


def test_auto_takes_the_cpu_where_cuda_is_listed_and_does_not_run(lists_cuda, sd15_bundle):
    with pytest.warns(Notice, match="CUDA provider does not run here, so it is left out: .+accel-diffusion"):
        unet = accel.load_engine(sd15_bundle, "unet", "onnxruntime")
    assert unet.device == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert choose("auto", unet.component) != "onnxruntime"  # OpenVINO is before it where there is no GPU


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_named_provider_that_does_not_run_is_refused_with_the_reason(lists_cuda, sd15_bundle, provider):
    with pytest.raises(UserError, match=f"{provider} provider does not run here: .+") as refused:
        accel.load_engine(sd15_bundle, "unet", "onnxruntime", provider=provider)
    assert "pip install" in refused.value.fix


def test_doctor_tries_the_providers_and_says_which_run(lists_cuda):
    from accel.engines.onnxruntime import attempt as tried

    assert tried().startswith("cpu, cuda does not run: ")
    assert attempt.attempt("onnxruntime").ok


def test_libraries_are_loaded_before_the_first_session_and_torch_first(lists_cuda, monkeypatch):
    order = []
    monkeypatch.setattr(ort, "preload_dlls", lambda: order.append(("preload", "torch" in sys.modules)))
    monkeypatch.setattr(ort, "InferenceSession", lambda *a, **k: order.append("session") or 1 / 0)
    assert gpu.trouble("cuda") is not None
    assert order == [("preload", True), "session"]


def test_nothing_is_loaded_where_the_build_has_no_gpu_providers(monkeypatch):
    monkeypatch.setattr(ort, "preload_dlls", lambda: pytest.fail("preloaded"))
    gpu.preload.cache_clear()
    gpu.preload()
    gpu.preload.cache_clear()


def test_the_tensorrt_that_the_provider_is_linked_to_is_read_from_it(lists_cuda, monkeypatch, tmp_path):
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi/libonnxruntime_providers_tensorrt.so").write_bytes(b"\x7fELF..\0libnvinfer.so.10\0libc.so.6\0")
    monkeypatch.setattr(ort, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(library, "installed", lambda engine="tensorrt": "11.4.0.106")
    reason, fix = gpu.trouble("tensorrt")
    assert reason == "this ONNX Runtime needs TensorRT 10 (libnvinfer.so.10), and 11.4.0.106 is installed"
    assert "ort-tensorrt" in fix


def test_the_extras_bring_what_the_providers_need():
    cuda, tensorrt = (re.search(rf"^{name} = (.+)$", PYPROJECT, re.M)[1] for name in ("cuda", "ort-tensorrt"))
    assert "onnxruntime-gpu[cuda,cudnn]>=1.27" in cuda and "onnxruntime-gpu[cuda,cudnn]>=1.27" in tensorrt
    assert "tensorrt>=10.14,<11" in tensorrt


def test_the_graph_that_is_tried_is_a_product():
    session = ort.InferenceSession(gpu.PRODUCT, providers=["CPUExecutionProvider"])
    x = np.array([[1, 2], [3, 4]], np.float32)
    assert np.array_equal(session.run(None, {"x": x})[0], x @ x)


def test_a_provider_that_runs_is_no_trouble(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "cuda", "CPUExecutionProvider")
    session = ort.InferenceSession(gpu.PRODUCT, providers=["CPUExecutionProvider"])
    made = SimpleNamespace(get_providers=session.get_providers, run=session.run)
    monkeypatch.setattr(ort, "InferenceSession", lambda *a, **k: made)
    gpu.trouble.cache_clear()
    assert gpu.trouble("cuda") is None
    gpu.trouble.cache_clear()
