"""Whether ONNX Runtime's built-in GPU providers run here: their libraries are found and loaded, and a product is tried.

`onnxruntime.get_available_providers()` says what a build was compiled with. Whether CUDA's libraries, a driver and a
device are there as well, only a session shows.
"""

from __future__ import annotations

import ctypes
import io
import re
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..trt import library
from . import plugins
from .built_in import PROVIDERS

_FIX = {
    "cuda": 'pip install "accel-diffusion[cuda]" brings CUDA\'s libraries; the driver has to be as new (nvidia-smi)',
    "tensorrt": 'pip install "accel-diffusion[ort-tensorrt]"',
}

# An ONNX graph: y = x x for x [2, 2] in float32 (opset 18), as `onnx.helper` writes it.
PRODUCT = (
    b'\x08\n:F\n\x11\n\x01x\n\x01x\x12\x01y"\x06MatMul\x12'
    b"\x07productZ\x13\n\x01x\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08"
    b"\x02\n\x02\x08\x02b\x13\n\x01y\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x02\n\x02"
    b"\x08\x02B\x04\n\x00\x10\x12"
)


def listed(provider: str) -> bool:
    """Whether this build of ONNX Runtime was compiled with a provider."""
    import onnxruntime as ort

    return PROVIDERS[provider] in ort.get_available_providers()


@cache
def preload() -> None:
    """Load CUDA's and cuDNN's libraries, which pip puts where the loader does not look.

    torch brings them along and loads its own, so it goes first: two versions in one process would not do.
    """
    import onnxruntime as ort

    if not any(map(listed, ("cuda", "tensorrt"))):
        return
    if find_spec("torch") is not None:
        import torch  # noqa: F401
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(io.StringIO()):  # it prints what it does not find, also where the system has it
            ort.preload_dlls()


@cache
def trouble(provider: str, device_id: int = 0) -> tuple[str, str] | None:
    """Why a listed provider cannot run here, and the fix; None where a small product ran on it. Tried once."""
    import onnxruntime as ort

    if provider == "tensorrt" and (found := _wrong_tensorrt()):
        return found, _FIX[provider]
    preload()
    options: Any = ort.SessionOptions()
    options.log_severity_level = 4
    chain = [(PROVIDERS[provider], {"device_id": device_id})]
    ort.set_default_logger_severity(4)  # what is missing is said below, in one line
    try:
        session = ort.InferenceSession(PRODUCT, options, providers=chain, enable_fallback=0)
        if PROVIDERS[provider] not in session.get_providers():
            return _missing(provider), _FIX[provider]
        session.run(None, {"x": np.ones((2, 2), np.float32)})
    except Exception as error:
        return plugins.cause(error) if provider == "cuda" else _missing(provider), _FIX[provider]
    finally:
        ort.set_default_logger_severity(2)
    return None


def _missing(provider: str) -> str:
    """What keeps a provider's library from loading, as the loader says it."""
    import onnxruntime as ort

    folder = Path(ort.__file__).parent / "capi"
    try:
        for name in ("shared", provider):
            ctypes.CDLL(str(folder / f"libonnxruntime_providers_{name}.so"), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error).splitlines()[0][:300]
    return "the driver, or a library that it needs, is missing or does not fit"


def _wrong_tensorrt() -> str:
    """What is wrong with the TensorRT that is installed, for the provider that this ONNX Runtime has; "" if nothing."""
    needed, version = needed_tensorrt(), library.installed()
    if needed is None or version is None or library.numbers(version)[0] == needed:
        return ""
    return f"this ONNX Runtime needs TensorRT {needed} (libnvinfer.so.{needed}), and {version} is installed"


def needed_tensorrt() -> int | None:
    """The major version of TensorRT that ONNX Runtime's provider is linked to; None where that cannot be read."""
    import onnxruntime as ort

    file = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    found = re.search(rb"libnvinfer\.so\.(\d+)", file.read_bytes()) if file.is_file() else None
    return int(found[1]) if found else None
