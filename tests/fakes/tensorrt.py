"""A fake `tensorrt` or `tensorrt_rtx` module (test double), made from the published API of one version; it runs engines
on the CPU.

What the API file does not name does not exist here: a removed flag, a misspelt keyword, an attribute that only one
version has raise. Calls are checked against the signatures as the bindings print them. An engine file is the ONNX model
with the builder's config and a digest; running it is ONNX Runtime on the memory behind the addresses. So parity,
profiles, scratch memory, CUDA graphs and refit are tested for real; speed and TensorRT's own opinions are not.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import inspect
import json
import os
import re
import struct
import threading
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

API = Path(__file__).parent / "tensorrt_api"
VERSIONS = {path.stem: path for path in sorted(API.glob("*.json"))}
MAGIC = b"engine file of the fake"
SCRATCH_ALIGNMENT = 256

# ONNX's names of datatypes, where TensorRT has others.
_RENAMED = {"FLOAT16": "HALF", "BFLOAT16": "BF16"}
_PRECISION_FLAGS = set("FP16 INT8 BF16 FP8 INT4 FP4 OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS".split())


@dataclass
class World:
    """What a test may arrange, and what it may look at afterwards.

    Attributes:
        version, gpu: what the engine files are made for.
        cuda: the fake CUDA; asked whether a stream is being captured.
        fail: operators the parser refuses, or "config", "build", "deserialize", "context", "execute" or "refit" to let
            fail.
        steps: progress steps of a build.
        on_step: called with the number of each step.
        calls: names of the API calls, in order.
        dtype: datatype that is reported for all layers, instead of the graph's.
        warn: warnings of every build that succeeds.
        capability: of the card, as TensorRT-RTX sees it.
    """

    version: str
    gpu: str = "Fake GPU"
    cuda: Any = None
    fail: set[str] = field(default_factory=set)
    steps: int = 3
    on_step: Any = None
    calls: list[str] = field(default_factory=list)
    dtype: str | None = None
    warn: list[str] = field(default_factory=list)
    capability: str = "SM89"
    executed: list[tuple] = field(default_factory=list)


class _Behaviour:
    """Base of what the generated classes do. Own state has names with an underscore."""

    _world: World
    _trt: ModuleType

    def _log(self, severity: str, text: str) -> None:
        self._logger.log(getattr(self._trt.ILogger.Severity, severity), text)


class ILogger(_Behaviour):
    def __init__(self):
        self._ready = True

    def log(self, severity, msg):
        raise TypeError("log is for subclasses to define")


class IProgressMonitor(_Behaviour):
    def __init__(self):
        self._ready = True

    def phase_start(self, phase_name, parent_phase, num_steps):
        raise TypeError("phase_start is for subclasses to define")

    phase_finish = step_complete = phase_start


class Weights(_Behaviour):
    def __init__(self, a):
        self._array = np.ascontiguousarray(a)


class IHostMemory(_Behaviour):
    def __init__(self, data):
        self._data = data

    def __bytes__(self):
        return self._data


class INetworkDefinition(_Behaviour):
    def __init__(self, flags):
        self._flags, self._model, self._decomposable = flags, None, set()

    num_layers = property(lambda self: len(self._model.graph.node))

    def get_layer(self, index):
        node = self._model.graph.node[index]
        return self._trt.ILayer(self, node)


class ILayer(_Behaviour):
    def __init__(self, network, node):
        self._network, self._node = network, node

    name = property(lambda self: self._node.name)

    @property
    def type(self):
        kinds = self._trt.LayerType
        return kinds.ATTENTION_OUTPUT if self._node.op_type == "Attention" else kinds.CONVOLUTION


class IAttentionOutputLayer(ILayer):
    attention = property(lambda self: self._trt.IAttention(self))


class IAttention(_Behaviour):
    def __init__(self, layer):
        self._layer = layer

    @property
    def decomposable(self):
        return self._layer._node.name in self._layer._network._decomposable

    @decomposable.setter
    def decomposable(self, value):
        change = self._layer._network._decomposable
        (change.add if value else change.discard)(self._layer._node.name)


def _shape(value) -> tuple[int, ...]:
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


def _admits(shape, given) -> bool:
    return len(given) == len(shape) and all(d in (-1, x) for d, x in zip(shape, given, strict=True))


def _dtype(kind: int) -> str:
    """TensorRT's name of a datatype of ONNX."""
    name = TensorProto.DataType.Name(kind)
    return _RENAMED.get(name, name)


