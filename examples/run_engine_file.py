"""Run an engine file of TensorRT or TensorRT-RTX without accel: needs that library, `numpy`, and `torch` or
`cuda-python` for GPU memory.

    python examples/run_engine_file.py my-bundle unet feeds.npz out.npz

Copy this file into your app. Before the library sees an engine file, this makes the same checks as accel: the file must
be intact, built from this bundle's graph and weights, for this version and GPU, and carry your own signature, because
an engine file is executable code. (NVIDIA calls a serialized engine a plan, hence the file names.)
"""

import ctypes
import hashlib
import hmac
import importlib
import json
import os
import stat
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

RTX = "tensorrt-rtx"
TITLES = {"tensorrt": "TensorRT", RTX: "TensorRT-RTX"}
FIXES = {
    "tensorrt": "pip install tensorrt",
    RTX: "pip install tensorrt-rtx-cu13-bindings onnxruntime-ep-nv-tensorrt-rtx-cu13 (a pair of one version)",
}


def load_library(engine):
    """The library that runs an engine's files, as a Python module; None where it is not installed."""
    if engine != RTX:
        return importlib.import_module("tensorrt") if find_spec("tensorrt") else None
    if find_spec("tensorrt_rtx"):  # NVIDIA's own package finds its libraries by itself
        return importlib.import_module("tensorrt_rtx")
    holder = find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    if holder is None or find_spec("tensorrt_rtx_bindings") is None:
        return None
    folder = Path(holder.origin).parent  # its libraries are those that the bindings ask the system for
    if os.name == "nt":
        os.add_dll_directory(str(folder))
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    else:
        for name in ("libtensorrt_rtx.so.*.*", "libtensorrt_onnxparser_rtx.so.*.*"):
            ctypes.CDLL(str(sorted(folder.glob(name))[-1]), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_rtx_bindings")


class Torch:
    """The GPU through torch."""

    def __init__(self):
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA device: this program needs an NVIDIA GPU and its driver")
        self.torch, self.held = torch, {}
        self.stream = torch.cuda.Stream()
        found = torch.cuda.get_device_properties(0)
        self.handle, self.gpu, self.capability = self.stream.cuda_stream, found.name, (found.major, found.minor)

    def put(self, name, array):
        with self.torch.cuda.stream(self.stream):
            self.held[name] = self.torch.from_numpy(array.reshape(-1).view(np.uint8)).cuda()
        return self.held[name].data_ptr()

    def space(self, name, size):
        with self.torch.cuda.stream(self.stream):
            self.held[name] = self.torch.empty(max(size, 1), dtype=self.torch.uint8, device="cuda")
        return self.held[name].data_ptr()

    def get(self, name, array):
        self.stream.synchronize()
        array.reshape(-1).view(np.uint8)[:] = self.held[name].cpu().numpy()


class CudaPython:
    """The GPU through cuda-python."""

    def __init__(self):
        from cuda.bindings import runtime

        self.cuda, self.held = runtime, {}
        self.handle = int(self.call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking))
        found = self.call(runtime.cudaGetDeviceProperties, 0)
        self.gpu = found.name.decode().rstrip("\0") if isinstance(found.name, bytes) else found.name
        self.capability = (found.major, found.minor)

    def call(self, function, *arguments):
        code, *values = function(*arguments)
        if int(code):
            raise SystemExit(f"CUDA: {code}")
        return values[0] if values else None

    def put(self, name, array):
        address = self.space(name, array.nbytes)
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call(self.cuda.cudaMemcpy, address, array.ctypes.data, array.nbytes, kind)
        return address

    def space(self, name, size):
        if name in self.held:
            self.call(self.cuda.cudaFree, self.held[name])
        self.held[name] = self.call(self.cuda.cudaMalloc, max(size, 1))
        return int(self.held[name])

    def get(self, name, array):
        self.call(self.cuda.cudaStreamSynchronize, self.handle)
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call(self.cuda.cudaMemcpy, array.ctypes.data, self.held[name], array.nbytes, kind)


def make_log(trt):
    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.last = "no reason given"

        def log(self, severity, msg):
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last = msg

    return Log()


def cache_folder():
    cache = os.environ.get("ACCEL_CACHE")
    return Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accel"


def preflight(bundle, component, path, memory):
    """The reason why an engine file must not be loaded here, or None; its bytes; its record; and its library."""
    text, data = path.with_suffix(".json").read_bytes(), path.read_bytes()
    record, manifest = json.loads(text), json.loads((bundle / "accel.json").read_text())
    identity, part = record["identity"], manifest["components"][component]
    signature, key = path.with_suffix(".sig").read_text().strip(), (cache_folder() / "plans.key").read_bytes()
    options, reason, trt = identity["options"], None, None
    engine = identity.get("engine", "tensorrt")
    if hashlib.sha256(data).hexdigest() != record["plan"]["sha256"]:
        reason = "the file was changed after it was built"
    elif not hmac.compare_digest(hmac.new(key, text, hashlib.sha256).hexdigest(), signature):
        reason = "it does not carry your signature"
    elif manifest["files"][part["graph"]]["sha256"] != identity["graph_sha256"]:
        reason = "it was built from another ONNX graph"
    elif manifest["files"][part["weights"]]["sha256"] != identity["weights_sha256"]:
        reason = "it was built from other weights"
    elif (trt := load_library(engine)) is None:
        reason = f"it needs {TITLES[engine]}, which is not installed: {FIXES[engine]}"
    elif identity["tensorrt"] != trt.__version__:
        reason = f"it was built with {TITLES[engine]} {identity['tensorrt']}, here is {trt.__version__}"
    elif engine == RTX and not runs_on(identity["targets"], memory.capability):
        reason = f"it was built for {', '.join(identity['targets']) or 'Ampere and newer'}, here is {memory.gpu}"
    elif engine != RTX and identity["gpu"] != memory.gpu:
        reason = f"it was built for {identity['gpu']}, here is {memory.gpu}"
    elif options["version_compatible"] or options["strip_plan"]:
        reason = "this program loads neither version-compatible nor stripped engines"
    return reason, data, record, trt


