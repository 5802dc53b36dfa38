"""OpenVINO: reads the same ONNX graph; on a CPU with bfloat16 or AMX it is usually the fastest engine."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle, Component, kept
from ..bundle.graph_file import graph
from ..dtypes import SHORT, check_dtype
from ..errors import MissingPackage, UserError
from ..files import cache_dir, digest_of, inside, write_bytes
from ..machine import machine_name, version_of
from .base import Engine, Facts, Status, check_threads, noise_for, note_saturation
from .folds import group_norm, in_openvino

KEPT_BYTES = 32 << 30  # of all that is compiled in the cache; the longest unused go first
FOLDS = 2  # to be raised with every change of `folds`, whose results are kept in the cache
_FOLDED = ("Resize", "InstanceNormalization")  # operators of ONNX that a fold begins with
FACTS = Facts(
    dtypes=tuple(SHORT),
    devices={"cpu": {"device": "CPU"}, "gpu": {"device": "GPU"}},
    libraries=("onnx", "openvino"),
    options=("device", "dtype", "threads"),
    formats=("int8", "int8-weight-only", "int4-weight-only"),
    variants=("", "bf16"),
    tunes=("folds",),
)


def status() -> Status:
    if find_spec("openvino") is None:
        return Status(False, "openvino is not installed", 'pip install "accel-diffusion[openvino]"')
    return Status(True, f"openvino {version_of('openvino')}")


def attempt() -> str:
    """A small product on every device that OpenVINO lists."""
    import openvino

    from ..providers.gpu import PRODUCT

    core = openvino.Core()
    model = core.read_model(PRODUCT)
    for device in core.available_devices:
        core.compile_model(model, device)({"x": np.ones((2, 2), np.float32)})
    return ", ".join(core.available_devices)


class OpenVino(Engine):
    """The component's ONNX graph on OpenVINO.

    Args:
        device: an OpenVINO device: "CPU", "GPU", ...
        dtype: dtype to compute in: "auto" (float32: never less accurate than the bundle without being asked), "fp32",
            "bf16" or "fp16" where the device can. Inputs and outputs keep the dtypes of the manifest.
        threads: CPU threads; 0 lets OpenVINO choose.
        folds: exact algebra that is faster here: upsampling with its convolution, and group normalization (`folds`).
        cache: keep what was compiled in accel's cache, for the next load; that takes the weights once more for a while.
        weights: as `set_weights` takes them.
    """

    name = "openvino"

    def __init__(
        self,
        bundle: Bundle,
        component: Component,
        *,
        device: str = "CPU",
        dtype: str = "auto",
        threads: int = 0,
        folds: bool = True,
        cache: bool = True,
        weights: Mapping[str, np.ndarray] | None = None,
    ):
        super().__init__(bundle, component)
        check_threads(threads)
        try:
            import openvino
        except ImportError:
            raise MissingPackage("openvino", "the openvino engine", "openvino") from None
        core, requested, device = openvino.Core(), device, device.upper()  # torch's "cpu" is meant as well
        if device.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
            raise UserError(f"OpenVINO sees no device {requested!r}", f"one of: {', '.join(core.available_devices)}")
        check_dtype(dtype, ("auto", *FACTS.dtypes))
        dtype = "fp32" if dtype == "auto" else dtype
        able = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        if dtype != "fp32" and dtype.upper() not in able:
            raise UserError(f"OpenVINO's {device} has no {dtype} here (it has {', '.join(able)})", "--precision fp32")
        if component.format == "int8" and device.startswith("CPU"):
            note_saturation()
        config = {"INFERENCE_PRECISION_HINT": dtype.replace("fp", "f"), "PERFORMANCE_HINT": "LATENCY"}
        if cache:
            config |= _cached(bundle, component)
        if threads:
            config["INFERENCE_NUM_THREADS"] = str(threads)
        if component.format.endswith("weight-only"):  # by itself OpenVINO rounds the inputs of such weights to int8
            config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        self._compile = partial(self._compiled, bundle, device, config, folds and device.startswith("CPU"))
        self.turn = threading.Lock()
        self.place = device.split(".")[0].lower()
        self.set_weights(weights or {})
        precision = f"{component.format} + {dtype}" if component.int8 else dtype
        self.description = f"openvino {openvino.__version__.split('-')[0]}, {device}, {precision}"
        if dtype != "fp32":
            self._try_out(dtype)

    def _compiled(
        self, bundle: Bundle, device: str, config: Mapping[str, str], folds: bool, tensors: Mapping[str, Any]
    ) -> Any:
        """The compiled graph, with these tensors instead of its own constants."""
        import openvino

        core, file = openvino.Core(), str(bundle.file(self.component.graph))
        foreign = file.endswith(".xml")  # IR of another exporter, which has neither our names nor our folds
        if foreign and tensors:
            fix = "export the model with accel, or leave the LoRA and the embeddings out"
            raise UserError(f"{bundle.name} is OpenVINO IR, whose weights cannot be replaced", fix)
        try:
            if foreign:
                return core.compile_model(file, device, config)
            proto = graph(bundle, self.component)
            folds = folds and any(node.op_type in _FOLDED for node in proto.graph.node)
            if not tensors and not folds:
                return core.compile_model(file, device, config)
            # OpenVINO's own cache would read all weights of a changed graph to know it again; they are in our key.
            cache = config.get("CACHE_DIR")
            config = {key: value for key, value in config.items() if key != "CACHE_DIR"}
            blob = _blob(Path(cache), device, config) if cache and not tensors else None
            if blob and (found := _imported(core, blob, device, config)):
                return found
            model = core.read_model(file)
            nodes = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
            for name in {tensor.name for tensor in proto.graph.initializer} & tensors.keys():
                value = np.require(tensors[name], requirements="CA")
                nodes[name].output(0).replace(openvino.opset13.constant(value).output(0))
            if folds:
                if self.component.format in ("", "int8"):  # it rounds filters anew: a loss where inputs are exact
                    in_openvino.fold(model)
                group_norm.fold(model)
            compiled = core.compile_model(model, device, config)
            if blob:
                with contextlib.suppress(OSError):
                    write_bytes(blob, compiled.export_model().getbuffer())
            return compiled
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"OpenVINO cannot load {self.component.graph}: {str(error).splitlines()[-1][:300]}",
                "export the model again, or try another engine",
            ) from None

    def set_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        model = self._compile(tensors)
        self.epoch += 1
        with self.turn:
            # One request, taken in turns: more would take memory for activations, and a call uses all cores anyway.
            self.model, self.request = model, model.create_infer_request()

    def _try_out(self, dtype: str) -> None:
        """One call on noise, because a low precision that yields NaN must not get as far as an image.

        OpenVINO 2026.4's bfloat16 kernels for AMX make nothing but NaN of the SD-Tiny UNet at real size, while those
        for AVX-512 are right (and so is torch on AMX).
        """
        feeds = noise_for(self.component, {name: limits.min for name, limits in self.component.dims.items()})
        broken = [name for name, value in self.run(feeds).items() if not np.isfinite(value).all()]
        if broken:
            raise UserError(
                f"OpenVINO in {dtype} makes {broken[0]} of {self.component.name} NaN or infinite on this machine",
                "--precision fp32, or run with ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment",
            )

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        with self.turn:
            results = self.request.infer(dict(feeds), share_inputs=True)
            # The request reuses its output memory on the next call, so the caller gets a copy.
            return {spec.name: np.array(results[spec.name]) for spec in self.component.outputs}

    @property
    def runs_on(self) -> str:
        return self.place

    def release(self) -> None:
        del self.request, self.model


def _cached(bundle: Bundle, component: Component) -> dict[str, str]:
    """OpenVINO's option for its cache; none without a place or room for it, where every load compiles."""
    folder = inside(cache_dir(), f"openvino/{bundle.digest[:32]}/{component.name}", "the cache folder")
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # it is used: others go first
        if not any(folder.iterdir()):
            others = [path for path in folder.parents[1].glob("*/*") if path.is_dir() and path != folder]
            size = bundle.file(component.weights).stat().st_size if component.weights else 0
            if not kept.has_room(folder, size, KEPT_BYTES, others):
                return {}
        return {"CACHE_DIR": str(folder)} if os.access(folder, os.W_OK) else {}
    return {}


def _blob(cache: Path, device: str, config: Mapping[str, str]) -> Path:
    """Where a bundle's folded graph is kept, compiled: in the folder of its digest, by all else that decides it."""
    known = {"openvino": version_of("openvino"), "cpu": machine_name(), "device": device, "folds": FOLDS, **config}
    return cache / f"folded-{digest_of(known)[:32]}.blob"


def _imported(core: Any, blob: Path, device: str, config: Mapping[str, str]) -> Any:
    """What was compiled before, or None where there is nothing that can be read."""
    import openvino

    if not blob.is_file():
        return None
    with contextlib.suppress(Exception):  # of OpenVINO; it is compiled anew
        return core.import_model(openvino.Tensor(np.memmap(blob, np.uint8, "r")), device, dict(config))


def load(bundle: Bundle, component: Component, **options: Any) -> OpenVino:
    return OpenVino(bundle, component, **options)
