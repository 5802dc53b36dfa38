"""Upsampling and the convolution after it are one transposed convolution, on paper, on OpenVINO and in the engine."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

import accel
from accel.engines import openvino as engine_of_openvino
from accel.engines.folds import in_onnx, in_openvino, upsample
from accel.export.pipeline import export_pipeline
from accel.parity import relative_l2

openvino = pytest.importorskip("openvino")
SIZES = [(1, 1), (2, 5), (7, 4)]


def test_it_is_exact():
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    folded = torch.from_numpy(upsample.transposed(weight.numpy()))
    assert folded.shape == (5, 6, 4, 4)
    for size in SIZES:
        x = torch.randn(2, 5, *size, dtype=torch.float64)
        expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
        assert (F.conv_transpose2d(x, folded, stride=2, padding=1) - expected).abs().max() < 1e-12
        every = F.conv2d(x, torch.from_numpy(upsample.phases(weight.numpy())), padding=1).unflatten(1, (2, 2, 6))
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            part = every[:, a, b, :, a : a + size[0], b : b + size[1]]
            assert (part - expected[..., a::2, b::2]).abs().max() < 1e-12


def graph(*, channels=128, int8=False, scales=(1, 1, 2, 2), pads=(1, 1, 1, 1), mode="nearest", readers=1):
    """x [1, channels, h, w] -> Resize -> (QDQ) -> Conv [8 out] as an ONNX graph, with h and w free."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, channels, 3, 3)).astype(np.float32)
    tensors = {"scales": np.array(scales, np.float32)}
    attributes = dict(mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    nodes = [helper.make_node("Resize", ["x", "", "scales"], ["up"], **attributes)]
    data, filters = "up", "weight"
    if int8:
        step = np.abs(weight).max((1, 2, 3)) / 127
        quantized = np.rint(weight / step[:, None, None, None]).astype(np.int8)
        tensors |= {"weight": quantized, "step": step}
        tensors |= {"scale": np.float32(0.03), "zero": np.int8(0)}
        nodes += [
            helper.make_node("QuantizeLinear", ["up", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
            helper.make_node("DequantizeLinear", ["weight", "step"], ["w"], axis=0),
        ]
        data, filters = "dq", "w"
    else:
        tensors["weight"] = weight
    nodes.append(helper.make_node("Conv", [data, filters], ["y"], pads=pads, kernel_shape=[3, 3]))
    outputs = ["y"]
    if readers > 1:
        nodes.append(helper.make_node("Relu", ["up"], ["other"]))
        outputs.append("other")
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)  # noqa: E731
    made = helper.make_graph(
        nodes,
        "pair",
        [value("x", [1, channels, "h", "w"])],
        [value(name, [1, size, None, None]) for name, size in zip(outputs, (8, channels), strict=False)],
        [numpy_helper.from_array(np.asarray(tensor), name) for name, tensor in tensors.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.load_from_string(model.SerializeToString()).SerializeToString()


def initializers(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}.get


def test_a_folded_onnx_graph_computes_the_same():
    onnxruntime = pytest.importorskip("onnxruntime")
    model = onnx.load_from_string(graph())
    assert in_onnx.fold(model, initializers(model)) == 1
    onnx.checker.check_model(model, full_check=True)
    assert "Resize" not in [node.op_type for node in model.graph.node]
    plain, folded = (onnxruntime.InferenceSession(data) for data in (graph(), model.SerializeToString()))
    for size in SIZES:
        x = np.random.default_rng(1).standard_normal((1, 128, *size)).astype(np.float32)
        own, found = (session.run(None, {"x": x})[0] for session in (plain, folded))
        assert found.shape == own.shape and relative_l2(found, own) < 1e-6


def run(model, x):
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(x)[0]


@pytest.mark.parametrize("int8", [False, True])
def test_a_folded_graph_computes_the_same(int8):
    core, data = openvino.Core(), graph(int8=int8)
    plain, folded = core.read_model(data), core.read_model(data)
    assert in_openvino.fold(folded) == 1
    kinds = [node.get_type_name() for node in folded.get_ordered_ops()]
    assert "ConvolutionBackpropData" in kinds and "Interpolate" not in kinds and "Convolution" not in kinds
    for size in SIZES:
        x = np.random.default_rng(1).standard_normal((1, 128, *size)).astype(np.float32)
        exact = run(core.read_model(graph()), x)
        own, found = run(plain, x), run(folded, x)
        assert found.shape == own.shape
        if int8:  # weights are rounded once more, by a step of their own
            assert relative_l2(found, exact) < 1.5 * relative_l2(own, exact)
        else:
            assert relative_l2(found, own) < 1e-6


@pytest.mark.parametrize(
    "other",
    [dict(channels=64), dict(scales=(1, 1, 4, 4)), dict(scales=(1, 1, 2, 1)), dict(pads=(0, 0, 0, 0)), dict(readers=2)]
    + [dict(mode="linear")],
    ids=str,
)
def test_what_is_not_such_a_pair_stays(other):
    model = openvino.Core().read_model(graph(**other))
    before = [node.get_type_name() for node in model.get_ordered_ops()]
    assert in_openvino.fold(model) == 0
    assert [node.get_type_name() for node in model.get_ordered_ops()] == before
    proto = onnx.load_from_string(graph(**other))
    assert in_onnx.fold(proto, initializers(proto)) == 0


def test_onnxruntime_folds_and_takes_other_weights(monkeypatch, sd15, tmp_path):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(in_onnx, "CHANNELS", 1)
    folded = []
    monkeypatch.setattr(in_onnx, "fold", lambda *args, fold=in_onnx.fold: folded.append(fold(*args)) or folded[-1])
    bundle = export_pipeline(sd15, tmp_path / "bundle", components=("vae_decoder",), profile="batch=1,size=64")
    record = bundle.component("vae_decoder")
    shape = record.inputs[0].concrete({dim: limits.min for dim, limits in record.dims.items()})
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    stored = load_file(bundle.file(record.weights))
    other = {name: value + 0.1 for name, value in stored.items() if "upsamplers" in name}

    def decoded(**options):
        with accel.load_engine(bundle, "vae_decoder", engine="onnxruntime", **options) as engine:
            own = engine(latent_sample=x)["sample"]
            engine.set_weights(other)
            return own, engine(latent_sample=x)["sample"]

    plain, changed = decoded(folds=False)
    assert not folded and other
    found, found_changed = decoded()
    assert folded == [folded[0]] * 2 and folded[0] > 0
    assert relative_l2(found, plain) < 1e-5 and relative_l2(found_changed, changed) < 1e-5
    assert relative_l2(changed, plain) > 1e-3


def test_openvino_folds_and_keeps_what_it_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    monkeypatch.setattr(in_openvino, "CHANNELS", 16)
    x = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    folded = []
    monkeypatch.setattr(in_openvino, "fold", lambda model, fold=in_openvino.fold: folded.append(fold(model)))

    def decoded(**options):
        with accel.load_engine("digits/4step-int8", "vae_decoder", engine="openvino", **options) as engine:
            return engine(latent_sample=x)["sample"]

    plain, first, again = decoded(folds=False), decoded(), decoded()
    assert folded == [2]  # the third was read from the cache
    assert 0 < relative_l2(first, plain) < 0.02 and (again == first).all()
    (kept,) = tmp_path.rglob("folded-*.blob")
    kept.write_bytes(b"nonsense")
    assert (decoded() == first).all() and folded == [2, 2]


def test_openvinos_cache_keeps_what_was_used_last_and_no_more(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))

    def kept(bundle):
        with accel.load_engine(bundle, "vae_decoder", engine="openvino"):
            return {file.parents[1].name for file in tmp_path.glob("openvino/*/*/*.blob")}

    one, two, three = ("digits/1step-int8", "digits/4step-int8", "digits/tiny-1step-int8")
    names = {bundle: accel.Bundle.open(bundle).digest[:32] for bundle in (one, two, three)}
    kept(one), kept(two)
    size = sum(file.stat().st_size for file in tmp_path.glob("openvino/*/*/*.blob"))
    monkeypatch.setattr(engine_of_openvino, "KEPT_BYTES", size + 1000)
    assert kept(one) == {names[one], names[two]}  # used again, and nothing more
    assert kept(three) == {names[one], names[three]}
    monkeypatch.setattr(engine_of_openvino, "KEPT_BYTES", 1000)
    assert kept(two) == {names[one], names[three]}  # larger than all may be: compiled, and not kept