def _numpy(value) -> np.dtype:
    return helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


class ParserError(_Behaviour):
    def __init__(self, text, node):
        self._text, self._node = text, node

    def code(self):
        return self._trt.ErrorCode.UNSUPPORTED_NODE

    def func(self):
        return "parseNode"

    def desc(self):
        return self._text

    def node_name(self):
        return self._node.name if self._node is not None else ""

    def node_operator(self):
        return self._node.op_type if self._node is not None else ""


class OnnxParser(_Behaviour):
    def __init__(self, network, logger):
        assert isinstance(network, self._trt.INetworkDefinition) and isinstance(logger, self._trt.ILogger)
        self._network, self._logger, self._errors = network, logger, []

    def parse_from_file(self, model):
        self._world.calls.append("parse")
        try:
            loaded = onnx.load(model)
        except Exception as error:
            self._errors.append(self._trt.ParserError(f"could not open or parse {model}: {error}", None))
            return False
        return self._taken(loaded)

    def parse(self, model, path=None):
        self._world.calls.append("parse")
        loaded = onnx.load_from_string(bytes(model))
        onnx.external_data_helper.load_external_data_for_model(loaded, os.path.dirname(path or ""))
        return self._taken(loaded)

    def _taken(self, loaded):
        for node in loaded.graph.node:
            if node.op_type in self._world.fail:
                self._errors.append(self._trt.ParserError(f"No importer registered for op: {node.op_type}", node))
        if self._errors:
            return False
        self._network._model = loaded
        return True

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]


class IOptimizationProfile(_Behaviour):
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        shapes = [tuple(map(int, s)) for s in (min, opt, max)]
        if not all(a <= b <= c for a, b, c in zip(*shapes, strict=True)):
            raise ValueError(f"profile of {input} is not ordered: {shapes}")
        self._shapes[input] = shapes


class ITimingCache(_Behaviour):
    def __init__(self, entries, stamp):
        self._entries, self._stamp = entries, stamp

    def combine(self, input_cache, ignore_mismatch):
        if input_cache._stamp != self._stamp and not ignore_mismatch:
            return False
        self._entries |= input_cache._entries
        return True

    def serialize(self):
        return self._trt.IHostMemory(json.dumps([self._stamp, sorted(self._entries)]).encode())


class IBuilderConfig(_Behaviour):
    def __init__(self, logger=None):
        self._logger = logger
        self._flags, self._limits, self._profiles, self._cache, self._targets = set(), {}, [], None, []
        self._settings = {
            "builder_optimization_level": 3,
            "profiling_verbosity": self._trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
            "hardware_compatibility_level": self._trt.HardwareCompatibilityLevel.NONE,
            "progress_monitor": None,
        }

    def set_flag(self, flag):
        self._flags.add(flag.name)

    def clear_flag(self, flag):
        self._flags.discard(flag.name)

    def set_memory_pool_limit(self, pool, pool_size):
        if "config" in self._world.fail:  # setters log, and raise nothing
            self._log("ERROR", "Error Code 3: API Usage Error (Parameter check failed, condition: poolSize is valid)")
        self._limits[pool.name] = int(pool_size)

    def add_optimization_profile(self, profile):
        self._world.calls.append("profile")
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        stamp = [self._world.version, self._world.gpu]
        if not serialized_timing_cache:
            return self._trt.ITimingCache(set(), stamp)
        try:
            stamp, entries = json.loads(bytes(serialized_timing_cache))
        except ValueError:  # as the real library: it warns, and gives an empty cache that is taken like any other
            self._log("WARNING", "Failed to deserialize timing cache. Returning an empty timing cache.")
            return self._trt.ITimingCache(set(), stamp)
        return self._trt.ITimingCache(set(entries), stamp)

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache._stamp != [self._world.version, self._world.gpu] and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache

    @property
    def num_compute_capabilities(self):
        return len(self._targets)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, value):
        self._targets = [None] * value

    def set_compute_capability(self, compute_capability, index):
        if index >= len(self._targets):
            self._log("ERROR", "index is out of range")
            return False
        self._targets[index] = compute_capability.name
        return True


def _setting(name):
    def write(self, value):
        old = self._settings[name]
        if old is not None and not isinstance(value, type(old)):
            raise TypeError(f"{name} = {value!r}")
        self._settings[name] = value

    return property(lambda self: self._settings[name], write)


