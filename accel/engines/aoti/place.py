"""What AOTInductor's files are built for: torch's version, the processor's instruction sets or the GPU."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ...errors import MissingPackage
from ...machine import instruction_sets, version_of
from ...trt.cuda import Cuda, index_of
from ...trt.engine_files import EngineFile
from ..base import Status, check_device

_MISSING = 4  # instruction sets that a message names


def status() -> Status:
    if find_spec("torch") is None:
        return Status(False, "torch is not installed", "pip install torch")
    return Status(True, f"torch {version_of('torch')}, for what `accel build --engine aoti` made")


@dataclass(frozen=True)
class Here:
    """A processor or a GPU, and torch's version.

    Attributes:
        device: "cpu", or "cuda" for every GPU: its index is not part of an engine's identity.
        isa: instruction sets of the processor; () on a GPU, where it computes nothing.
        gpu, compute_capability: of the GPU; "" on a processor.
    """

    torch: str
    device: str
    isa: tuple[str, ...] = ()
    gpu: str = ""
    compute_capability: str = ""
    index: int | None = None
    platform: str = f"{platform.system()} {platform.machine()}"
    engine: str = "aoti"

    @property
    def place(self) -> str:
        """As torch calls it: "cpu", "cuda:0"."""
        return self.device if self.index is None else f"cuda:{self.index}"

    def identity(self) -> dict[str, Any]:
        """The part of an engine's identity that comes from the place."""
        return {
            "engine": self.engine,
            "torch": self.torch,
            "device": self.device,
            "isa": list(self.isa),
            "gpu": self.gpu,
            "compute_capability": self.compute_capability,
            "platform": self.platform,
        }

    def refuses(self, file: EngineFile) -> str:
        """Why an engine file does not run here; empty where it does. Torch promises no compatibility of versions."""
        built = file.identity
        if built["device"] != self.device:
            return f"it was built for {built['gpu'] or 'the CPU'}, and this is to run on {self.gpu or 'the CPU'}"
        if built["platform"] != self.platform:
            return f"it was built on {built['platform']}, this is {self.platform}"
        if built["torch"] != self.torch:
            return f"it was built with torch {built['torch']}, here is {self.torch}"
        if missing := sorted(set(built["isa"]) - set(self.isa)):
            more = f" and {len(missing) - _MISSING} more" if len(missing) > _MISSING else ""
            return f"it was built for a processor with {', '.join(missing[:_MISSING])}{more}, which this one lacks"
        if built.get("compute_capability") != self.compute_capability:
            theirs = f"{built['gpu']} ({built.get('compute_capability')})"
            return f"it was built for {theirs}, here is {self.gpu} ({self.compute_capability})"
        return ""


def here(device: str = "auto") -> Here | None:
    """Where a device's engine files would run: of "auto" the GPU where torch sees one, else the processor.

    Returns:
        None for a device that is neither of both.

    Raises:
        UserError: for a GPU that torch does not see.
    """
    try:
        import torch
    except ImportError:
        raise MissingPackage("torch", "the aoti engine") from None
    if device == "cpu" or device == "auto" and not torch.cuda.is_available():
        return Here(torch.__version__, "cpu", instruction_sets())
    index = index_of(device)
    if index is None:
        return None
    check_device(device)
    gpu = Cuda(index).gpu
    return Here(torch.__version__, "cuda", (), gpu.name, gpu.compute_capability or "", index)
