"""The digits model in every precision, built by NVIDIA's real library and audited by its own list of layers.

`test_real_builder.py` has the shipped int8 bundle, refusals and Ctrl-C. All of both takes about a minute of CPU.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.torch import save_file

from accel.assets import resolve
from accel.bundle import Bundle
from accel.bundle.graph_file import graph_file
from accel.dtypes import ALWAYS_FLOAT32
from accel.errors import UserError
from accel.export.graph import precision, trace
from accel.export.pipeline import export_pipeline
from accel.export.tensorrt import audit, child, compiler, kernels, shapes
from accel.export.tensorrt.build import build
from accel.export.tensorrt.forms import FORMS
from accel.export.tensorrt.options import BuildOptions
from accel.models import networks, weight_files
from accel.parity import relative_l2
from accel.trt import library

RTX = "tensorrt-rtx"
pytestmark = pytest.mark.skipif(
    library.installed(RTX) is None, reason='TensorRT-RTX is not installed: pip install "accel-diffusion[tensorrt-rtx]"'
)


@pytest.fixture(scope="module")
def floating(stored_graphs, tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("fp32") / "bundle"
    return export_pipeline(
        resolve("digits/4step"), out, profile="batch=1-2,size=64", components=("unet", "vae_decoder")
    )


@dataclass(frozen=True)
class Lowered:
    """A graph to build, and what the graph's nodes are to compute in."""

    path: Path
    described: dict[str, Any]
    nodes: dict[str, str]

    def built(self, path: Path | None = None) -> tuple[compiler.Compiled, dict[str, Any]]:
        """What the real builder makes of the graph, or of a changed one, audited against the graph."""
        options = asdict(BuildOptions())
        job = compiler.Job(RTX, "it", str(path or self.path), [self.described], options, ["sm89"], forms=list(FORMS))
        done = child.compile_apart(job, lambda *_: None)
        return done, audit.audit(done.layers, self.nodes)


def lowered(bundle: Bundle, name: str, folder: Path, *, opset: int = 20) -> Lowered:
    """What an export in fp16 or int8-fp16 traces: the same layers and scales, in float16 but for the time embedding."""
    component = bundle.component(name)
    kept = tuple(k for k in ALWAYS_FLOAT32 if k == "time_embedding" and name == "unet")
    shutil.copy(bundle.path / component.folder / "config.json", folder)
    state = {
        key: value.half() if value.is_floating_point() and not key.startswith(kept or ("-",)) else value.clone()
        for key, value in weight_files.read(bundle.file(component.weights)).items()
    }
    save_file(state, folder / trace.WEIGHTS)
    inputs, outputs = (precision.with_dtype(specs, "float16") for specs in (component.inputs, component.outputs))
    weights, layers = folder / trace.WEIGHTS, component.int8.get("layers")
    module = networks.rebuild(component.kind, folder / "config.json", weights, inputs, outputs, layers)
    networks.keep_float32(module.model, kept)
    network = networks.Network(name, component.kind, module, inputs, outputs)
    trace.export_graph(network, component.dims, folder, opset=opset)
    path = folder / trace.GRAPH
    described = shapes.described(bundle, component, bundle.manifest.profile)
    return Lowered(path, described, audit.of_graph(onnx.load(path, load_external_data=False)))


@pytest.fixture(scope="module")
def half_vae(floating, tmp_path_factory) -> Lowered:
    return lowered(floating, "vae_decoder", tmp_path_factory.mktemp("fp16"))


@pytest.fixture(scope="module")
def int8_vae() -> Lowered:
    """The shipped one, whose rest is float32."""
    bundle = Bundle.open(resolve("digits/4step-int8"))
    component = bundle.component("vae_decoder")
    described = shapes.described(bundle, component, bundle.manifest.profile)
    return Lowered(graph_file(bundle, component), described, audit.expected(bundle, component))


def test_digits_in_float32(floating):
    said = []
    files = build(floating, engine=RTX, targets=["sm89"], announce=said.append)
    for name, record in ((file.component, file.record) for file in files):
        found = record["audit"]
        assert set(found["heavy"]) == {"fp32"} and found["wanted"] == "fp32" and found["wider"] == [], name
        assert found["float32_in_graph"] == found["heavy"]["fp32"], "every layer is traced back to the graph"
        # Products of one input are one kernel (queries, keys and values), so there are fewer kernels than nodes.
        nodes = audit.expected(floating, floating.component(name))
        assert len(nodes) / 2 < found["heavy"]["fp32"] <= len(nodes)
    assert len([line for line in said if " in fp32" in line]) == 2