for _name in ("builder_optimization_level", "profiling_verbosity", "hardware_compatibility_level", "progress_monitor"):
    setattr(IBuilderConfig, _name, _setting(_name))


class Builder(_Behaviour):
    def __init__(self, logger):
        assert isinstance(logger, self._trt.ILogger) and logger._ready, "ILogger.__init__ was not called"
        self._logger = logger
        self._world.calls.append("Builder")

    def create_network(self, flags=0):
        self._world.calls.append("network")
        return self._trt.INetworkDefinition(flags)

    def create_builder_config(self):
        self._world.calls.append("config")
        return self._trt.IBuilderConfig(self._logger)

    def create_optimization_profile(self):
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network, config):
        self._world.calls.append("build")
        problem = self._problem(network, config)
        if problem:
            self._log("ERROR", problem)
            return None
        if not self._progress(config._settings["progress_monitor"]):
            self._log("WARNING", "IBuilder::buildSerializedNetwork: canceled by the progress monitor")
            return None
        if "build" in self._world.fail:
            self._log("WARNING", "some tactics do not have sufficient workspace memory to run")
            self._log("ERROR", "Error Code 10: Internal Error (Could not find any implementation for node /conv_in)")
            return None
        for text in self._world.warn:
            self._log("WARNING", text)
        if config._cache is not None:
            config._cache._entries |= {node.op_type for node in network._model.graph.node}
        if hasattr(self._trt, "ComputeCapability") and config._settings["profiling_verbosity"].name == "DETAILED":
            self._log("INFO", "Total Activation Memory: 4096 bytes")
            self._log("VERBOSE", listing(layers_of(network._model, self._world.dtype)))
        return self._trt.IHostMemory(_engine_file(self._world, network, config))

    def _problem(self, network, config) -> str:
        strong = 1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        if not int(network._flags) & strong:
            return "the fake builds strongly typed networks only"
        if config._flags & _PRECISION_FLAGS:
            return "Error Code 3: precision flags are not allowed in a strongly typed network"
        if network._model is None:
            return "Error Code 4: network has no layers"
        dynamic = {v.name: _shape(v) for v in network._model.graph.input if -1 in _shape(v)}
        if dynamic and not config._profiles:
            return "Error Code 4: network has dynamic inputs but no optimization profile"
        for node in network._model.graph.node:
            if node.op_type == "Attention" and node.name not in network._decomposable:
                return (
                    "MyelinCheckException: CHECK(composite_op->is_decomposable()) failed. Attention operation was not "
                    "supported by a dedicated kernel"
                )
        for profile in config._profiles:
            for name, shape in dynamic.items():
                given = profile._shapes.get(name)
                if given is None:
                    return f"Error Code 4: input {name} has no shape in a profile"
                if any(not _admits(shape, g) for g in given):
                    return f"Error Code 4: static dimension mismatch in profile of {name}"
        return ""

    def _progress(self, monitor) -> bool:
        """Phases within phases, as TensorRT reports them; from a thread of its own, as it may."""
        if monitor is None:
            return True
        assert monitor._ready, "IProgressMonitor.__init__ was not called"
        going = []

        def report():
            monitor.phase_start("Building Engine", None, 2)
            monitor.phase_start("Tactic Selection", "Building Engine", self._world.steps)
            keep = True
            for step in range(self._world.steps):
                if self._world.on_step:
                    self._world.on_step(step)
                keep = monitor.step_complete("Tactic Selection", step)
                if not keep:
                    break
            monitor.phase_finish("Tactic Selection")
            keep = keep and monitor.step_complete("Building Engine", 0)
            monitor.phase_finish("Building Engine")
            going.append(keep)

        thread = threading.Thread(target=report)
        thread.start()
        thread.join()
        return bool(going and going[0])


def _engine_file(world: World, network, config) -> bytes:
    model = network._model
    header = {
        "version": world.version,
        "gpu": "" if config._targets or world.version.startswith("1.") else world.gpu,
        "flags": sorted(config._flags),
        "hardware": config._settings["hardware_compatibility_level"].name,
        "verbosity": config._settings["profiling_verbosity"].name,
        "profiles": [p._shapes for p in config._profiles],
        "streamable": "WEIGHT_STREAMING" in config._flags,
        "stripped": "STRIP_PLAN" in config._flags,
        "limits": config._limits,
        "targets": config._targets,
        "reported": world.dtype,
    }
    if header["stripped"]:
        for tensor in model.graph.initializer:
            if _refittable(tensor):
                tensor.raw_data = b"\0" * len(tensor.raw_data)
    head = json.dumps(header).encode()
    body = struct.pack("<Q", len(head)) + head + model.SerializeToString()
    return MAGIC + hashlib.sha256(body).digest() + body


