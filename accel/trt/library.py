"""Import a TensorRT library, say which flavour it is, and collect what it logs: one logger for each module."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ..errors import MissingPackage, UserError
from . import rtx_libraries
from .flavours import BY_ENGINE, Flavour, flavour_of

_SHOWN = 3  # lines of TensorRT's log in an error


@dataclass(frozen=True)
class Library:
    """A TensorRT module that is loaded, and which flavour it is."""

    module: Any
    flavour: Flavour

    @property
    def version(self) -> str:
        return self.module.__version__

    def __str__(self) -> str:
        return f"{self.flavour.title} {self.version}"

    def refuse_broken_refit(self) -> None:
        """TensorRT 11.3.0 loses biases of matrix products in refittable engines (a known issue of its notes)."""
        if self.version.startswith(self.flavour.broken_refit or ("none",)):
            raise UserError(
                f"{self} computes refittable engines wrongly (it can drop the bias of a matrix product)",
                "upgrade to TensorRT 11.4 or newer, or put weights in at export: accel export MODEL OUT --lora FILE",
            )


def load(engine: str = "tensorrt") -> Library:
    """The library of an engine: "tensorrt" (TensorRT 10 or 11) or "tensorrt-rtx".

    Raises:
        UserError: when it is not installed, cannot be loaded, or is too old.
    """
    family = BY_ENGINE[engine]
    module = _import(family[0], f"the {family[0].title} engine")
    flavour = flavour_of(engine, numbers(module.__version__))
    if flavour is None:
        oldest = ".".join(map(str, family[0].oldest))
        raise UserError(
            f"{family[0].title} {module.__version__} is too old: accel needs {oldest} or newer",
            family[0].install.replace("install", "install --upgrade"),
        )
    return Library(module, flavour)


def _import(flavour: Flavour, use: str) -> ModuleType:
    name = _module(flavour)
    try:
        if name == "tensorrt_rtx_bindings" and (version := installed(flavour.engine)):
            rtx_libraries.preload(version, flavour.reinstall)
        return import_module(name)
    except ModuleNotFoundError:
        raise MissingPackage(name.replace("_", "-"), use, flavour.extra) from None
    except (ImportError, OSError) as error:
        raise UserError(
            f"{name} is installed but does not load: {str(error).splitlines()[0][:200]}", flavour.reinstall
        ) from None


def _module(flavour: Flavour) -> str:
    """The first module of a flavour that is installed, or where none is, its own name."""
    return next((name for name in flavour.modules if _found(name)), flavour.modules[0])


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a test double, or half of a package
        return True


def installed(engine: str = "tensorrt") -> str | None:
    """The version of an engine's installed package, without importing it; None where there is none."""
    flavour = BY_ENGINE[engine][0]
    if not any(map(_found, flavour.modules)):
        return None
    for name in flavour.distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return load(engine).version


@cache
def has_driver() -> bool:
    """Whether NVIDIA's driver is installed: its library loads, and finds a device."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        count = ctypes.c_int()
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False


def numbers(version: str) -> tuple[int, ...]:
    """ "11.4.0.106" -> (11, 4, 0, 106)."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


# What TensorRT logs around a cause without being one: dumps of the node it stumbled over, and the missing driver, which
# it notes before every error on a machine without one.
_NOISE = re.compile(
    r"--- (Begin|End) node ---|^\s*$|cudaError|CUDA (initialization|driver)|no CUDA-capable", re.IGNORECASE
)


@dataclass
class Messages:
    """What TensorRT has logged since collecting began.

    Attributes:
        rest: everything else, kept only where `collect` was asked for it.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    rest: list[str] | None = None

    def causes(self, since: int = 0) -> list[str]:
        """The errors that name a cause, without the first ones."""
        return [line for line in self.errors[since:] if not _NOISE.search(line)]

    def last(self) -> str:
        """The last errors that name a cause, or warnings where there are no errors, on one line."""
        lines = self.errors or self.warnings or ["TensorRT gave no reason"]
        lines = [line for line in lines if not _NOISE.search(line)] or lines
        return "; ".join(" ".join(line.split())[:300] for line in lines[-_SHOWN:])


_loggers: dict[ModuleType, Any] = {}
_collecting: list[Messages] = []
_lock, _making = threading.Lock(), threading.Lock()


def logger(trt: ModuleType) -> Any:
    """The logger of a module in this process: TensorRT keeps the first one it is given for good."""
    with _making:  # not `_lock`: a logger may log while it is being made
        if trt not in _loggers:
            _loggers[trt] = _make_logger(trt)
        return _loggers[trt]


def _make_logger(trt: ModuleType) -> Any:
    severities = trt.ILogger.Severity

    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, msg):
            with _lock:
                for messages in _collecting:
                    if severity in (severities.INTERNAL_ERROR, severities.ERROR):
                        messages.errors.append(msg)
                    elif severity == severities.WARNING:
                        messages.warnings.append(msg)
                    elif messages.rest is not None:
                        messages.rest.append(msg)

    return Log()


@contextmanager
def collect(everything: bool = False) -> Iterator[Messages]:
    """What TensorRT logs while the body runs, on any thread.

    Args:
        everything: keep what is neither error nor warning as well: a build logs thousands of lines.
    """
    messages = Messages(rest=[] if everything else None)
    with _lock:
        _collecting.append(messages)
    try:
        yield messages
    finally:
        with _lock:
            _collecting[:] = [other for other in _collecting if other is not messages]
