"""Import `tensorrt`, check its version, and collect what it logs: one logger for the whole process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ..errors import MissingPackage, UserError

OLDEST = (10, 14)
BROKEN_REFIT = "11.3.0"
_SHOWN = 3  # lines of TensorRT's log in an error


def load() -> ModuleType:
    """The `tensorrt` module.

    Raises:
        UserError: when it is not installed, cannot be loaded, or is older than `OLDEST`.
    """
    try:
        import tensorrt
    except ModuleNotFoundError:
        raise MissingPackage("tensorrt", "the TensorRT engine", "tensorrt") from None
    except (ImportError, OSError) as error:
        raise UserError(
            f"tensorrt is installed but does not load: {str(error).splitlines()[0][:200]}",
            "pip install tensorrt-cu13 (or -cu12, for the CUDA version of your driver), which brings its libraries",
        ) from None
    if numbers(tensorrt.__version__)[:2] < OLDEST:
        raise UserError(
            f"TensorRT {tensorrt.__version__} is too old: accel needs {'.'.join(map(str, OLDEST))} or newer",
            'pip install --upgrade "accel-diffusion[tensorrt]"',
        )
    return tensorrt


def installed() -> str | None:
    """The version of the installed package, without importing it; None where there is none."""
    if find_spec("tensorrt") is None:
        return None
    for name in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return load().__version__


def numbers(version: str) -> tuple[int, ...]:
    """ "11.4.0.106" -> (11, 4, 0, 106)."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def refuse_broken_refit(version: str) -> None:
    """TensorRT 11.3.0 loses biases of matrix products in refittable engines (a known issue of its release notes)."""
    if version.startswith(BROKEN_REFIT):
        raise UserError(
            f"TensorRT {version} computes refittable engines wrongly (it can drop the bias of a matrix product)",
            "upgrade to TensorRT 11.4 or newer, or fuse the LoRA before export: accel export MODEL OUT --lora FILE",
        )


@dataclass
class Messages:
    """What TensorRT has logged since collecting began."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def last(self) -> str:
        """The last errors, or warnings where there are no errors, on one line."""
        lines = self.errors or self.warnings or ["TensorRT gave no reason"]
        return "; ".join(" ".join(line.split())[:300] for line in lines[-_SHOWN:])


_loggers: dict[ModuleType, Any] = {}
_collecting: list[Messages] = []
_lock, _making = threading.Lock(), threading.Lock()


def logger(trt: ModuleType) -> Any:
    """The logger of this process. TensorRT keeps the first logger it is given for good, so there is only one."""
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

    return Log()


@contextmanager
def collect() -> Iterator[Messages]:
    """What TensorRT logs while the body runs, on any thread."""
    messages = Messages()
    with _lock:
        _collecting.append(messages)
    try:
        yield messages
    finally:
        with _lock:
            _collecting[:] = [other for other in _collecting if other is not messages]
