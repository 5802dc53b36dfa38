"""TensorRT-RTX's libraries, wherever a package has put them: the bindings alone bring none.

NVIDIA's own `tensorrt_rtx` finds its libraries by itself. The pair that accel installs does not: the bindings
(`tensorrt_rtx_bindings`) ask the system for libraries that lie in ONNX Runtime's plugin package, so these are loaded
first, the runtime before the parser that needs it.
"""

from __future__ import annotations

import ctypes
import os
import re
from importlib.util import find_spec
from pathlib import Path

from ..errors import UserError

HOLDER = "onnxruntime_ep_nv_tensorrt_rtx"
_LINUX = (re.compile(r"libtensorrt_rtx\.so\.(\d[\d.]*)"), re.compile(r"libtensorrt_onnxparser_rtx\.so\.(\d[\d.]*)"))
_WINDOWS = (re.compile(r"tensorrt_rtx_(\d\w*)\.dll"), re.compile(r"tensorrt_onnxparser_rtx_(\d\w*)\.dll"))


def preload(bindings: str, fix: str) -> None:
    """Load the libraries that the bindings of a version need.

    Args:
        bindings: their version, "1.7.1.116".
        fix: the command that installs a matching pair.

    Raises:
        UserError: when there are none, or they are of another version: mixed versions crash without a word.
    """
    folder = _folder()
    if folder is None:
        return  # the system has to know them
    found = [_newest(folder, pattern) for pattern in (_WINDOWS if os.name == "nt" else _LINUX)]
    if not all(found):
        raise UserError(f"{folder} has no libraries of TensorRT-RTX", fix)
    for path, version in filter(None, found):
        if not _same(version, bindings):
            raise UserError(f"TensorRT-RTX's bindings are {bindings} and its libraries {version}: {path.name}", fix)
        if os.name == "nt":
            os.add_dll_directory(str(folder))
            os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"  # where the bindings look
            ctypes.CDLL(str(path))
        else:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _folder() -> Path | None:
    spec = find_spec(HOLDER)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _newest(folder: Path, pattern: re.Pattern[str]) -> tuple[Path, str] | None:
    names = sorted((m[1], path) for path in folder.iterdir() if (m := pattern.fullmatch(path.name)))
    return (names[-1][1], names[-1][0].replace("_", ".")) if names else None


def _same(libraries: str, bindings: str) -> bool:
    """Whether two versions agree as far as both say: file names have three numbers on Linux, two on Windows."""
    ours, theirs = libraries.split("."), bindings.split(".")
    count = min(len(ours), len(theirs))
    return ours[:count] == theirs[:count]