def _refittable(tensor) -> bool:
    return tensor.data_type in (1, 10) and len(tensor.dims) > 0 and len(tensor.raw_data) > 0


class Runtime(_Behaviour):
    def __init__(self, logger):
        assert isinstance(logger, self._trt.ILogger)
        self._logger, self._host_code = logger, False

    @property
    def engine_host_code_allowed(self):
        return self._host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value):
        self._host_code = value

    def get_engine_validity(self, buffer):
        """As documented: a verdict, and a mask of what is wrong."""
        trt, wrong = self._trt, self._trt.EngineInvalidityDiagnostics
        data = bytes(buffer)
        body = data[len(MAGIC) + 32 :]
        if not data.startswith(MAGIC):
            return trt.EngineValidity.INVALID, wrong.MALFORMED_ENGINE.value
        (length,) = struct.unpack("<Q", body[:8])
        header = json.loads(body[8 : 8 + length])
        mask = wrong.VERSION_MISMATCH.value * (header["version"] != self._world.version)
        mask |= wrong.UNSUPPORTED_CC.value * bool(header["targets"] and self._world.capability not in header["targets"])
        return (trt.EngineValidity.INVALID if mask else trt.EngineValidity.VALID), mask

    def deserialize_cuda_engine(self, serialized_engine):
        self._world.calls.append("deserialize")
        data = bytes(serialized_engine)
        body = data[len(MAGIC) + 32 :]
        sound = data.startswith(MAGIC) and hashlib.sha256(body).digest() == data[len(MAGIC) : len(MAGIC) + 32]
        if not sound or "deserialize" in self._world.fail:
            self._log("ERROR", "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magic tag)")
            return None
        (length,) = struct.unpack("<Q", body[:8])
        header = json.loads(body[8 : 8 + length])
        lean = "VERSION_COMPATIBLE" in header["flags"]
        if lean and not self._host_code:
            self._log("ERROR", "Error Code 9: API Usage Error (engine_host_code_allowed is false)")
            return None
        major = lambda version: int(version.partition(".")[0])  # noqa: E731
        newer = 0 <= major(self._world.version) - major(header["version"]) <= 1
        if header["version"] != self._world.version and not (lean and newer):
            self._log(
                "ERROR",
                f"Error Code 6: The engine plan file is not compatible with this version of TensorRT, "
                f"expecting library version {header['version']} got {self._world.version}",
            )
            return None
        if header["gpu"] not in ("", self._world.gpu) and header["hardware"] == "NONE":
            self._log("ERROR", "Error Code 6: The engine plan file is generated on an incompatible device")
            return None
        return self._trt.ICudaEngine(header, onnx.load_from_string(body[8 + length :]), self._logger)


_sessions: dict[bytes, Any] = {}


def _session(data: bytes):
    """One session per model, not per engine: making one takes longer than running it."""
    import onnxruntime

    key = hashlib.sha256(data).digest()
    if key not in _sessions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        _sessions[key] = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return _sessions[key]