def runs_on(targets, capability):
    """Whether an engine file of TensorRT-RTX is for a card: one of its targets, or without any, Ampere and newer."""
    return "sm{}{}".format(*capability) in targets if targets else capability >= (8, 0)


class RuntimeCache:
    """What TensorRT-RTX compiled for this card, kept in a file, so that it is done once: a digest, and its bytes."""

    def __init__(self, cache, name):
        self.cache, self.path = cache, cache_folder() / "run_engine_file" / name
        data = self.read()
        if data:
            cache.deserialize(data)

    def read(self):
        try:
            if os.name != "nt" and self.path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return b""  # it holds code, and somebody else may have written it
            content = self.path.read_bytes()
        except OSError:
            return b""
        return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else b""

    def save(self):
        data = bytes(self.cache.serialize())
        if len(data) > len(self.read()):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            new = self.path.with_suffix(f".{os.getpid()}")
            new.touch(mode=0o600)
            new.write_bytes(hashlib.sha256(data).digest() + data)
            new.replace(self.path)


class EngineFile:
    """A component's engine: `EngineFile("my-bundle", "unet", memory())(sample=array, ...)` -> {name: array}."""

    def __init__(self, bundle, component, memory):
        reasons = ["there is none"]
        for path in sorted(Path(bundle).glob(f"engines/*/{component}.plan")):
            reason, data, record, trt = preflight(Path(bundle), component, path, memory)
            if reason is None:
                break
            reasons.append(reason)
        else:
            raise SystemExit(f"no engine file of {component} can be used: {reasons[-1]}\n  fix: accel build {bundle}")
        identity = record["identity"]
        self.trt, self.memory, self.log, self.profiles = trt, memory, make_log(trt), identity["profiles"]
        self.title = TITLES[identity.get("engine", "tensorrt")]
        self.runtime = trt.Runtime(self.log)
        self.engine = self.runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise SystemExit(f"{self.title} cannot deserialize the engine: {self.log.last}")
        self.context = self.make_context(f"{record['key']}-{memory.gpu.replace(' ', '-')}.runtime")
        if self.context is None:
            raise SystemExit(f"{self.title} creates no execution context: {self.log.last}")

    def make_context(self, cache_name):
        ours = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.title != TITLES[RTX]:
            return self.engine.create_execution_context(ours)
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(ours)
        cache = RuntimeCache(config.create_runtime_cache(), cache_name)
        config.set_runtime_cache(cache.cache)
        context = self.engine.create_execution_context(config)  # the first time, this compiles: seconds
        if context is not None:
            cache.save()
        return context

    def __call__(self, **feeds):
        index = self.fitting(feeds)
        trt, engine, context, memory = self.trt, self.engine, self.context, self.memory
        assert context.set_optimization_profile_async(index, memory.handle)
        for name, value in feeds.items():
            value = np.ascontiguousarray(value)
            if name in self.profiles[index]["shapes"]:
                assert context.set_input_shape(name, tuple(value.shape)), self.log.last
            assert context.set_tensor_address(name, memory.put(name, value))
        outputs = {}
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
                kind = {trt.DataType.FLOAT: np.float32, trt.DataType.HALF: np.float16}[engine.get_tensor_dtype(name)]
                outputs[name] = np.empty(tuple(context.get_tensor_shape(name)), kind)
                assert context.set_tensor_address(name, memory.space(name, outputs[name].nbytes))
        size = max(512, engine.get_device_memory_size_for_profile_v2(index))
        context.set_device_memory(memory.space("(scratch)", size), size)
        if not context.execute_async_v3(memory.handle):
            raise SystemExit(f"{self.title} could not run: {self.log.last}")
        for name, value in outputs.items():
            memory.get(name, value)
        return outputs

    def fitting(self, feeds):
        for index, profile in enumerate(self.profiles):
            ranges = ((low, feeds[name].shape, high) for name, (low, _, high) in profile["shapes"].items())
            if all(a <= n <= b for low, shape, high in ranges for a, n, b in zip(low, shape, high, strict=True)):
                return index
        raise SystemExit(
            "no optimization profile of the engine takes these shapes: accel build BUNDLE --profile ... (one that does)"
        )


def memory():
    try:
        return Torch()
    except ImportError:
        return CudaPython()


if __name__ == "__main__":
    if len(sys.argv) < 5:
        raise SystemExit(__doc__)
    folder, part, source, target = sys.argv[1:5]
    engine = EngineFile(folder, part, memory())
    np.savez(target, **engine(**np.load(source)))
    print(target)
