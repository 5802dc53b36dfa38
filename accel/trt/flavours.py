"""The kinds of TensorRT, as data: what each is called, how it is installed, what it has and what it lacks.

* TensorRT 10 and 11 build on the GPU that an engine file is for; they are for servers and workstations.
* TensorRT-RTX builds on any machine, for the RTX cards it is told; it is for programs on their users' PCs.

Nothing else in accel asks for a version: what differs is a field here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Flavour:
    """One kind of TensorRT.

    Attributes:
        engine: accel's name of the engine that runs its engine files.
        title: its name in messages.
        modules: what it is imported as; the first that is installed counts.
        distributions: the packages that tell its version.
        oldest: the oldest version that accel is written for.
        before: the first version that is another flavour; () for none.
        extra: the extra of accel-diffusion that brings it.
        reinstall: the command that helps when it does not load.
        gpu_to_build: whether a build needs the GPU that it is for.
        targets: compute capabilities that a build may name, by NVIDIA's names in lower case; () where it cannot choose.
        default_targets: those that an engine file is for when none is named, and every later one.
        timing_cache: whether builds time kernels, and so keep a timing cache.
        runtime_cache: whether kernels are compiled when an engine is loaded, and kept in a runtime cache.
        layers: where the builder's layers are read: "inspector" (of the deserialized engine) or "log".
        forms: forms of a graph that it fuses better (`accel.export.tensorrt.forms`).
        lacks: build option -> why this flavour does not take it.
        driver_only: build option -> why it needs a driver on the machine that builds.
        broken_refit: versions (as they begin) that compute refittable engines wrongly.
    """

    engine: str
    title: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    oldest: tuple[int, ...]
    extra: str
    reinstall: str
    before: tuple[int, ...] = ()
    gpu_to_build: bool = True
    targets: tuple[str, ...] = ()
    default_targets: tuple[str, ...] = ()
    timing_cache: bool = True
    runtime_cache: bool = False
    layers: str = "inspector"
    forms: tuple[str, ...] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)
    driver_only: Mapping[str, str] = field(default_factory=dict)
    broken_refit: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("lacks", "driver_only"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f'pip install "accel-diffusion[{self.extra}]"'


_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings")
_REINSTALL = "pip install tensorrt-cu13 (or -cu12, for the CUDA version of your driver), which brings its libraries"
_NO_TARGETS = {"targets": "it builds for the GPU it runs on; TensorRT-RTX builds for others: --engine tensorrt-rtx"}

TENSORRT_10 = Flavour(
    engine="tensorrt",
    title="TensorRT",
    modules=("tensorrt",),
    distributions=_PACKAGES,
    oldest=(10, 14),
    before=(11,),
    extra="tensorrt",
    reinstall=_REINSTALL,
    lacks=_NO_TARGETS,
)
TENSORRT_11 = Flavour(
    engine="tensorrt",
    title="TensorRT",
    modules=("tensorrt",),
    distributions=_PACKAGES,
    oldest=(11,),
    extra="tensorrt",
    reinstall=_REINSTALL,
    lacks=_NO_TARGETS,
    broken_refit=("11.3.0",),
)
_NO_DRIVER = "its builder refits on the GPU, and there is no NVIDIA driver here"
RTX = Flavour(
    engine="tensorrt-rtx",
    title="TensorRT-RTX",
    modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
    distributions=("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
    oldest=(1, 7),
    extra="tensorrt-rtx",
    reinstall='pip install --force-reinstall "accel-diffusion[tensorrt-rtx]"',
    gpu_to_build=False,
    targets=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
    default_targets=("sm80", "sm86", "sm89", "sm120"),
    timing_cache=False,
    runtime_cache=True,
    layers="log",
    forms=("scalar_scales", "linear_projections", "norms_of_images"),
    lacks={
        "timing_cache": "it times no kernels while it builds",
        "version_compatible": "its engine files belong to the version that built them",
        "hardware_compatible": "its engine files run on every card of their --targets already",
        "device": "it builds without a GPU, for the cards that --targets names",
    },
    driver_only={"refittable": _NO_DRIVER, "strip_plan": _NO_DRIVER},
)

FLAVOURS = (TENSORRT_10, TENSORRT_11, RTX)
BY_ENGINE: Mapping[str, tuple[Flavour, ...]] = MappingProxyType(
    {name: tuple(f for f in FLAVOURS if f.engine == name) for name in ("tensorrt", "tensorrt-rtx")}
)


def flavour_of(engine: str, version: tuple[int, ...]) -> Flavour | None:
    """The flavour of a version of an engine's library; None where it is too old."""
    for flavour in BY_ENGINE[engine]:
        if version >= flavour.oldest and (not flavour.before or version < flavour.before):
            return flavour
    return None


def target_of(compute_capability: str) -> str:
    """ "8.9" -> "sm89"."""
    return "sm" + compute_capability.replace(".", "")


def runs_on(targets: tuple[str, ...], compute_capability: str) -> bool:
    """Whether an engine file with these targets runs on a card; without any, on Ampere and every later one."""
    if targets:
        return target_of(compute_capability) in targets
    return target_number(target_of(compute_capability)) >= target_number(RTX.default_targets[0])


def target_number(target: str) -> int:
    """ "sm120" -> 120."""
    return int(target.removeprefix("sm"))