class ICudaEngine(_Behaviour):
    def __init__(self, header, model, logger):
        self._header, self._model, self._logger, self._session = header, model, logger, None
        self._weights = {t.name: t for t in model.graph.initializer}
        self._filled = not header["stripped"]
        self._budget, self._contexts, self._lock = 0, 0, threading.Lock()

    def _values(self):
        return [*self._model.graph.input, *self._model.graph.output]

    def _value(self, name):
        found = [v for v in self._values() if v.name == name]
        if not found:
            raise RuntimeError(f"no tensor {name}")
        return found[0]

    def _run(self, feeds):
        with self._lock:
            if self._session is None:
                self._session = _session(self._model.SerializeToString())
            session = self._session
        names = [v.name for v in self._model.graph.output]
        return dict(zip(names, session.run(names, feeds), strict=True))

    num_io_tensors = property(lambda self: len(self._values()))
    num_optimization_profiles = property(lambda self: max(1, len(self._header["profiles"])))
    refittable = property(lambda self: bool({"REFIT", "REFIT_IDENTICAL"} & set(self._header["flags"])))

    @property
    def device_memory_size_v2(self):
        return max(self.get_device_memory_size_for_profile_v2(i) for i in range(self.num_optimization_profiles))

    def get_device_memory_size_for_profile_v2(self, profile_index):
        shapes = self._header["profiles"][profile_index] if self._header["profiles"] else {}
        return 4096 + 16 * sum(int(np.prod(s[2])) for s in shapes.values())

    @property
    def weight_streaming_budget_v2(self):
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value):
        assert self._header["streamable"] and self._contexts == 0, "contexts are there already"
        self._budget = value

    def get_weight_streaming_automatic_budget(self):
        return sum(len(t.raw_data) for t in self._model.graph.initializer) // 2  # TensorRT's depends on free memory

    def get_tensor_name(self, index):
        return self._values()[index].name

    def get_tensor_mode(self, name):
        inputs = {v.name for v in self._model.graph.input}
        return self._trt.TensorIOMode.INPUT if name in inputs else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return getattr(self._trt.DataType, _dtype(self._value(name).type.tensor_type.elem_type))

    def get_tensor_profile_shape(self, name, profile_index):
        shape = _shape(self._value(name))
        profiles = self._header["profiles"]
        return [tuple(s) for s in profiles[profile_index][name]] if -1 in shape else [shape] * 3

    def create_execution_context(self, strategy=None):
        if "context" in self._world.fail:
            self._log("ERROR", "Error Code 2: OutOfMemory (Requested size was 1 bytes)")
            return None
        if isinstance(strategy, getattr(self._trt, "IRuntimeConfig", ())):
            config, strategy = strategy, strategy._strategy
            self._world.calls.append(f"context {config._graphs.name} {config._special.name}")
            if config._cache is not None:
                config._cache._kernels.add(len(self._model.graph.node))
        assert strategy is None or isinstance(strategy, self._trt.ExecutionContextAllocationStrategy)
        user = strategy is not None and strategy.name == "USER_MANAGED"
        self._contexts += 1
        return self._trt.IExecutionContext(self, user)

    def create_runtime_config(self):
        return self._trt.IRuntimeConfig()

    def create_engine_inspector(self):
        return self._trt.EngineInspector(self)


class IRuntimeConfig(_Behaviour):
    def __init__(self):
        self._strategy, self._cache, self._graphs, self._special = None, None, None, None
        if hasattr(self._trt, "CudaGraphStrategy"):
            self._graphs = self._trt.CudaGraphStrategy.DISABLED
            self._special = self._trt.DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy):
        self._strategy = strategy

    def create_runtime_cache(self):
        return self._trt.IRuntimeCache()

    def set_runtime_cache(self, cache):
        self._cache = cache
        return True

    @property
    def cuda_graph_strategy(self):
        return self._graphs

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, value):
        assert isinstance(value, self._trt.CudaGraphStrategy)
        self._graphs = value

    @property
    def dynamic_shapes_kernel_specialization_strategy(self):
        return self._special

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(self, value):
        assert isinstance(value, self._trt.DynamicShapesKernelSpecializationStrategy)
        self._special = value


class IRuntimeCache(_Behaviour):
    def __init__(self):
        self._kernels = set()

    def serialize(self):
        return self._trt.IHostMemory(json.dumps(sorted(self._kernels)).encode())

    def deserialize(self, blob):
        self._world.calls.append("runtime cache")
        self._kernels |= set(json.loads(bytes(blob)))
        return True


