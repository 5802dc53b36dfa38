"""Run a TensorRT engine file without accel: needs `tensorrt`, `numpy`, and `torch` or `cuda-python` for GPU memory.

    python examples/run_engine_file.py my-bundle unet feeds.npz out.npz

Copy this file into your app. Before TensorRT sees an engine file, it makes the same checks as accel: the file must be
intact, built from this bundle's graph and weights, for this TensorRT version and GPU, and carry your own signature,
because an engine file is executable code. (NVIDIA calls a serialized engine a plan, hence the file names.)
"""

import hashlib
import hmac
import json
import os
import sys
from pathlib import Path

import numpy as np

try:
    import tensorrt as trt
except ImportError:
    raise SystemExit("this program needs TensorRT: pip install tensorrt (on a machine with an NVIDIA GPU)") from None


class Torch:
    """The GPU through torch."""

    def __init__(self):
        import torch

        self.torch, self.held = torch, {}
        self.stream = torch.cuda.Stream()
        self.handle, self.gpu = self.stream.cuda_stream, torch.cuda.get_device_properties(0).name

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
        name = self.call(runtime.cudaGetDeviceProperties, 0).name
        self.gpu = name.decode().rstrip("\0") if isinstance(name, bytes) else name

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


class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.last = ""

    def log(self, severity, msg):
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.last = msg


def user_key():
    cache = os.environ.get("ACCEL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(cache) if cache else Path(base) / "accel").joinpath("plans.key").read_bytes()


def preflight(bundle, component, path, gpu):
    """The reason why an engine file must not be loaded here, or None; its bytes; and its record."""
    text, data = path.with_suffix(".json").read_bytes(), path.read_bytes()
    record, manifest = json.loads(text), json.loads((bundle / "accel.json").read_text())
    identity, part = record["identity"], manifest["components"][component]
    signature = path.with_suffix(".sig").read_text().strip()
    options, reason = identity["options"], None
    if hashlib.sha256(data).hexdigest() != record["plan"]["sha256"]:
        reason = "the file was changed after it was built"
    elif not hmac.compare_digest(hmac.new(user_key(), text, hashlib.sha256).hexdigest(), signature):
        reason = "it does not carry your signature"
    elif manifest["files"][part["graph"]]["sha256"] != identity["graph_sha256"]:
        reason = "it was built from another ONNX graph"
    elif manifest["files"][part["weights"]]["sha256"] != identity["weights_sha256"]:
        reason = "it was built from other weights"
    elif identity["tensorrt"] != trt.__version__:
        reason = f"it was built with TensorRT {identity['tensorrt']}, here is {trt.__version__}"
    elif identity["gpu"] != gpu:
        reason = f"it was built for {identity['gpu']}, here is {gpu}"
    elif options["version_compatible"] or options["strip_plan"]:
        reason = "this program loads neither version-compatible nor stripped engines"
    return reason, data, record


class EngineFile:
    """A component's engine: `EngineFile("my-bundle", "unet", memory())(sample=array, ...)` -> {name: array}."""

    def __init__(self, bundle, component, memory):
        reasons = ["there is none"]
        for path in sorted(Path(bundle).glob(f"engines/*/{component}.plan")):
            reason, data, record = preflight(Path(bundle), component, path, memory.gpu)
            if reason is None:
                break
            reasons.append(reason)
        else:
            raise SystemExit(f"no engine file of {component} can be used: {reasons[-1]}\n  fix: accel build {bundle}")
        self.memory, self.log, self.profiles = memory, Log(), record["identity"]["profiles"]
        self.runtime = trt.Runtime(self.log)
        self.engine = self.runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise SystemExit(f"TensorRT cannot deserialize the engine: {self.log.last}")
        self.context = self.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.context is None:
            raise SystemExit(f"TensorRT creates no execution context: {self.log.last}")

    def __call__(self, **feeds):
        index = self.fitting(feeds)
        engine, context, memory = self.engine, self.context, self.memory
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
            raise SystemExit(f"TensorRT could not run: {self.log.last}")
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
