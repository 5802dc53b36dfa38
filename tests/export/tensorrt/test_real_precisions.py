"""The digits model in every precision, built by NVIDIA's real library and audited by its own list of layers.

`test_real_builder.py` has the shipped int8 bundle, refusals and Ctrl-C. All of both takes about a minute of CPU.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict

import numpy as np
import onnx
import onnxruntime
import pytest

from accel.assets import resolve
from accel.bundle import Bundle
from accel.bundle.graph_file import graph, graph_file
from accel.errors import Notice, UserError
from accel.export.int8.settings import Int8Settings
from accel.export.pipeline import export_pipeline
from accel.export.tensorrt import audit, child, compiler, forms, shapes
from accel.export.tensorrt.build import build
from accel.export.tensorrt.options import BuildOptions
from accel.parity import relative_l2
from accel.trt import library

RTX = "tensorrt-rtx"
pytestmark = pytest.mark.skipif(
    library.installed(RTX) is None, reason='TensorRT-RTX is not installed: pip install "accel-diffusion[tensorrt-rtx]"'
)
ALL = ("text_encoder", "unet", "vae_decoder")
PROFILE = "batch=1-2,size=64"


@pytest.fixture(scope="module")
def floating(stored_graphs, tmp_path_factory) -> Bundle:
    return export_pipeline(
        resolve("digits/4step"), tmp_path_factory.mktemp("fp32") / "bundle", profile=PROFILE, components=ALL
    )


@pytest.fixture(scope="module")
def half(stored_graphs, tmp_path_factory) -> Bundle:
    """float16 at opset 23, whose attentions are one node each."""
    out = tmp_path_factory.mktemp("fp16") / "bundle"
    return export_pipeline(
        resolve("digits/4step"), out, precision="fp16", opset=23, profile=PROFILE, components=("unet", "vae_decoder")
    )


def test_digits_in_float32(floating):
    said = []
    files = {
        file.component: file.record for file in build(floating, engine=RTX, targets=["sm89"], announce=said.append)
    }
    for name, record in files.items():
        found = record["audit"]
        assert set(found["heavy"]) == {"fp32"} and found["wanted"] == "fp32" and found["wider"] == [], name
        assert found["float32_in_graph"] == found["heavy"]["fp32"], "every layer is traced back to the graph"
    nodes = audit.expected(floating, floating.component("unet"))
    # Products of one input are one kernel (queries, keys and values), so there are fewer kernels than nodes.
    assert 200 < files["unet"]["audit"]["heavy"]["fp32"] <= len(nodes)
    assert files["unet"]["measured"]["attentions"] == 0 and len([s for s in said if " in fp32" in s]) == 3


def test_digits_in_int8_with_the_rest_in_float16(floating, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # speed is not measured without a GPU
        settings = Int8Settings(images=2, evaluation_images=1, components=("unet",))
        bundle = export_pipeline(floating.path, tmp_path / "bundle", precision="int8-fp16", int8=settings)
    files = {file.component: file.record for file in build(bundle, engine=RTX, targets=["sm89"])}
    found = files["unet"]["audit"]
    assert found["int8_share"] == [242, 242] and found["wider"] == []
    assert not any("scales to fp32" in line for line in files["unet"]["warnings"]), "int8 convolutions write float16"
    # float32 are the time embedding's two products, which the graph has so.
    assert found["heavy"]["fp32"] == found["float32_in_graph"] == 2 and found["heavy"]["fp16"] > 20
    for name in ("text_encoder", "vae_decoder"):
        assert set(files[name]["audit"]["heavy"]) == {"fp16"} and files[name]["audit"]["wanted"] == "fp16"
    # The form that was built is as near to float32 as the graph of the bundle.
    path = graph_file(bundle, bundle.component("unet"))
    before, now = onnx.load(path), onnx.load(path)
    rounded = {node.output[0] for node in before.graph.node if node.op_type == "DequantizeLinear"}
    convolutions = [node for node in before.graph.node if node.op_type == "Conv" and node.input[0] in rounded]
    assert forms.scalar_scales(now, path.parent) == len(convolutions) > 50
    truth = unet_of(onnx.load(graph_file(floating, floating.component("unet"))))
    apart = [relative_l2(unet_of(model), truth) for model in (before, now)]
    assert 0 < apart[1] < 1.1 * apart[0]


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


def test_digits_at_opset_23(half):
    """Heads of 4 and 8 have no attention kernel: each node is taken apart, and none of the parts is float32."""
    (unet,) = build(half, ["unet"], engine=RTX, targets=["sm89"])
    operators = [node.op_type for node in graph(half, half.component("unet")).graph.node]
    assert unet.record["measured"]["attentions"] == operators.count("Attention") == 32
    found = unet.record["audit"]
    assert set(found["heavy"]) == {"fp16", "fp32"} and found["wider"] == []
    assert found["heavy"]["fp32"] == found["float32_in_graph"] == 2


def forced_to_float32(model: onnx.ModelProto) -> str:
    """Turn a convolution in the middle of a graph to float32, operands and all; returns its name."""
    node = [node for node in model.graph.node if node.op_type == "Conv"][5]
    place, float32 = list(model.graph.node).index(node), onnx.TensorProto.FLOAT
    for i, name in enumerate(list(node.input)):
        wide = onnx.helper.make_node("Cast", [name], [f"{name}_wide"], name=f"wide_{i}", to=float32)
        model.graph.node.insert(place + i, wide)
        node.input[i] = f"{name}_wide"
    out = node.output[0]
    node.output[0] = f"{out}_wide"
    back = onnx.helper.make_node("Cast", [node.output[0]], [out], name="back", to=onnx.TensorProto.FLOAT16)
    model.graph.node.insert(list(model.graph.node).index(node) + 1, back)
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
def test_one_layer_in_float32_of_the_builder_fails_the_audit(half, tmp_path, precision, change):
    """The real builder is given one layer in float32, and the audit the graph that has none."""
    bundle = half if precision == "fp16" else Bundle.open(resolve("digits/4step-int8"))
    component = bundle.component("vae_decoder")
    described = shapes.described(bundle, component, bundle.manifest.profile)
    nodes, counted = audit.expected(bundle, component), {}
    for name in ("as it is", "changed"):
        model = onnx.load(graph_file(bundle, component))
        changed = change(model) if name == "changed" else ""
        path = tmp_path / f"{name}.onnx"
        onnx.save(model, path)
        job = compiler.Job(RTX, "vae_decoder", str(path), [described], asdict(BuildOptions()), ["sm89"])
        counted[name] = audit.audit(child.compile_apart(job, lambda *_: None).layers, nodes)
    audit.check("vae_decoder", precision, counted["as it is"])
    assert counted["as it is"]["wider"] == []
    assert [row["node"] for row in counted["changed"]["wider"]] == [changed]
    with pytest.raises(UserError, match=f"computes {changed} in float32, which the graph has in {precision}"):
        audit.check("vae_decoder", precision, counted["changed"])
    if precision == "int8":
        assert counted["as it is"]["int8_share"] == [22, 22] and counted["changed"]["int8_share"] == [21, 22]
