"""A new engine in one module: ONNX's reference evaluator, which computes every node with numpy."""

from __future__ import annotations

from importlib.util import find_spec

from accel.engines.base import Engine, Facts, Status, graph_file
from accel.machine import version_of

FACTS = Facts(
    dtypes=("fp32", "fp16"),
    devices={"cpu": {"device": "cpu"}},
    libraries=("onnx.reference",),
    options=("device", "dtype"),
    variants=("", "fp16"),
)


def status() -> Status:
    if find_spec("onnx") is None:
        return Status(False, "onnx is not installed", "pip install onnx")
    return Status(True, f"onnx {version_of('onnx')}")


class Toy(Engine):
    name = "toy"

    def __init__(self, bundle, component, *, device: str = "cpu", dtype: str = "fp32"):
        super().__init__(bundle, component)
        from onnx.reference import ReferenceEvaluator

        self.evaluator = ReferenceEvaluator(str(graph_file(bundle, component)))
        self.description = f"onnx reference, {device}, {dtype}"

    def run(self, feeds):
        names = [spec.name for spec in self.component.outputs]
        return dict(zip(names, self.evaluator.run(names, dict(feeds)), strict=True))


def load(bundle, component, **options):
    return Toy(bundle, component, **options)
