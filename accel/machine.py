"""What a measurement was made on: processor, memory, system, package versions. Nothing that names a host or a person.

A number without its machine is folklore, so every report carries this record. It needs neither torch nor any engine:
packages are looked up in their metadata, never imported, and NVIDIA GPUs are listed by nvidia-smi.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

# Instruction sets that decide which low-precision kernels a CPU engine picks; x86 names, then ARM names.
ISA_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)
# What a compiler that is told "this processor" may use: of x86 what has a switch of its own, of ARM everything.
_INSTRUCTIONS = re.compile(
    r"avx|amx|sse|ssse|fma|f16c|bmi|abm|adx|aes|vaes|vpclmul|pclmul|gfni|sha_ni|movbe|movdir|popcnt|lzcnt|rdpid|"
    r"asimd|sve|sme$|sme\d|bf16|i8mm|fphp|crc32|atomics|fcma|dotprod|pmull|sha\d"
)
PACKAGES = (
    "accel-diffusion",
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "triton",
    "xformers",
    "flash-attn",
    "optimum",
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU: name, memory in bytes, compute capability such as `9.0`, driver version."""

    name: str
    memory: int | None
    compute_capability: str | None
    driver: str | None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of a measurement.

    Attributes:
        cpu: model name as the processor states it.
        cores: physical cores, None where the system does not tell.
        threads: logical processors this process may use.
        isa: those of `ISA_FLAGS` that the CPU has.
        memory: bytes this process may use: installed memory, or the container's limit.
        gpus: NVIDIA GPUs that nvidia-smi lists.
        os: name of the system, version of its kernel, architecture.
        python: version of the interpreter.
        packages: version of each of `PACKAGES`, None where it is not installed.
    """

    cpu: str
    cores: int | None
    threads: int
    isa: tuple[str, ...]
    memory: int
    gpus: tuple[Gpu, ...]
    os: str
    python: str
    packages: Mapping[str, str | None]

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings and numbers, for JSON."""
        data = asdict(self)
        return data | {"isa": list(self.isa), "gpus": list(data["gpus"]), "packages": dict(self.packages)}


def machine() -> Machine:
    """Looks at this machine. Takes some milliseconds, with a GPU up to a second; never raises for what is not there."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return Machine(
        cpu=_cpu(info),
        cores=psutil.cpu_count(logical=False),
        threads=_threads(),
        isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
        memory=min(psutil.virtual_memory().total, _container_memory() or sys.maxsize),
        gpus=_gpus(),
        os=_system(),
        python=platform.python_version(),
        packages={name: version_of(name) for name in PACKAGES},
    )


def instruction_sets() -> tuple[str, ...]:
    """The processor's vector and bit instructions, by the system's names: what compiled code may need to run."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return tuple(sorted(flag for flag in flags if _INSTRUCTIONS.match(flag)))


def int8_saturates() -> bool:
    """Whether this processor's int8 kernels add pairs of products in int16, which can be too narrow for their sum.

    So do those for AVX2 without VNNI (`pmaddubsw`): two products of uint8 with int8 reach 64,770, int16 ends at 32,767.
    """
    flags = set((_cpuinfo().get("flags") or "").split())
    return "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}


def machine_name() -> str:
    """What tells this processor from others as far as speed goes: its model and the threads this process may use."""
    return f"{_cpu(_cpuinfo())}, {_threads()} threads"


def _cpu(info: Mapping[str, str]) -> str:
    return info.get("model name") or platform.processor() or platform.machine() or "unknown"


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The first processor's lines; empty where there is no such file."""
    try:
        block = path.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _container_memory(path: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return None


def _gpus() -> tuple[Gpu, ...]:
    if not (program := shutil.which("nvidia-smi")):
        return ()
    query = [program, "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return _parse_gpus(done.stdout)


def _parse_gpus(table: str) -> tuple[Gpu, ...]:
    gpus = []
    for line in table.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4:
            name, memory, capability, driver = (None if f.startswith("[") or not f else f for f in fields)
            mebibytes = int(memory) if memory and memory.isdigit() else None
            gpus.append(
                Gpu(
                    name=name or "unknown",
                    memory=mebibytes and mebibytes * 2**20,
                    compute_capability=capability,
                    driver=driver,
                )
            )
    return tuple(gpus)


def _system() -> str:
    # Only the numbers of the kernel's release: the rest of it is free text of whoever built it.
    version = re.match(r"[0-9.]*", platform.release()).group().strip(".")
    name = platform.system() or "unknown"
    if name == "Linux":
        try:
            name = f"{platform.freedesktop_os_release()['PRETTY_NAME']}, Linux"
        except (OSError, KeyError):
            pass
    return " ".join(part for part in (name, version, platform.machine()) if part)


def version_of(package: str) -> str | None:
    """Version of an installed package, from its metadata; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
