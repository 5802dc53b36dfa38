"""The table of engines: which can run here, which one `auto` takes, and loading a component on it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..bundle import Bundle, Component
from ..errors import Notice, UserError, unknown
from ..machine import machine_name
from ..trt.preflight import NoEngineFile
from .base import Engine, Facts, Status

if TYPE_CHECKING:
    from ..trt.engine_files import EngineFile

# Fastest first: the order in which `auto` asks.
ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "tensorrt": "accel.engines.tensorrt",
        "openvino": "accel.engines.openvino",
        "onnxruntime": "accel.engines.onnxruntime",
        "compile": "accel.engines.compile",
        "eager": "accel.engines.eager",
    }
)


def facts(name: str) -> Facts:
    """What an engine's module declares about it; imports no library.

    Raises:
        UserError: for an unknown engine.
    """
    return _module(name).FACTS


def status(name: str) -> Status:
    """Whether an engine can run here.

    Raises:
        UserError: for an unknown engine.
    """
    return _module(name).status()


def with_option(option: str) -> list[str]:
    """Engines that take an option of the command line."""
    return [name for name in reversed(tuple(ENGINES)) if option in facts(name).options]


def int8_engines() -> tuple[str, ...]:
    """Engines that compute int8 graphs in integers."""
    return tuple(name for name in reversed(tuple(ENGINES)) if facts(name).int8)


def _module(name: str) -> Any:
    if name not in ENGINES:
        raise unknown("engine", name, ["auto", *reversed(tuple(ENGINES))])
    return import_module(ENGINES[name])


def choose(
    name: str = "auto", component: Component | None = None, bundle: Bundle | None = None, device: str = "auto"
) -> str:
    """The engine to use: an explicit choice as it is, or an error; `auto` the best that can run here.

    `auto` takes TensorRT where the bundle has an engine file of the component that fits, then a GPU that ONNX Runtime
    can drive, then the first of `ENGINES` that declares the device in its facts.
    For an int8 component `auto` goes by what its export measured: never an engine on which int8 was slower, never
    images outside the parity budget; where nothing was measured it says so.

    Args:
        device: where the component is to run: "auto", "cpu", "cuda:1", ...

    Raises:
        UserError: when the named engine cannot run here, or `auto` may not choose any, with the fix.
    """
    if name != "auto":
        state = status(name)
        if not state.ok:
            raise UserError(f"the {name} engine cannot run here: {state.detail}", state.fix)
        return name
    engine_file = (
        fitting_engine_file(bundle, component.name, device) if bundle is not None and component is not None else None
    )
    if component is not None and component.int8:
        return _choose_int8(component, engine_file)
    if engine_file is not None:
        return "tensorrt"
    ort = status("onnxruntime")
    if ort.ok and "cuda" in ort.detail and device != "cpu":
        return "onnxruntime"
    place = "cuda" if device.startswith("cuda") else "cpu"
    for candidate in ENGINES:
        if place in facts(candidate).auto and status(candidate).ok:
            return candidate
    raise UserError("no engine can run here", 'pip install "accel-diffusion[cpu]"')


def _check_parity(component: Component) -> None:
    parity = component.int8.get("acceptance", {}).get("parity", {})
    if parity.get("ok") is False:
        raise UserError(
            f"int8 of {component.name} is outside its parity budget ({parity.get('psnr', float('nan')):.1f} dB against "
            f"float32, {parity.get('budget', float('nan')):g} dB required), so auto does not choose it",
            "name an engine to use it all the same, or export with --precision auto, or with --budget",
        )


def _choose_int8(component: Component, engine_file: EngineFile | None) -> str:
    """By what was measured on this processor, and on the GPU that the engine file, if there is one, was built for."""
    _check_parity(component)
    name, acceptance = component.name, component.int8.get("acceptance", {})
    places: dict[str, Any] = {engine: machine_name() for engine in ENGINES if facts(engine).int8}
    places["tensorrt"] = engine_file and engine_file.identity["gpu"]
    able = [engine for engine in places if engine != "tensorrt" and status(engine).ok]
    able += ["tensorrt"] * (engine_file is not None)
    measured = {
        engine: entry
        for engine, entry in acceptance.get("engines", {}).items()
        if engine in places and entry.get("on", acceptance.get("machine")) == places[engine]
    }
    if engine_file is not None and "tensorrt" not in measured:
        _not_measured(component, "tensorrt")
        return "tensorrt"
    enabled = {engine: entry for engine, entry in measured.items() if engine in acceptance.get("enabled_engines", ())}
    faster = {engine: entry["int8_seconds"] for engine, entry in enabled.items() if engine in able}
    if faster:
        return min(faster, key=faster.__getitem__)
    if enabled:
        raise UserError(
            f"int8 of {name} is worth it on {' and '.join(enabled)} alone, which cannot run here now",
            f"accel doctor says why; name one of {', '.join(able)} to use it all the same",
        )
    if measured:
        raise UserError(
            f"int8 of {name} is not faster than {acceptance.get('against', 'float32')} on this machine ("
            + ", ".join(f"{engine} {entry.get('speedup', 0):.2f}x" for engine, entry in measured.items())
            + "), so auto does not choose it",
            "name an engine to use it all the same, or export with --precision auto",
        )
    if able:
        _not_measured(component, able[0])
        return able[0]
    raise UserError("no engine that runs int8 is installed", 'pip install "accel-diffusion[cpu]"')


def _not_measured(component: Component, engine: str) -> None:
    warnings.warn(
        f"whether int8 of {component.name} is faster on {engine} was not measured on this machine: `accel bench` does",
        Notice,
        stacklevel=4,
    )


def fitting_engine_file(bundle: Bundle, component: str, device: str = "auto") -> EngineFile | None:
    """The newest TensorRT engine file of a component that fits here, but for its contents, which loading compares.

    Costs nothing where there are no engine files, or the device is not a GPU.
    """
    from ..trt import engine_files, library, preflight
    from ..trt.cuda import Cuda, index_of

    readable = [file for file in engine_files.find(bundle, component) if isinstance(file, engine_files.EngineFile)]
    index = index_of(device)
    if not readable or index is None or not status("tensorrt").ok:
        return None
    here = engine_files.Here.of(library.load().__version__, Cuda(index))
    return next((file for file in readable if preflight.fits(bundle, file, here).ok), None)


def load_engine(
    bundle: str | Path | Bundle, component: str, engine: str = "auto", *, verify: bool = True, **options: Any
) -> Engine:
    """Load one component of a bundle on an engine: tensors in, tensors out; no diffusers needed.

    Args:
        bundle: a bundle or its folder.
        component: text_encoder, unet, vae_decoder, ...
        engine: a name out of `ENGINES`, or "auto".
        verify: compare the component's files with the manifest's digests first.
        options: the engine's own options (device, dtype, provider, threads, ...).

    Raises:
        UserError: for an unknown component or engine, an engine that cannot run here, or changed files.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    if "plan" in options:
        warnings.warn("plan= is now engine_file=", Notice, stacklevel=2)
        options["engine_file"] = options.pop("plan")
    record, device = bundle.component(component), options.get("device", "auto")
    name = choose(engine, record, bundle, device)
    if verify:
        bundle.verify([record.folder])
    try:
        return _load(name, bundle, record, options)
    except NoEngineFile as error:
        if engine != "auto" or "engine_file" in options:
            raise
        name = choose("auto", record, device=device)
        warnings.warn(f"{error.message}; {name} runs it instead", Notice, stacklevel=2)
        return _load(name, bundle, record, options)


def _load(name: str, bundle: Bundle, component: Component, options: Mapping[str, Any]) -> Engine:
    try:
        return _module(name).load(bundle, component, **options)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise UserError(f"the {name} engine has no such option: {error}", "see `accel run --help`") from None
        raise
