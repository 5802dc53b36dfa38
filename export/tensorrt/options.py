"""Options of a build, by TensorRT's names, and which of them a flavour or a graph does not take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accel.errors import UserError, unknown
from accel.int8.formats import Format
from accel.trt import library
from accel.trt.flavours import Flavour, target_number
from accel.trt.library import Library

HARDWARE = ("none", "ampere_plus", "same_compute_capability")


@dataclass(frozen=True)
class BuildOptions:
    """Options of the builder config, by TensorRT's names where it has one.

    Attributes:
        optimization_level: builder optimization level, 0 to 5; a higher one searches longer.
        tf32: let float32 layers compute in TF32 (10-bit mantissa). TensorRT's default is on, ours is off.
        workspace: limit of the workspace memory pool (scratch memory of one layer) in bytes; None for TensorRT's own.
        timing_cache: use the timing cache of earlier builds on this GPU, and extend it.
        refittable: the weights can be refitted after the build (LoRA).
        version_compatible: runs on later TensorRT of the same and the next major version too; may be slower.
        hardware_compatible: hardware compatibility level: "none" (this GPU model), "ampere_plus" or
            "same_compute_capability"; may be slower.
        strip_plan: leave the weights out of the engine file; they are refitted from the bundle at load.
        weight_streaming: weights may stay in host memory and be streamed to the GPU.
    """

    optimization_level: int = 3
    tf32: bool = False
    workspace: int | None = None
    timing_cache: bool = True
    refittable: bool = False
    version_compatible: bool = False
    hardware_compatible: str = "none"
    strip_plan: bool = False
    weight_streaming: bool = False

    def check(self, found: Library, targets: Sequence[str] = (), device: int | None = None) -> None:
        """Raise UserError for a value that TensorRT does not accept, or that this flavour ignores or gets wrong."""
        if not 0 <= self.optimization_level <= 5:
            wrong = f"invalid optimization level: {self.optimization_level}"
            raise UserError(wrong, "use 0 (fast build) to 5 (longest search)")
        if self.workspace is not None and self.workspace < 1 << 20:
            raise UserError(
                f"workspace too small: {self.workspace} bytes", "give at least 1M, or leave --workspace out"
            )
        if self.hardware_compatible not in HARDWARE:
            wrong = f"unknown hardware compatibility {self.hardware_compatible!r}"
            raise UserError(wrong, f"one of: {', '.join(HARDWARE)}")
        given = {name for name, value in asdict(self).items() if value != getattr(BuildOptions, name)}
        given |= {name for name, value in (("targets", targets), ("device", device)) if value not in (None, (), [])}
        refuse(found.flavour, given)
        check_targets(found.flavour, targets)
        if self.refittable or self.strip_plan:
            found.refuse_broken_refit()

    def check_format(self, form: Format, what: str, targets: Sequence[str] = ()) -> None:
        """Raise UserError for options, and for compute capabilities, that do not go with a quantized graph."""
        if below := [target for target in targets if target_number(target) < form.capability]:
            raise UserError(
                f"{what} is {form.name}, which {', '.join(below)} cannot compute: it takes compute capability "
                f"{form.capability / 10} or newer",
                f"leave it out of --targets; or export with --precision int8-fp16, which {below[0]} can",
            )
        if self.refittable:
            raise UserError(
                f"{what} is {form.name}, and cannot be refittable: its scales belong to its present weights",
                "leave out --refittable, and fuse a LoRA before export: accel export MODEL OUT --lora FILE",
            )

    def identity(self) -> dict[str, Any]:
        """The options that change the engine: all but where its timings come from."""
        return {name: value for name, value in asdict(self).items() if name != "timing_cache"}


def refuse(flavour: Flavour, given: set[str]) -> None:
    """Raise UserError for options that a flavour would ignore, or cannot do on this machine."""
    for name in sorted(given):
        flag = "--no-timing-cache" if name == "timing_cache" else f"--{name.replace('_', '-')}"
        if why := flavour.lacks.get(name):
            raise UserError(f"{flavour.title} does not take {flag}: {why}", f"leave {flag} out")
        if (why := flavour.driver_only.get(name)) and not library.has_driver():
            raise UserError(
                f"{flavour.title} cannot do {flag} here: {why}",
                f"leave {flag} out, or build on a machine with an RTX card; a LoRA can be fused before export: "
                "accel export MODEL OUT --lora FILE",
            )


def check_targets(flavour: Flavour, targets: Sequence[str]) -> None:
    """Raise UserError for compute capabilities that a flavour does not build for."""
    for target in targets:
        if target not in flavour.targets:
            if target.removeprefix("sm").isdigit() and target.startswith("sm9"):
                raise UserError(
                    f"{flavour.title} does not build for {target}: it has no kernels for Hopper",
                    "on a server with an H100 or H200, build there with TensorRT: accel build BUNDLE --engine tensorrt",
                )
            raise unknown("target", target, flavour.targets)
    if len(set(targets)) != len(targets):
        raise UserError(f"a target is given twice: {','.join(targets)}", "name each compute capability once")
