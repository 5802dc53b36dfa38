"""A new engine in one module: ONNX Runtime without any optimisation of the graph, node by node on the CPU."""

from __future__ import annotations

from importlib.util import find_spec

from accel.engines.base import Engine, Facts, Status, graph_file
from accel.machine import version_of

FACTS = Facts(
    dtypes=("fp32", "fp16"),
    devices={"cpu": {"device": "cpu"}},
    libraries=("onnxruntime",),
    options=("device", "dtype"),
    variants=("", "fp16"),
)


def status() -> Status:
    if find_spec("onnxruntime") is None:
        return Status(False, "onnxruntime is not installed", "pip install onnxruntime")
    return Status(True, f"onnxruntime {version_of('onnxruntime')}, unoptimised")


class Toy(Engine):
    name = "toy"

    def __init__(self, bundle, component, *, device: str = "cpu", dtype: str = "fp32"):
        super().__init__(bundle, component)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(str(graph_file(bundle, component)), options)
        self.description = f"toy, {device}, {dtype}"

    def run(self, feeds):
        names = [spec.name for spec in self.component.outputs]
        return dict(zip(names, self.session.run(names, dict(feeds)), strict=True))


def load(bundle, component, **options):
    return Toy(bundle, component, **options)