class IExecutionContext(_Behaviour):
    def __init__(self, engine, user_managed):
        self._engine, self._user, self._thread = engine, user_managed, threading.get_ident()
        self._shapes, self._addresses, self._profile, self._memory = {}, {}, 0, None
        self._logger = engine._logger

    def _own_thread(self):
        if threading.get_ident() != self._thread:
            raise AssertionError("an execution context is used from a thread that did not make it")

    active_optimization_profile = property(lambda self: self._profile)

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self._own_thread()
        assert stream_handle, "the default stream"
        if profile_index >= self._engine.num_optimization_profiles:
            return False
        if profile_index != self._profile:
            self._profile, self._shapes = profile_index, {}
        return True

    def set_input_shape(self, name, shape):
        self._own_thread()
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        shape = tuple(map(int, shape))
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self._log("ERROR", f"Error Code 3: {name} {shape} is not within profile {self._profile} {low} {high}")
            return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name, memory):
        self._own_thread()
        self._engine._value(name)
        self._addresses[name] = int(memory)
        return True

    def set_device_memory(self, memory, size):
        self._own_thread()
        assert self._user, "set_device_memory needs USER_MANAGED"
        assert memory % SCRATCH_ALIGNMENT == 0, "scratch memory is not aligned"
        if size < self._engine.get_device_memory_size_for_profile_v2(self._profile):
            raise AssertionError("scratch memory is too small")
        self._memory = (int(memory), int(size))

    def get_tensor_shape(self, name):
        """As TensorRT infers it; found here by a run on zeros."""
        shape = _shape(self._engine._value(name))
        if name in self._shapes or -1 not in shape or self.infer_shapes():
            return self._shapes.get(name, shape)
        inputs = self._engine._model.graph.input
        feeds = {v.name: np.zeros(self._shapes.get(v.name, _shape(v)), _numpy(v)) for v in inputs}
        return self._engine._run(feeds)[name].shape

    def infer_shapes(self):
        dynamic = [v.name for v in self._engine._model.graph.input if -1 in _shape(v)]
        return [name for name in dynamic if name not in self._shapes]

    def execute_async_v3(self, stream_handle):
        self._own_thread()
        self._world.calls.append("execute")
        assert stream_handle, "the default stream"
        if "execute" in self._world.fail:
            self._log("ERROR", "Error Code 1: Cuda Runtime (an illegal memory access was encountered)")
            return False
        names = [v.name for v in self._engine._values()]
        missing = [n for n in names if not self._addresses.get(n)] + self.infer_shapes()
        if missing:
            self._log("ERROR", f"Error Code 3: no address or shape for {missing}")
            return False
        if self._user and self._memory is None:
            self._log("ERROR", "Error Code 3: no device memory")
            return False
        if not self._engine._filled:
            self._log("ERROR", "Error Code 9: the engine was stripped of its weights and has not been refitted")
            return False
        work = self._work(dict(self._addresses), dict(self._shapes), self._memory)
        capture = self._world.cuda.capturing(stream_handle) if self._world.cuda else None
        if capture is not None:
            capture.append(work)
        else:
            work()
        return True

    def _work(self, addresses, shapes, memory):
        engine, world = self._engine, self._world

        def run():
            if memory:  # real kernels write there: whoever keeps data in it finds out
                ctypes.memset(memory[0], 0x7F, engine.get_device_memory_size_for_profile_v2(self._profile))
            feeds = {}
            for value in engine._model.graph.input:
                dtype = _numpy(value)
                shape = shapes.get(value.name, _shape(value))
                count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                feeds[value.name] = np.frombuffer(ctypes.string_at(addresses[value.name], count), dtype).reshape(shape)
            for name, array in engine._run(feeds).items():
                array = np.ascontiguousarray(array)
                ctypes.memmove(addresses[name], array.ctypes.data, array.nbytes)
            world.executed.append((memory, dict(shapes)))

        return run


class EngineInspector(_Behaviour):
    def __init__(self, engine):
        self._engine, self._context = engine, None

    @property
    def execution_context(self):
        return self._context

    @execution_context.setter
    def execution_context(self, value):
        assert isinstance(value, self._trt.IExecutionContext) and not value.infer_shapes()
        self._context = value

    def get_engine_information(self, format):
        assert format.name == "JSON"
        engine = self._engine
        dynamic = -1 in [d for v in engine._model.graph.input for d in _shape(v)]
        known = self._context is not None or not dynamic
        layers = layers_of(
            engine._model, engine._header["reported"] or (None if known else "N/A due to dynamic shapes")
        )
        if engine._header["verbosity"] != "DETAILED":
            layers = [layer["Name"] for layer in layers]
        return json.dumps({"Layers": layers, "Bindings": [v.name for v in engine._values()]})


