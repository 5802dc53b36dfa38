"""Compile one network with AOTInductor: capture, compile, compare with eager torch. Runs in a child process."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from accel.bundle import Bundle, Component
from accel.bundle.shape_profiles import Range
from accel.dtypes import SHORT, torch_dtype
from accel.errors import UserError
from accel.models import networks
from accel.models.networks import Network

from ..child import Progress, serve
from ..graph import check
from ..graph.trace import example, exported_program, vocabulary_of

COMMAND = (sys.executable, "-m", "accel.export.aoti.compiler")


def compile_network(job: Mapping[str, Any], progress: Progress) -> tuple[dict[str, Any], bytes]:
    """Compile a component of a bundle, and compare it with the module that it was made from.

    Args:
        job: `bundle` (folder), `component` (name), `dims` (dimension -> [min, opt, max]), `device` ("cpu", "cuda:0"),
            `dtype` ("bf16", or "" for the component's own).

    Returns:
        {"parity": as `check.gate`, "cpu_seconds"}, and the bytes of the `.pt2` package.

    Raises:
        UserError: where torch cannot compile the network, or what it compiled differs.
    """
    progress("reading the network", 0.0)
    bundle, device = Bundle.open(job["bundle"]), job["device"]
    component = bundle.component(job["component"])
    dtype = SHORT.get(job["dtype"], component.dtype)
    network = _network(bundle, component, device, dtype)
    dims = {name: Range(*job["dims"][name], limits.multiple) for name, limits in component.dims.items()}
    progress("capturing", 0.05)
    program = exported_program(network, dims, device)
    progress("compiling", 0.15)
    path = Path(os.environ["TMPDIR"]) / "network.pt2"
    compiled = _compile(component.name, program, path)
    progress("comparing", 0.9)
    parity = _parity(bundle, component, network, compiled, dims, device, dtype)
    return {"parity": parity, "cpu_seconds": round(_cpu_seconds(), 2)}, path.read_bytes()


def _network(bundle: Bundle, component: Component, device: str, dtype: str) -> Network:
    """A component as eager torch runs it in a dtype; inputs and outputs keep theirs."""
    module = networks.stored(bundle, component)
    if dtype != component.dtype:
        module = module.to(torch_dtype(dtype))
    if dtype != "float32":
        networks.keep_float32(module.model, component.float32, component.fp32_output)
    if dtype not in ("float32", component.dtype):
        module.forward = _cast(module.forward, component, torch_dtype(dtype))
    return Network(component.name, component.kind, module.to(device), component.inputs, component.outputs)


def _cast(forward: Callable[..., Any], component: Component, dtype: torch.dtype) -> Callable[..., Any]:
    """A network of a lower dtype, which takes and gives the dtypes of the manifest."""
    lower = {spec.name for spec in component.inputs if spec.is_activation}

    @wraps(forward)
    def cast(**feeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = forward(**{name: value.to(dtype) if name in lower else value for name, value in feeds.items()})
        pairs = zip(component.outputs, outputs, strict=True)
        return tuple(value.to(torch_dtype(spec.dtype)) for spec, value in pairs)

    return cast


def _compile(name: str, program: torch.export.ExportedProgram, path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
            return torch._inductor.aoti_load_package(str(path))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"AOTInductor of torch {torch.__version__} cannot compile {name}: {lines[0][:300]}",
            "see accel doctor; --engine compile runs the same compiler without a file",
        ) from None


def _parity(
    bundle: Bundle,
    component: Component,
    network: Network,
    compiled: Any,
    dims: Mapping[str, Range],
    device: str,
    dtype: str,
) -> dict[str, float]:
    """Errors against float32 torch, on the smallest and the usual shapes: of the package, and of eager torch."""
    reference = network if dtype == "float32" else _network(bundle, component, "cpu", "float32")
    ours, eager, exact = [], [], []
    for seed, end in enumerate(("min", "opt")):
        sizes = {name: getattr(limits, end) for name, limits in dims.items()}
        feeds = example(component.inputs, sizes, seed=seed, vocabulary=vocabulary_of(network))
        there = {name: value.to(device) for name, value in feeds.items()}
        wide = {name: value.float() if value.is_floating_point() else value for name, value in feeds.items()}
        with torch.inference_mode():
            ours.append(_numpy(compiled(**there)))
            eager.append(_numpy(network.module(**there)))
            exact.append(eager[-1] if reference is network else _numpy(reference.module(**wide)))
    own, floor = check.worst(ours, exact), check.worst(eager, exact)
    limit = check.FP32_GATE if dtype == "float32" else check.FP16_FACTOR * floor
    if not own <= limit:
        raise UserError(
            f"{component.name} of AOTInductor differs from torch by {own:.2e} (relative L2; limit {limit:.2e})",
            "run it on another engine, and report the model",
        )
    return {"relative_l2": float(own), "limit": float(limit), "torch_relative_l2": float(floor)}


def _numpy(outputs: Any) -> list[Any]:
    return [value.float().cpu().numpy() for value in outputs]


def _cpu_seconds() -> float:
    """Of this process and the compilers that it started."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


if __name__ == "__main__":
    serve(compile_network)
