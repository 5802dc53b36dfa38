"""A graph with anything that no export writes is refused before any engine sees it, in milliseconds."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import accel
from accel.bundle import Bundle
from accel.bundle.graph_file import graph_file
from accel.errors import UserError

NAMES = ("tokenizer", "unet")


def place(graph, key: str) -> onnx.StringStringEntryProto:
    tensor = next(tensor for tensor in graph.initializer if tensor.external_data)
    return next(entry for entry in tensor.external_data if entry.key == key)


def setting(key: str, value: str):
    def change(model):
        place(model.graph, key).value = value

    return change


def adding(op: str, inputs=(), outputs=("more",), domain: str = "", **attributes):
    def change(model):
        model.graph.node.append(helper.make_node(op, list(inputs), list(outputs), domain=domain, **attributes))

    return change


def constant(values, *nodes):
    """A constant `big` and nodes that read it."""

    def change(model):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.int64), "big"))
        for op, inputs in nodes:
            model.graph.node.append(helper.make_node(op, inputs, [f"made_{op}"]))

    return change


def body() -> onnx.GraphProto:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    node = helper.make_node("Constant", [], ["y"], value_float=1.0)
    return helper.make_graph([node], "body", [], [value])


def dims(values):
    def change(model):
        next(tensor for tensor in model.graph.initializer if not tensor.external_data).dims[:] = values

    return change


def opset(version: int, domain: str = ""):
    def change(model):
        model.opset_import[0].version = version
        model.opset_import[0].domain = domain

    return change


def inner(model):
    tensor = TensorProto(name="c", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "*/_ORT_MEM_ADDR_/*"), ("offset", "4096"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def other_dtype(model):
    next(tensor for tensor in model.graph.initializer if tensor.external_data).data_type = TensorProto.DOUBLE


def swap_inputs(model):
    held = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in model.graph.input]
    del model.graph.input[:]
    model.graph.input.extend(held[::-1])


ATTACKS = {
    "weights in memory": setting("location", "*/_ORT_MEM_ADDR_/*"),
    "weights in memory, in a constant": inner,
    "weights in another file of the folder": setting("location", "config.json"),
    "weights outside": setting("location", "../tokenizer/vocab.json"),
    "an absolute place": setting("location", "/etc/passwd"),
    "an offset of the header": setting("offset", "0"),
    "a negative offset": setting("offset", "-8"),
    "an offset beyond the end": setting("offset", str(1 << 62)),
    "an offset that is no number": setting("offset", "0x10"),
    "an offset in other digits": setting("offset", "\u0661\u0662"),
    "a length of nothing": setting("length", "0"),
    "a length beyond the end": setting("length", str(1 << 40)),
    "another dtype": other_dtype,
    "a loop": adding("Loop", ["", ""], body=body()),
    "a scan": adding("Scan", [], body=body(), num_scan_inputs=0),
    "a branch": adding("If", ["x"], then_branch=body(), else_branch=body()),
    "a branch in an ordinary operator": adding("Add", ["x", "x"], body=body()),
    "a sequence": adding("SequenceMap", ["x"], body=body()),
    "an operator of somebody": adding("Evil", domain="com.somebody"),
    "a python operator": adding("PyOp", domain="ai.onnx.contrib"),
    "an opset of the past": opset(7),
    "an opset of the future": opset(1 << 40),
    "an opset of somebody": opset(20, "com.somebody"),
    "absurd dims": dims([1 << 40]),
    "negative dims": dims([-1]),
    "dims whose product is absurd": dims([1 << 20, 1 << 20, 1 << 20]),
    "many dims": dims([1] * 40),
    "dims without data": dims([1000, 1000]),
    "a constant of any size": constant([1 << 20, 1 << 20], ("ConstantOfShape", ["big"])),
    "an expansion to any size": constant([1 << 40], ("Expand", ["sample", "big"])),
    "a tile of any size": constant([1 << 16, 1 << 16, 1, 1], ("Tile", ["sample", "big"])),
    "a padding of any size": constant([0, 0, 0, 0, 0, 0, 0, 1 << 40], ("Pad", ["sample", "big"])),
    "functions": lambda model: model.functions.add(name="f", domain="d"),
    "sparse tensors": lambda model: model.graph.sparse_initializer.add(),
    "training": lambda model: model.training_info.add(),
    "no nodes": lambda model: model.graph.ClearField("node"),
    "another input": lambda model: model.graph.input.add(name="more"),
    "inputs in another order": swap_inputs,
}


@pytest.fixture
def attacked(bundle, seal):
    def make(change, component: str = "unet"):
        for name in ("model.onnx", "model.uint8.onnx"):
            path = bundle / component / name
            model = onnx.load(str(path), load_external_data=False)
            change(model)
            path.write_bytes(model.SerializeToString())
        return seal(bundle)

    return make


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_no_export_writes_is_refused_before_any_engine(attacked, attack):
    bundle = Bundle.open(attacked(ATTACKS[attack]))
    component = bundle.component("unet")
    for engine in ("", "onnxruntime"):
        with pytest.raises(UserError, match="refused, because no export writes that"):
            graph_file(bundle, component, engine)
    with pytest.raises(UserError, match="refused"):
        accel.load_engine(bundle, "unet", "openvino")


def test_an_honest_graph_is_checked_in_milliseconds(bundle):
    opened = Bundle.open(bundle)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        for component in opened.manifest.components.values():
            graph_file(opened, component)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"\xff" * 1000, b"not a graph", b"\x0a" * 5000, b"\x3a\xff\xff\xff\xff\x0f"]
)
def test_a_file_that_is_no_graph_is_a_sentence(bundle, seal, content):
    (bundle / "unet/model.onnx").write_bytes(content)
    with pytest.raises(UserError, match="model.onnx"):
        accel.load_engine(seal(bundle), "unet", "openvino")


NO_WEIGHTS = (
    *(b"", b"\0" * 7, b"\xff" * 100, (1 << 40).to_bytes(8, "little")),
    *(b"\x02" + b"\0" * 7 + b"[]", b"\x08" + b"\0" * 7 + b'{"a": 1}'),
)


@pytest.mark.parametrize("content", NO_WEIGHTS)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "eager"])
def test_weights_that_are_none_are_a_sentence_on_every_engine(bundle, seal, content, engine):
    (bundle / "unet/model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="safetensors"):
        accel.load_engine(seal(bundle), "unet", engine)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "eager"])
def test_swapped_components_are_a_sentence_on_every_engine(bundle, seal, engine):
    for path in (bundle / "unet").iterdir():
        other = bundle / "vae_decoder" / path.name
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
    with pytest.raises(UserError):
        accel.load_engine(seal(bundle), "unet", engine)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "eager"])
def test_an_engine_that_fails_inside_a_call_says_so_in_a_sentence(bundle, engine):
    encoder = accel.load_engine(bundle, "text_encoder", engine)
    (spec,) = encoder.component.inputs
    ids = np.full(spec.concrete({dim: limits.min for dim, limits in encoder.component.dims.items()}), 1 << 40, np.int64)
    try:
        outputs = encoder(input_ids=ids)
    except UserError as error:
        assert "text_encoder failed on" in error.message
    else:  # OpenVINO takes an index outside the table for a row of zeros
        assert engine == "openvino" and all(np.isfinite(value).all() for value in outputs.values())