def layers_of(model, reported: str | None) -> list[dict]:
    """The layers of an engine of a graph: a node each, as TensorRT's inspector tells them.

    Args:
        reported: datatype of every layer, instead of the graph's.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: _dtype(v.type.tensor_type.elem_type) for v in [*graph.value_info, *graph.input, *graph.output]}
    types |= {t.name: _dtype(t.data_type) for t in graph.initializer}
    spelt = {"FLOAT": "Float", "HALF": "Half", "INT8": "Int8", "BF16": "BFloat16"}
    kinds = {"Conv": "CaskConvolution", "Gemm": "gemm", "MatMul": "gemm", "Attention": "fmha"}
    # A product of two dequantised tensors is one integer kernel with them.
    dequantized = {n for node in graph.node if node.op_type == "DequantizeLinear" for n in node.output}
    layers = []
    for node in graph.node:
        dtype = spelt.get(types.get(node.input[0] if node.input else "", ""), "Int64")
        if node.op_type in kinds and dequantized.issuperset(node.input[:2]):
            dtype = "Int8"
        dtype = reported or dtype
        tensor = lambda name, dtype=dtype: {"Name": name, "Dimensions": [], "Format/Datatype": dtype}  # noqa: E731
        layers.append(
            {
                "Name": node.name or node.output[0],
                "LayerType": kinds.get(node.op_type, "kgen"),
                "Inputs": [tensor(n) for n in node.input],
                "Outputs": [tensor(n) for n in node.output],
                "TacticName": "",
                "Metadata": f"[ONNX Layer: {node.name}]",
            }
        )
    return layers


def listing(layers: list[dict]) -> str:
    """The same as the lines of the builder's log, as TensorRT-RTX prints them."""

    def tensors(found: list[dict]) -> str:
        told = "Dimensions: [-1,4], Strides: [4,1], StrideOrder: [1,0], Datatype: {}, Format: (Linear) Row major linear"
        return ", ".join(f"{{ Name: {t['Name']}, {told.format(t['Format/Datatype'])} format }}" for t in found)

    lines = [
        f"Name: {layer['Name']}_myl0_{i}, LayerType: {layer['LayerType'].replace('CaskConvolution', 'correlation')}, "
        f"Inputs: [ {tensors(layer['Inputs'])}], Constants: [], Outputs: [ {tensors(layer['Outputs'])}], TacticName: , "
        f"StreamId: 0, Metadata: {layer['Metadata']}"
        for i, layer in enumerate(layers)
    ]
    return "\n".join(["Layers:", *lines])


class Refitter(_Behaviour):
    def __init__(self, engine, logger):
        assert engine.refittable
        self._engine, self._logger, self._pending = engine, logger, {}

    def get_all_weights(self):
        return [t.name for t in self._engine._model.graph.initializer if _refittable(t)]

    def get_missing_weights(self):
        return [] if self._engine._filled else [n for n in self.get_all_weights() if n not in self._pending]

    def set_named_weights(self, name, weights, location=None):
        self._world.calls.append("set_named_weights")
        if name not in self._engine._weights:
            self._log("ERROR", f"Error Code 3: no weights named {name}")
            return False
        if weights._array.nbytes != len(self._engine._weights[name].raw_data):
            self._log("ERROR", f"Error Code 3: {name} has another size or type")
            return False
        self._pending[name] = weights  # TensorRT keeps a pointer: the caller keeps the array alive
        return True

    def refit_cuda_engine_async(self, stream_handle):
        assert stream_handle, "the default stream"
        return self.refit_cuda_engine()

    def refit_cuda_engine(self):
        if "refit" in self._world.fail or self.get_missing_weights():
            self._log("ERROR", "Error Code 4: missing weights in refitter")
            return False
        for name, weights in self._pending.items():
            self._engine._weights[name].raw_data = weights._array.tobytes()
        self._engine._session, self._engine._filled = None, True
        return True


class OnnxParserRefitter(_Behaviour):
    def __init__(self, refitter, logger):
        self._refitter, self._logger = refitter, logger

    def refit_from_file(self, model):
        wanted = set(self._refitter.get_all_weights())
        for tensor in onnx.load(model).graph.initializer:
            if tensor.name in wanted:
                array = onnx.numpy_helper.to_array(tensor)
                self._refitter.set_named_weights(tensor.name, self._trt.Weights(array))
        return True


_BEHAVIOURS = {
    c.__name__: c
    for c in list(globals().values())
    if isinstance(c, type) and issubclass(c, _Behaviour) and c is not _Behaviour
}


# What only TensorRT-RTX has, of the classes above.
_RTX = frozenset(
    """
    IBuilderConfig.num_compute_capabilities IBuilderConfig.set_compute_capability Runtime.get_engine_validity
    IRuntimeConfig.create_runtime_cache IRuntimeConfig.set_runtime_cache IRuntimeConfig.cuda_graph_strategy
    IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy
    """.split()
)


