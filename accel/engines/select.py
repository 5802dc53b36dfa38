"""The table of engines: which can run here, which one `auto` takes, and loading a component on it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..bundle import Bundle, Component, foreign, tuned
from ..bundle.replaced import steadily
from ..errors import Notice, UserError, unknown
from ..int8.formats import FORMATS, FP8
from ..machine import machine_name
from ..providers.route import usable_cuda
from ..trt.preflight import NoEngineFile
from .base import Engine, Facts, Status

if TYPE_CHECKING:
    from ..trt.engine_files import EngineFile, Place

# Fastest first: the order in which `auto` asks.
ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "tensorrt": "accel.engines.tensorrt",
        "tensorrt-rtx": "accel.engines.tensorrt_rtx",
        "openvino": "accel.engines.openvino",
        "onnxruntime": "accel.engines.onnxruntime",
        "aoti": "accel.engines.aoti",
        "compile": "accel.engines.compile",
        "eager": "accel.engines.eager",
    }
)


_ON_THE_COMMAND_LINE = {"dtype": " (--precision)"}


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


def computing_in(form: str) -> tuple[str, ...]:
    """Engines that run a number format (`accel.int8.formats`) as what it is: products in it, or weights kept in it."""
    return tuple(name for name in reversed(tuple(ENGINES)) if form in facts(name).formats)


def engine_file_engines() -> tuple[str, ...]:
    """Engines that run engine files."""
    return tuple(name for name in ENGINES if facts(name).engine_files)


def _by_engine_file() -> set[str]:
    """Engines that `auto` takes where the bundle has an engine file that fits."""
    return {name for name in engine_file_engines() if "engine file" in facts(name).auto}


def place(name: str, device: str = "auto") -> Place | None:
    """Where engine files of an engine would run; None where the device is not one of the engine's.

    Raises:
        UserError: when the library or the device is missing.
    """
    return _module(name).here(device)


def _module(name: str) -> Any:
    if name not in ENGINES:
        raise unknown("engine", name, ["auto", *reversed(tuple(ENGINES))])
    return import_module(ENGINES[name])


def choose(
    name: str = "auto",
    component: Component | None = None,
    bundle: Bundle | None = None,
    device: str = "auto",
    options: Iterable[str] = (),
) -> str:
    """The engine to use: an explicit choice as it is, or an error; `auto` the best that can run here.

    `auto` takes TensorRT (or TensorRT-RTX) where the bundle has an engine file of the component that fits, then what
    `accel tune` found fastest here where no option is asked for, then a GPU that ONNX Runtime can drive, then the first
    of `ENGINES` that declares the device in its facts and takes the
    options. For an int8 component it goes by what the export measured. It never refuses because of speed or quality:
    where something else would be faster or closer to float32, a note says so. A diffusers pipeline folder runs on
    eager.

    Args:
        device: where the component is to run: "auto", "cpu", "cuda:1", ...
        options: names of the options that the engine has to take, of those that engines declare.

    Raises:
        UserError: when the named engine cannot run here or not this component, or none can, with the fix.
    """
    needs_eager = component is not None and not component.graph
    if name != "auto":
        state = status(name)
        if not state.ok:
            raise UserError(f"the {name} engine cannot run here: {state.detail}", state.fix)
        if needs_eager and facts(name).reads_graph:
            folder = "PIPELINE" if bundle is None else bundle.manifest.source["name"]
            raise UserError(
                f"the {name} engine runs ONNX graphs, and {folder} is a diffusers pipeline, which has none",
                f"accel export {folder} {Path(folder).name}-bundle, and load that; or engine eager",
            )
        if reason := refused_by(bundle, name):
            raise UserError(reason, f"engine {' or '.join(_of_others(bundle))}, or export the model with accel")
        return name
    wanted = set(options) & {option for engine in ENGINES for option in facts(engine).options}
    fits = [engine for engine in ENGINES if wanted <= set(facts(engine).options)] or list(ENGINES)
    if needs_eager:
        fits = [engine for engine in fits if not facts(engine).reads_graph] or ["eager"]
    if others := _of_others(bundle):
        fits = [engine for engine in fits if engine in others] or others
    engine_file = (
        fitting_engine_file(bundle, component.name, device, _by_engine_file() & set(fits))
        if bundle is not None and component is not None and _by_engine_file() & set(fits)
        else None
    )
    if engine_file is None and not wanted and (found := _tuned(bundle, component)):
        return found.engine
    if component is not None and component.int8:
        return _choose_quantized(component, engine_file, fits)
    if engine_file is not None:
        return engine_file.engine
    if device != "cpu" and "onnxruntime" in fits and status("onnxruntime").ok and usable_cuda():
        return "onnxruntime"
    place = "cuda" if device.startswith("cuda") else "cpu"
    for candidate in fits:
        if place in facts(candidate).auto and status(candidate).ok:
            return candidate
    raise UserError("no engine can run here", 'pip install "accel-diffusion[cpu]"')


def _of_others(bundle: Bundle | None) -> list[str]:
    """The engines that run a folder which another exporter wrote; empty for a bundle, which all of them run."""
    kind = "" if bundle is None else str(bundle.manifest.source.get("foreign", ""))
    if kind not in foreign.KINDS:
        return []
    return [name for name in ENGINES if facts(name).reads_graph and name in (foreign.KINDS[kind].engines or ENGINES)]


def refused_by(bundle: Bundle | None, engine: str) -> str:
    """Why an engine does not run what another exporter wrote; empty where it does, or it is a bundle."""
    if bundle is None or not (able := _of_others(bundle)) or engine in able:
        return ""
    kind = foreign.KINDS[bundle.manifest.source["foreign"]].title
    return f"the {engine} engine does not run {kind}, which {bundle.manifest.source['name']} is"


def _tuned(bundle: Bundle | None, component: Component | None) -> tuned.Choice | None:
    """What `accel tune` found fastest here for a component, if that can still run."""
    if bundle is None or component is None:
        return None
    found = tuned.read(bundle).get(component.name)
    return found if found and found.engine in ENGINES and status(found.engine).ok else None


def _choose_quantized(component: Component, engine_file: EngineFile | None, fits: Sequence[str]) -> str:
    """By what was measured on this processor, and on the GPU that the engine file, if there is one, was built for.

    Args:
        fits: the engines that may be chosen.
    """
    name, acceptance = f"{component.format} of {component.name}", component.int8.get("acceptance", {})
    parity, against = acceptance.get("parity", {}), acceptance.get("against", "float32")
    if parity.get("ok") is False:
        _note(
            f"{name} is outside its parity budget ({parity.get('psnr', float('nan')):.1f} dB against float32, "
            f"{parity.get('budget', float('nan')):g} dB required): images differ. Exported with --precision auto, or "
            "with --budget, they do not"
        )
    places: dict[str, Any] = {engine: machine_name() for engine in computing_in(component.format)}
    places |= dict.fromkeys(_by_engine_file())
    able = [engine for engine in fits if places.get(engine) and status(engine).ok]
    if engine_file is not None:
        places[engine_file.engine] = engine_file.identity["gpu"]
        able.append(engine_file.engine)
    seconds = {
        engine: entry["int8_seconds"]
        for engine, entry in acceptance.get("engines", {}).items()
        if engine in places and entry.get("on", acceptance.get("machine")) == places[engine]
    }
    enabled = {engine for engine in seconds if engine in acceptance.get("enabled_engines", ())}
    here = {engine: seconds[engine] for engine in able if engine in seconds}
    if not able:
        return _choose_rounding(component, fits)
    if engine_file is not None and engine_file.engine not in seconds:
        chosen = engine_file.engine
    elif here:
        chosen = min(enabled & set(here) or here, key=here.__getitem__)
    else:
        chosen = able[0]
    missing = enabled - set(able)
    if missing and chosen not in enabled:
        others = " and ".join(sorted(missing))
        _note(f"{component.format} is fastest on {others}, which cannot run here (accel doctor)")
    elif chosen not in seconds:  # in the same words for every network, so that it is said once
        _note(f"whether {component.format} is faster on {chosen} was not measured on this machine: `accel bench` does")
    elif chosen not in enabled:
        ratio = acceptance["engines"][chosen].get("speedup", 0)
        _note(
            f"{name} is not faster than {against} on this machine ({chosen} {ratio:.2f}x): a bundle exported "
            "with --precision auto, or fp32, would be"
        )
    return chosen


def _choose_rounding(component: Component, fits: Sequence[str]) -> str:
    """An engine that rounds as the component does and multiplies in float, where none that computes in it can run."""
    form = FORMATS[component.format]
    fix = 'pip install "accel-diffusion[cpu]"'
    if form.capability:
        fix = f"accel build makes engine files for GPUs of compute capability {form.capability / 10} and newer"
    # ONNX Runtime rounds to the last bit as torch does; OpenVINO's fp8 differs.
    able = [name for name in ("onnxruntime", "eager") if name in fits and status(name).ok] if form is FP8 else []
    chosen = able[0] if able else choose("eager")
    _note(
        f"no engine that computes {form.name} of {component.name} can run here, so {chosen} rounds it and multiplies "
        f"in float, slowly: {fix}"
    )
    return chosen


def _note(text: str) -> None:
    warnings.warn(text, Notice, stacklevel=5)


def fitting_engine_file(
    bundle: Bundle, component: str, device: str = "auto", engines: Iterable[str] | None = None, dtype: str = ""
) -> EngineFile | None:
    """The newest engine file of a component that fits here, but for its contents, which loading compares.

    Costs nothing where there are no engine files, or the device is not one of theirs.

    Args:
        engines: those that may run it; by default all that run engine files.
        dtype: what its files compute in instead of the bundle's own: "bf16" of aoti's.
    """
    from ..trt import engine_files, preflight

    readable = [file for file in engine_files.find(bundle, component) if isinstance(file, engine_files.EngineFile)]
    able = {file.engine for file in readable} & set(engine_file_engines() if engines is None else engines)
    places = {name: place(name, device) for name in sorted(able) if status(name).ok}
    readable = [file for file in readable if file.dtype == dtype]
    return next((f for f in readable if (here := places.get(f.engine)) and preflight.fits(bundle, f, here).ok), None)


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
        return steadily(bundle, lambda opened: load_engine(opened, component, engine, verify=verify, **options))
    if "plan" in options:
        warnings.warn("plan= is now engine_file=", Notice, stacklevel=2)
        options["engine_file"] = options.pop("plan")
    record, device = bundle.component(component), options.get("device", "auto")
    # Every engine can be closed after its phase, which is what "model" offload comes to where nothing waits in host
    # memory; so that does not decide which one is taken.
    needed = [option for option in options if option != "offload" or options[option] == "sequential"]
    name = choose(engine, record, bundle, device, needed)
    if "offload" not in needed and "offload" not in facts(name).options:
        options.pop("offload", None)
    if engine == "auto" and not options and (found := _tuned(bundle, record)) and found.engine == name:
        options = dict(found.options)
    if verify:
        bundle.verify([record.folder], name)
    try:
        return _load(name, bundle, record, options)
    except NoEngineFile as error:
        if engine != "auto" or "engine_file" in options:
            raise
        name = choose("auto", record, device=device, options=options)
        warnings.warn(f"{error.message}; {name} runs it instead", Notice, stacklevel=2)
        return _load(name, bundle, record, options)


def _load(name: str, bundle: Bundle, component: Component, options: Mapping[str, Any]) -> Engine:
    try:
        return _module(name).load(bundle, component, **options)
    except TypeError as error:
        option = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if option is None:
            raise
        takers = [engine for engine in ENGINES if option[1] in facts(engine).options]
        own = ", ".join(facts(name).options)
        fix = f"leave it out, or choose {' or '.join(takers)}" if takers else f"leave it out; it takes: {own}"
        raise UserError(
            f"the {name} engine has no option {option[1]!r}{_ON_THE_COMMAND_LINE.get(option[1], '')}", fix
        ) from None
