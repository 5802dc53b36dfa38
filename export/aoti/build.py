"""Build engine files of a bundle's components with AOTInductor, for this processor or this GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from typing import Any

from accel.bundle import Bundle, Component
from accel.engines import compile as torch_compile
from accel.engines.aoti.engine import instead, refuse_quantized
from accel.engines.aoti.place import Here, here
from accel.errors import UserError
from accel.trt import engine_files, preflight
from accel.trt.engine_files import EngineFile

from ..child import Progress, run_apart
from ..tensorrt import shapes
from .compiler import COMMAND


def place(device: str = "auto") -> Here:
    """What engine files of a device are built for.

    Raises:
        UserError: where the device, or a compiler for it, is missing.
    """
    found = here(device)
    if found is None:
        raise UserError(f"AOTInductor does not build for {device!r}", "--device cpu, or --device cuda")
    state = torch_compile.status()
    if not state.ok:
        raise UserError(f"AOTInductor cannot build here: {state.detail}", state.fix)
    if found.device == "cuda":
        _check_cuda()
    return found


def _check_cuda() -> None:
    """AOTInductor writes kernels with Triton, and C++ that includes CUDA's headers."""
    from torch.utils.cpp_extension import CUDA_HOME

    if find_spec("triton") is None:
        raise UserError("AOTInductor cannot build for a GPU here: triton is not installed", "pip install triton")
    if CUDA_HOME is None:
        raise UserError(
            "AOTInductor cannot build for a GPU here: CUDA's headers are missing (CUDA_HOME)",
            "install the CUDA toolkit of torch's version, and set CUDA_HOME; or --device cpu",
        )


def build(
    bundle: Bundle,
    components: Sequence[str] = (),
    *,
    device: str = "auto",
    dtype: str = "auto",
    profiles: Sequence[str] = (),
    force: bool = False,
    progress: Progress = lambda stage, fraction: None,
    announce: Callable[[str], None] = lambda line: None,
) -> list[EngineFile]:
    """Build an engine file of each component into the bundle's `engines/<key>/`.

    Args:
        components: their names; all of the bundle's by default.
        device: "auto" (the GPU where torch sees one, else the processor), "cpu", "cuda", "cuda:1".
        dtype: what they compute in: "auto" (the bundle's own), "bf16".
        profiles: the name of a shape profile, whose ranges stay free; the bundle's own by default.
        force: build again what exists already.
        progress: called with a description and the fraction done.
        announce: called with lines for people.

    Raises:
        UserError: where the device or a compiler is missing, one is quantized, torch cannot compile a network, or
            what it compiled differs from eager torch.
    """
    where = place(device)
    if len(profiles) > 1:
        raise UserError(
            f"an engine file of AOTInductor has one range of shapes, and {len(profiles)} profiles were given",
            f"accel build {bundle.path} --engine aoti --profile {profiles[0]}, and once more for each other one",
        )
    (profile,) = shapes.profiles_of(bundle, profiles)
    records = [bundle.component(name) for name in components or bundle.manifest.components]
    described, dtypes = [], []
    for component in records:  # all checks come before the first build
        refuse_quantized(component)
        dtypes.append(instead(component, dtype))
        described.append(shapes.described(bundle, component, profile))
    bundle.verify([component.folder for component in records])
    built = []
    for i, component in enumerate(records):

        def step(stage: str, fraction: float, i: int = i, name: str = component.name) -> None:
            progress(f"{name}: {stage}", (i + fraction) / len(records))

        built.append(_build_one(bundle, component, described[i], where, dtypes[i], force, step, announce))
    progress("done", 1.0)
    return built


def _build_one(
    bundle: Bundle,
    component: Component,
    profile: dict[str, Any],
    where: Here,
    dtype: str,
    force: bool,
    progress: Progress,
    announce: Callable[[str], None],
) -> EngineFile:
    identity = engine_files.identity(bundle, component, where, [profile], {"dtype": dtype} if dtype else {})
    key = engine_files.key_of(identity)
    if not force and (existing := _existing(bundle, component, key, where)):
        announce(f"{component.name}: {key[:8]} is already built")
        return existing
    started = time.perf_counter()
    job = {
        "bundle": str(bundle.path.resolve()),
        "component": component.name,
        "dims": profile["dims"],
        "device": where.place,
        "dtype": dtype,
    }
    result, data = run_apart(COMMAND, component.name, job, progress)
    parity = result.pop("parity")
    announce(f"{component.name}: differs from torch by {parity['relative_l2']:.1e} (limit {parity['limit']:.1e})")
    record = {
        "component": component.name,
        "key": key,
        "identity": identity,
        "plan": {
            "file": f"{component.name}{engine_files.KINDS[where.engine].suffix}",
            "bytes": len(data),
            "sha256": engine_files.digest_bytes(data),
        },
        "audit": {"parity": parity},
        "measured": result,
        "seconds": round(time.perf_counter() - started, 2),
        "built": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
    }
    return engine_files.save(bundle, data, record)


def _existing(bundle: Bundle, component: Component, key: str, where: Here) -> EngineFile | None:
    try:
        file = engine_files.read(bundle, key, component.name)
    except UserError:
        return None
    return file if preflight.check(bundle, file, where).ok else None