def make(version: str, world: World | None = None) -> ModuleType:
    """The module `tensorrt` of a version: exactly the names of its API file; `module._world` is the test's handle."""
    (stem,) = [stem for stem in VERSIONS if stem.startswith(version)]
    api = json.loads(VERSIONS[stem].read_text())
    name, number = ("tensorrt_rtx", stem[4:]) if stem.startswith("rtx-") else ("tensorrt", stem)
    module = ModuleType(name)
    module.__version__, module.__spec__ = number, ModuleSpec(name, None)  # torch asks whether there is one
    module._world = world or World(number)
    kinds: dict[str, type] = {}
    for name, entry in api.items():
        if isinstance(entry, dict):
            kinds[name] = _enum(name, entry["enum"])
    for name, entry in api.items():
        if entry == "class" and "." not in name:
            kinds[name] = _class(name, api, kinds, module)
    for name, entry in api.items():
        owner, _, member = name.rpartition(".")
        if owner and isinstance(entry, dict):
            setattr(kinds[owner], member, kinds[name])
        elif owner and entry == "Severity":
            setattr(kinds[owner], member, getattr(kinds["ILogger.Severity"], member))
        elif not owner and name in kinds:
            setattr(module, name, kinds[name])
    return module


def _enum(name: str, members: dict[str, int]) -> type:
    made = enum.Enum(name.rpartition(".")[2], members)
    made.__int__ = lambda self: self.value
    return made


def _class(name: str, api: dict[str, Any], kinds: dict[str, type], module: ModuleType) -> type:
    """A class with the members that the API names, and no others, acting as its behaviour does."""
    behaviour = _BEHAVIOURS.get(name, _Behaviour)
    members = {key.partition(".")[2]: entry for key, entry in api.items() if key.startswith(f"{name}.")}
    own = {n for n in vars(behaviour) if not n.startswith("_")}
    extra = {n for n in own - set(members) if f"{name}.{n}" in _RTX}
    own -= extra  # below, what a version has not is hidden
    assert own <= set(members), f"the fake's {name} has what {module.__version__} has not: {own - set(members)}"
    body: dict[str, Any] = {"_trt": module, "_world": module._world} | dict.fromkeys(extra, _Missing())
    for member, entry in members.items():
        if isinstance(entry, dict) or entry == "Severity":
            continue
        if member in own:
            found = inspect.getattr_static(behaviour, member)
            body[member] = found if isinstance(found, property) else _checked(f"{name}.{member}", found, entry, kinds)
        elif entry == "property":
            body[member] = property(_not_done(name, member))
        else:
            body[member] = _not_done(name, member)

    def setter(self, attribute, value):
        ours = type(self) is not made  # a subclass written in Python may hold what it likes
        if not ours and not attribute.startswith("_") and members.get(attribute) != "property":
            raise AttributeError(f"{name} of TensorRT {module.__version__} has no {attribute}")
        object.__setattr__(self, attribute, value)

    body["__setattr__"] = setter
    made = type(name, (behaviour,), body)
    return made


class _Missing:
    """In the place of a member that this version has not."""

    def __get__(self, instance, owner):
        raise AttributeError("this version has no such member")


def _not_done(name: str, member: str):
    def call(*_, **__):
        raise NotImplementedError(f"the fake does not do {name}.{member}")

    return call


def _checked(what: str, function, printed: str, kinds: dict[str, type]):
    """The function, called only as the binding's signature allows."""
    inner = re.search(r"\((.*)\)(?: ->|$)", printed)[1]
    parameters, types = [], {}
    if "*args" in inner:
        return function
    for part in filter(None, re.split(r", (?=\w+:)", inner)):
        label, _, rest = part.partition(": ")
        kind, _, default = rest.partition(" = ")
        types[label] = kind
        parameters.append(
            inspect.Parameter(
                label, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None if default else inspect.Parameter.empty
            )
        )
    signature = inspect.Signature(parameters)

    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        for label, value in list(bound.arguments.items())[1:]:
            if not _fits(value, types[label], kinds):
                raise TypeError(f"{what}: {label} = {value!r} is no {types[label]}")
        return function(*args, **kwargs)

    return call


def _fits(value: Any, kind: str, kinds: dict[str, type]) -> bool:
    if kind == "SupportsInt":
        return isinstance(value, (int, np.integer))
    if kind in ("str", "bool"):
        return isinstance(value, {"str": str, "bool": bool}[kind])
    if kind == "Buffer":
        return isinstance(value, (bytes, bytearray, memoryview, kinds["IHostMemory"]))
    if kind == "Dims":
        return isinstance(value, (tuple, list)) and all(isinstance(v, (int, np.integer)) for v in value)
    if kind in kinds:
        return isinstance(value, kinds[kind])
    return True
