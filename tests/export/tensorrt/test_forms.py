"""Other forms of a graph compute the same numbers, and TensorRT-RTX's real builder fuses them better."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from accel.bundle import Bundle
from accel.bundle.graph_file import graph_file
from accel.export.tensorrt import audit, child, compiler, forms, kernels, shapes
from accel.export.tensorrt.build import job, place
from accel.export.tensorrt.options import BuildOptions
from accel.parity import relative_l2
from accel.trt import library
from accel.trt.flavours import FLAVOURS, RTX

REAL = pytest.mark.skipif(library.installed(RTX.engine) is None, reason="TensorRT-RTX is not installed")


def convolution(kind=np.float16, scales=None, step=0.05, bias=True) -> onnx.ModelProto:
    """An int8 convolution between two float ones, all 3 x 3 over 16 channels, as an int8-fp16 export writes it."""
    rng, channels = np.random.default_rng(0), 16
    scales = np.linspace(0.001, 0.02, channels) if scales is None else scales
    given = {
        "first": (rng.standard_normal((channels, channels, 3, 3)) / 12).astype(kind),
        "last": (rng.standard_normal((channels, channels, 3, 3)) / 12).astype(kind),
        "step": np.array(step, kind),
        "zero": np.array(0, np.int8),
        "weight": rng.integers(-127, 128, (channels, channels, 3, 3)).astype(np.int8),
        "scale": np.asarray(scales).astype(kind),
        "bias": rng.standard_normal(channels).astype(kind),
    }
    around = dict(pads=[1, 1, 1, 1], kernel_shape=[3, 3])
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], name="first", **around),
        helper.make_node("QuantizeLinear", ["a", "step", "zero"], ["q"], name="round"),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["d"], name="spread"),
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["w"], name="weights", axis=0),
        helper.make_node("Conv", ["d", "w", *(["bias"] if bias else [])], ["b"], name="middle", **around),
        helper.make_node("Sigmoid", ["b"], ["s"], name="sigmoid"),
        helper.make_node("Mul", ["b", "s"], ["silu"], name="silu"),
        helper.make_node("Conv", ["silu", "last"], ["y"], name="last", **around),
    ]
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    x, y = (helper.make_tensor_value_info(name, elem, [1, channels, 32, 32]) for name in "xy")
    used = {name for node in nodes for name in node.input}
    tensors = [numpy_helper.from_array(value, name) for name, value in given.items() if name in used]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def changed(model: onnx.ModelProto, form: str, folder=".") -> tuple[onnx.ModelProto, int]:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    return copy, forms.FORMS[form](copy, folder)


def run(model: onnx.ModelProto, **feeds) -> np.ndarray:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0].astype(np.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_one_scale_and_a_factor_for_each_channel_compute_the_same(bias):
    model = convolution(bias=bias)
    other, count = changed(model, "scalar_scales")
    onnx.checker.check_model(other)
    x = np.random.default_rng(1).standard_normal((1, 16, 32, 32)).astype(np.float16)
    assert count == 1 and relative_l2(run(other, x=x), run(model, x=x)) < 2e-3  # float16's own rounding
    one, rest = (
        numpy_helper.to_array(next(t for t in other.graph.initializer if t.name == f"middle_{name}"))
        for name in ("scale", "channels")
    )
    scale = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "scale"))
    assert one.ndim == 0 and np.frexp(one)[0] == 0.5, "a power of two"
    assert (rest.astype(np.float64).ravel() * float(one) == scale).all(), "the factors are exact"
    assert {node.name for node in model.graph.node if node.op_type == "Conv"} <= {n.name for n in other.graph.node}


@pytest.mark.parametrize(
    "model",
    [
        convolution(np.float32),  # float32 is what its graph asks for
        convolution(step=100.0),  # sums of 127 x 127 in 144 products could leave float16
        convolution(scales=[2.5] * 15 + [3e-7]),  # the factor of the last channel would be rounded
    ],
    ids=["float32", "overflow", "rounding"],
)
def test_a_convolution_stays_where_the_numbers_would_change(model):
    other, count = changed(model, "scalar_scales")
    assert count == 0 and other.graph == model.graph


def test_projections_as_products_of_tokens_compute_the_same(smallest_bundle):
    bundle = Bundle.open(smallest_bundle)
    path = graph_file(bundle, bundle.component("unet"))
    model = onnx.load(path)
    other, count = changed(model, "linear_projections", path.parent)
    projections = [node for node in model.graph.node if any(".proj_" in name for name in node.input)]
    assert count == len(projections) > 0 and len(other.graph.node) == len(model.graph.node) + 3 * count
    before = {node.name: node.op_type for node in projections}
    after = {node.name: node.op_type for node in other.graph.node if node.name in before}
    assert set(before.values()) == {"Conv"} and set(after.values()) == {"MatMul"} and after.keys() == before.keys()
    rng = np.random.default_rng(0)
    for batch, height, width in ((1, 8, 8), (2, 16, 8)):
        feeds = {
            "sample": rng.standard_normal((batch, 4, height, width)).astype(np.float32),
            "timestep": np.array(500, np.float32),
            "encoder_hidden_states": rng.standard_normal((batch, 77, 32)).astype(np.float32),
        }
        assert relative_l2(run(other, **feeds), run(model, **feeds)) < 1e-6


def test_a_norm_of_images_computes_the_same(smallest_bundle):
    """The one in front of the attention of a VAE; the others are on images already."""
    bundle = Bundle.open(smallest_bundle)
    path = graph_file(bundle, bundle.component("vae_decoder"))
    model = onnx.load(path)
    other, count = changed(model, "norms_of_images", path.parent)
    onnx.checker.check_model(other)
    assert count == 1 and len(other.graph.node) == len(model.graph.node) + 2
    for shape in ((1, 4, 8, 8), (2, 4, 16, 8)):
        latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        assert relative_l2(run(other, latent_sample=latents), run(model, latent_sample=latents)) < 1e-6


@REAL
def test_the_real_builder_writes_float16_between_int8_convolutions(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(convolution(), path)
    nodes = audit.of_graph(onnx.load(path))
    counted = {}
    for own in ([], list(RTX.forms)):
        task = compiler.Job(
            RTX.engine, "vae_decoder", str(path), [], asdict(BuildOptions(timing_cache=False)), ["sm89"], forms=own
        )
        done = child.compile_apart(task, lambda *_: None)
        found = audit.audit(done.layers, nodes)
        counted[bool(own)] = (kernels.count(done.layers), found["int8_share"], done.warnings)
    (before, share, warned), (now, same, quiet) = counted[False], counted[True]
    assert share == same == [1, 1] and now.kernels <= before.kernels
    assert (before.float32_tensors, now.float32_tensors) == (1, 0) and (before.islands, now.islands) == (1, 0)
    assert any("Converting conv activation scales to fp32" in line for line in warned) and quiet == []


@REAL
def test_what_is_refitted_keeps_the_form_that_it_is_refitted_by(smallest_bundle):
    bundle = Bundle.open(smallest_bundle)
    component, where = bundle.component("unet"), place(RTX.engine)
    profiles = [shapes.described(bundle, component, bundle.manifest.profile)]
    made = [
        job(bundle, component, profiles, BuildOptions(**options), where).forms
        for options in ({}, {"refittable": True}, {"strip_plan": True})
    ]
    assert made == [list(RTX.forms), [], []]
    assert all(set(flavour.forms) <= forms.FORMS.keys() for flavour in FLAVOURS)