def test_digits_in_int8_with_the_rest_in_float16(floating, tmp_path):
    unet = lowered(Bundle.open(resolve("digits/4step-int8")), "unet", tmp_path)
    done, found = unet.built()
    assert "242 of 242 int8 nodes" in audit.check("unet", "int8", found) and found["wider"] == []
    # float32 are the time embedding's two products, which the graph has so.
    assert found["heavy"]["fp32"] == found["float32_in_graph"] == 2 and found["heavy"]["fp16"] > 20
    assert not any("scales to fp32" in line for line in done.warnings), "int8 convolutions write float16"
    assert kernels.count(done.layers).islands == 1, "the time embedding"
    # The form that was built is as near to float32 as the graph that it was made from.
    before, now = onnx.load(unet.path), onnx.load(unet.path)
    rounded = {node.output[0] for node in before.graph.node if node.op_type == "DequantizeLinear"}
    convolutions = [node for node in before.graph.node if node.op_type == "Conv" and node.input[0] in rounded]
    assert FORMS["scalar_scales"](now, tmp_path) == len(convolutions) > 50
    truth = unet_of(onnx.load(graph_file(floating, floating.component("unet"))))
    apart = [relative_l2(unet_of(model), truth) for model in (before, now)]
    assert 0 < apart[1] < 1.1 * apart[0]


def test_digits_at_opset_23(floating, tmp_path):
    """Heads of 4 and 8 have no attention kernel: each node is taken apart, and none of the parts is float32."""
    unet = lowered(floating, "unet", tmp_path, opset=23)
    done, found = unet.built()
    operators = [node.op_type for node in onnx.load(unet.path, load_external_data=False).graph.node]
    assert done.attentions == operators.count("Attention") > 20
    assert set(found["heavy"]) == {"fp16", "fp32"} and found["wider"] == []
    assert found["heavy"]["fp32"] == found["float32_in_graph"] == 2


def unet_of(model: onnx.ModelProto) -> np.ndarray:
    """What a UNet of the digits makes of fixed inputs, on the CPU, node by node."""
    options, rng = onnxruntime.SessionOptions(), np.random.default_rng(0)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    sample, text = rng.standard_normal((2, 4, 16, 16)), rng.standard_normal((2, 77, 64))
    feeds = {"sample": sample, "encoder_hidden_states": text, "timestep": np.array(500)}
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    given = {value.name: feeds[value.name].astype(types[value.type]) for value in session.get_inputs()}
    return session.run(None, given)[0].astype(np.float32)


def forced_to_float32(model: onnx.ModelProto) -> str:
    """Turn a convolution in the middle of a graph to float32, its input and weights too; returns its name.

    (Casts around it would not do: the compiler leaves them out, and stays in float16.)
    """
    node = [node for node in model.graph.node if node.op_type == "Conv"][5]
    place, given = list(model.graph.node).index(node), {tensor.name: tensor for tensor in model.graph.initializer}
    for i in (1, 2):
        wide = onnx.numpy_helper.to_array(given[node.input[i]]).astype(np.float32) * np.float32(1.0001)
        node.input[i] += "_wide"
        model.graph.initializer.append(onnx.numpy_helper.from_array(wide, node.input[i]))
    x, out = node.input[0], node.output[0]
    node.input[0], node.output[0] = f"{x}_wide", f"{out}_wide"
    back = onnx.helper.make_node("Cast", [f"{out}_wide"], [out], name="back", to=onnx.TensorProto.FLOAT16)
    model.graph.node.insert(place + 1, back)
    factor = onnx.numpy_helper.from_array(np.array(1.0001, np.float32), "factor")
    model.graph.initializer.append(factor)
    for made in (
        onnx.helper.make_node("Mul", [f"{x}_cast", "factor"], [f"{x}_wide"], name="times"),
        onnx.helper.make_node("Cast", [x], [f"{x}_cast"], name="wide", to=onnx.TensorProto.FLOAT),
    ):
        model.graph.node.insert(place, made)
    return node.name


def without_rounding(model: onnx.ModelProto) -> str:
    """Feed a convolution of an int8 graph with what was there before it was rounded; returns its name."""
    maker = {node.output[0]: node for node in model.graph.node}
    node = [node for node in model.graph.node if node.op_type == "Conv" and node.input[0] in maker][5]
    rounded = maker[maker[node.input[0]].input[0]]
    assert rounded.op_type == "QuantizeLinear"
    node.input[0] = rounded.input[0]
    return node.name


@pytest.mark.parametrize("precision, change", [("fp16", forced_to_float32), ("int8", without_rounding)])
def test_one_layer_in_float32_of_the_builder_fails_the_audit(half_vae, int8_vae, tmp_path, precision, change):
    """The real builder is given one layer in float32, and the audit the graph that has none."""
    vae = half_vae if precision == "fp16" else int8_vae
    model = onnx.load(vae.path)
    name = change(model)
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    (_, right), (_, wrong) = vae.built(), vae.built(path)
    audit.check("vae_decoder", precision, right)
    assert right["wider"] == [] and [row["node"] for row in wrong["wider"]] == [name]
    with pytest.raises(UserError, match=f"computes {name} in float32, which the graph has in {precision}"):
        audit.check("vae_decoder", precision, wrong)
    if precision == "int8":
        assert right["int8_share"] == [22, 22] and wrong["int8_share"] == [21, 22]
