"""Accept or reject int8 per component; rejected components fall back to float."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accel.bundle import Bundle, Component
from accel.int8.formats import INT8
from accel.trt import engine_files

from .settings import Int8Settings


@dataclass(frozen=True)
class Decision:
    """Whether a component is int8, and the measurements that decided, for the manifest.

    Attributes:
        reason: why int8 is rejected; empty if it is accepted.
        measurements: as given to `accept`, and `enabled_engines`: those on which `auto` may choose int8.
    """

    reason: str = ""
    measurements: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        return not self.reason


def accept(component: str, measurements: Mapping[str, Any], settings: Int8Settings) -> Decision:
    """Decide about one component. Parity alone decides until, or unless, speed was measured on some engine.

    Args:
        measurements: `parity` (`image_parity.Evaluator.component`); and, once they were taken, `engines` and `audit`
            (`speed.measure`). An engine is enabled if the format is faster there, within the budget, and passes the
            audit; where weights alone are quantized, which is for memory, it need not be faster.
    """
    parity, engines = measurements["parity"], measurements.get("engines", {})
    enabled = [
        engine
        for engine, entry in engines.items()
        if (entry["faster"] or not settings.form.activations and "error" not in entry)
        and parity["ok"]
        and measurements["audit"][engine]["ok"]
    ]
    reason = ""
    if not settings.requires(component):
        if not parity["ok"]:
            reason = f"outside the parity budget of {settings.least_psnr:g} dB ({parity['psnr']:.1f} dB)"
        elif engines and not enabled and settings.form.activations:  # weights alone are quantized for memory
            reason = f"{settings.form.name} is not faster on this machine"
    named = {"format": settings.form.name} if reason and settings.form is not INT8 else {}
    return Decision(reason, dict(measurements) | {"enabled_engines": enabled} | named)


def apply(decision: Decision, component: Component, fallback: Bundle, folder: Path) -> Component:
    """Carry out a decision in the folder of a bundle that is being made.

    Args:
        component: as the folder has it, in int8 or float.
        fallback: bundle of the float component, which replaces a rejected int8 one.

    Returns:
        The component's record for the manifest.
    """
    measurements = dict(decision.measurements)
    audits = measurements.pop("audit", {})
    if decision.accepted:
        return replace(component, int8=dict(component.int8) | {"audit": audits, "acceptance": measurements})
    if component.int8:
        shutil.rmtree(folder / component.name)
        fallback.copy(folder, component.name)
        component = fallback.component(component.name)
    return record_fallback(component, decision.reason, measurements)


def record_fallback(component: Component, reason: str, measurements: Mapping[str, Any]) -> Component:
    """The record of a float component, with why it is not int8 and what was measured until then."""
    return replace(component, parity=dict(component.parity) | {"int8_tried": {"reason": reason, **measurements}})


def keep_engine_files(component: Component, built: Bundle, folder: Path) -> None:
    """Keep a component's TensorRT engine files if int8 is enabled there: they took minutes to build and still fit.

    Args:
        built: bundle with the engine files that speed was measured on.
        folder: the finished bundle, with the same component.
    """
    for engine in component.int8.get("acceptance", {}).get("enabled_engines", ()):
        for engine_file in engine_files.find(built, component.name, engine):
            here = engine_file.path.parent
            shutil.copytree(here, folder / engine_files.FOLDER / here.name, dirs_exist_ok=True)
