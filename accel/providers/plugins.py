"""Plugin execution providers: libraries that ONNX Runtime loads at run time (1.23 and later).

A library is registered once in a process, and offers devices of its own ("EP devices"). A session is given devices, not
the names of providers. https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries/
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import UserError
from ..trt import library
from ..trt.flavours import RTX

_UPGRADE = 'pip install --upgrade "onnxruntime>=1.24"'
# Kinds of devices as `--device` says them, and as ONNX Runtime does.
_KINDS: Mapping[str, str] = MappingProxyType({"cpu": "CPU", "gpu": "GPU", "cuda": "GPU", "npu": "NPU"})


@dataclass(frozen=True)
class Plugin:
    """A library of execution providers.

    Attributes:
        name: what `--provider` calls it.
        path: the library.
        provider: ONNX Runtime's name of the provider in it; "" where the library alone knows.
        needs: what a machine must have, for the fix of an error.
    """

    name: str
    path: Path
    provider: str = ""
    needs: str = "see what the library needs in its documentation"


@dataclass(frozen=True)
class Package:
    """A Python package that brings a plugin, with the function `get_library_path()` that such packages have."""

    module: str
    provider: str
    install: str
    needs: str


PACKAGED: Mapping[str, Package] = MappingProxyType(
    {
        "tensorrt-rtx": Package(
            "onnxruntime_ep_nv_tensorrt_rtx",
            "NvTensorRTRTXExecutionProvider",
            RTX.install,
            "it needs an RTX card (Ampere or newer) and NVIDIA's driver",
        )
    }
)


def named(text: str) -> Plugin | None:
    """The plugin that `--provider` means: a name of `PACKAGED`, or `NAME=PATH`; None for any other text.

    Raises:
        UserError: when there is no such library.
    """
    name, given, path = text.partition("=")
    if given:
        library_path = Path(path).expanduser().resolve()
        if not name or not library_path.is_file():
            raise UserError(
                f"there is no provider library {path!r}" if name else f"{text!r} does not name the provider",
                "--provider NAME=PATH, with the path of a library such as libonnxruntime_providers_NAME.so",
            )
        return Plugin(name, library_path)
    if text not in PACKAGED:
        return None
    package = PACKAGED[text]
    if find_spec(package.module) is None:
        raise UserError(f"ONNX Runtime's provider {text} is not installed", package.install)
    try:
        found = import_module(package.module).get_library_path()  # the import loads what the library needs
    except (ImportError, OSError, AttributeError) as error:
        raise UserError(
            f"{package.module} is installed but does not load: {str(error).splitlines()[0][:200]}",
            package.install.replace("install", "install --force-reinstall"),
        ) from None
    return Plugin(text, Path(found), package.provider, package.needs)


def state(name: str) -> str:
    """What can be said of a plugin of `PACKAGED` without loading it; "" where it is not installed."""
    if find_spec(PACKAGED[name].module) is None:
        return ""
    if name == RTX.engine and not library.has_driver():
        return f"{name} is installed but cannot run: there is no NVIDIA driver"
    return f"{name} is installed"


_registered: dict[Path, frozenset[str]] = {}  # library -> the providers that it brought, for the life of the process
_lock = threading.Lock()


def devices(plugin: Plugin) -> list[Any]:
    """What a plugin's provider can run on here, as ONNX Runtime's `OrtEpDevice`; registers its library at first.

    Raises:
        UserError: when the library cannot be loaded, or finds no device here.
    """
    import onnxruntime as ort

    if not hasattr(ort, "register_execution_provider_library"):
        raise UserError(f"onnxruntime {ort.__version__} takes no plugin providers: they came with 1.23", _UPGRADE)
    with _lock:
        before = frozenset(device.ep_name for device in ort.get_ep_devices())
        wanted = {plugin.provider or plugin.name}
        if plugin.path not in _registered and not wanted & before:  # otherwise the program has registered it by itself
            try:
                ort.register_execution_provider_library(plugin.provider or plugin.name, str(plugin.path))
            except Exception as error:
                raise UserError(
                    f"ONNX Runtime's provider {plugin.name} cannot be used here: {_reason(error)}",
                    f"{plugin.needs}; or --provider cpu",
                ) from None
            _registered[plugin.path] = frozenset(device.ep_name for device in ort.get_ep_devices()) - before
        names = _registered.get(plugin.path, frozenset()) | wanted
    found = [device for device in ort.get_ep_devices() if device.ep_name in names]
    if not found:
        raise UserError(
            f"ONNX Runtime's provider {plugin.name} finds no device here that it can run on",
            f"{plugin.needs}; or --provider cpu",
        )
    offered = sorted({device.ep_name for device in found})
    own = [device for device in found if device.ep_name in wanted]
    if not own and len(offered) > 1:
        raise UserError(
            f"{plugin.path.name} brings several providers: {', '.join(offered)}",
            f"--provider {offered[0]}={plugin.path}",
        )
    return own or found


def cause(error: Exception) -> str:
    """What ONNX Runtime says behind its prefixes, on one line."""
    return re.split(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", str(error))[-1].strip().splitlines()[0][:300]


def _reason(error: Exception) -> str:
    """What kept a library from loading, in words."""
    line = cause(error)
    if re.search(r"libcuda\.so|nvcuda|libnvidia-ml|nvml", line):
        return f"there is no NVIDIA driver ({line.rpartition('error: ')[2]})"
    if "CreateEpFactories" in line:
        return "the library is none of ONNX Runtime's providers (it has no CreateEpFactories)"
    return line


def pick(plugin: Plugin, offered: Sequence[Any], device: str) -> Any:
    """The device to run on.

    Args:
        offered: what `devices` gave.
        device: "auto" for the first, or "cpu", "gpu" (which "cuda" means as well), "npu", with the number of one, as
            in "gpu:1".

    Raises:
        UserError: when the plugin offers no such device.
    """
    kind, _, number = device.partition(":")
    if device == "auto":
        return offered[0]
    fits = [entry for entry in offered if entry.device.type.name == _KINDS.get(kind)]
    if not (number or "0").isdigit() or int(number or 0) >= len(fits):
        places = ", ".join(dict.fromkeys(entry.device.type.name.lower() for entry in offered))
        raise UserError(
            f"provider {plugin.name} has no device {device!r} here; it has {len(offered)}: {places}",
            f"--device {offered[0].device.type.name.lower()}, or leave it out",
        )
    return fits[int(number or 0)]
