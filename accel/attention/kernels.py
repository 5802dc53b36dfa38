"""The table of attention kernels, and which of them can run here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from ..errors import UserError, unknown


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to compute softmax(q k^T / sqrt(d)) v.

    Attributes:
        what: in words.
        backend: of torch's scaled_dot_product_attention (`torch.nn.attention.SDPBackend`); "" for all that torch has.
        function: "module:name" of a package's function; "" for torch's own.
        install: the command that brings the package.
        devices: kinds of torch devices that it runs on.
        half: whether it computes in float16 and bfloat16 alone.
        majors: major numbers of compute capability that it has code for; empty for all.
    """

    what: str
    backend: str = ""
    function: str = ""
    install: str = ""
    devices: tuple[str, ...] = ("cuda",)
    half: bool = False
    majors: tuple[int, ...] = ()


_ANY = ("cpu", "cuda")
_FLASH = "FlashAttention"
_AMPERE = (8, 9, 10, 11, 12)
KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "sdpa": Kernel(what="torch's scaled_dot_product_attention, which chooses by shapes and device", devices=_ANY),
        "flash": Kernel(what=f"{_FLASH} 2 inside torch", backend="FLASH_ATTENTION", devices=_ANY, majors=_AMPERE),
        "efficient": Kernel(what="torch's memory-efficient attention", backend="EFFICIENT_ATTENTION"),
        "cudnn": Kernel(what="cuDNN's attention", backend="CUDNN_ATTENTION", half=True, majors=_AMPERE),
        "math": Kernel(what="products and a softmax, with all scores in memory", backend="MATH", devices=_ANY),
        "flash-attn": Kernel(
            what=f"{_FLASH} 2 (arXiv 2307.08691)",
            function="flash_attn.flash_attn_interface:flash_attn_func",
            install='pip install "accel-diffusion[flash-attn]"',
            half=True,
            majors=_AMPERE,
        ),
        "flash-attn-3": Kernel(
            what=f"{_FLASH} 3 (arXiv 2407.08608), for Hopper",
            function="flash_attn_interface:flash_attn_func",
            install="build the folder hopper of github.com/Dao-AILab/flash-attention; PyPI has no package of it",
            half=True,
            majors=(9,),
        ),
        "flash-attn-4": Kernel(
            what=f"{_FLASH} 4, for Hopper and Blackwell",
            function="flash_attn.cute:flash_attn_func",
            install="pip install --pre flash-attn-4",
            half=True,
            majors=(9, 10, 11, 12),
        ),
        "xformers": Kernel(
            what="memory_efficient_attention of xformers",
            function="xformers.ops:memory_efficient_attention",
            install='pip install "accel-diffusion[xformers]"',
        ),
    }
)
NAMES = ("auto", *KERNELS)


def check(name: str, *, device: Any, half: bool) -> str:
    """The kernel that a name means here; `auto` is torch's own choice, `sdpa`.

    Args:
        name: a member of `NAMES`.
        device: where attention runs: a `torch.device`, or its text.
        half: whether it runs in float16 or bfloat16.

    Raises:
        UserError: where that kernel cannot run here, with the reason.
    """
    if name not in NAMES:
        raise unknown("attention", name, NAMES)
    if name == "auto":
        return "sdpa"
    kernel, kind = KERNELS[name], str(device).partition(":")[0]
    if kind not in kernel.devices:
        raise UserError(f"--attention {name} needs a CUDA device, this run is on {kind}", "--attention sdpa")
    if kernel.function:
        function_of(name)
    if kernel.half and not half:
        raise UserError(
            f"--attention {name} computes in half precision only",
            "add --precision fp16 or bf16 (in training --mixed-precision bf16), or --attention sdpa",
        )
    if kind == "cuda" and kernel.majors:
        _check_capability(name, kernel, device)
    return name


def function_of(name: str) -> Any:
    """The function of a kernel's package.

    Raises:
        UserError: where the package is not installed, or has no such function, with the command that brings it.
    """
    kernel = KERNELS[name]
    module, _, function = kernel.function.partition(":")
    try:
        return getattr(import_module(module), function)
    except Exception as error:  # ImportError, and whatever a library built for another torch raises
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise UserError(f"--attention {name} needs {module}.{function}: {reason}", kernel.install) from None


def _check_capability(name: str, kernel: Kernel, device: Any) -> None:
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    if major not in kernel.majors:
        needs = ", ".join(f"{number}.x" for number in kernel.majors)
        raise UserError(
            f"--attention {name} has no code for compute capability {major}.{minor} (it needs {needs})",
            "--attention sdpa",
        )
