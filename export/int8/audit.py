"""Audit which layers of a quantized graph an engine really runs so, from the engine's own optimised graph.

Every fusion that int8 and fp8 depend on can fail silently; the model then runs in float, slower than before. Where
only weights are quantized, an engine may turn them into float as it loads; then no memory is saved. The audit reads the
graph that ONNX Runtime saves after optimisation, OpenVINO's runtime model, or what TensorRT's inspector says of an
engine file.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx

from accel.bundle import Bundle, Component
from accel.bundle.graph_file import graph_file
from accel.engines import computing_in, fitting_engine_file, load_engine, status
from accel.engines.onnxruntime import OFF_FOR_INT8
from accel.errors import UserError
from accel.int8.formats import FORMATS

_PAIR = ("QuantizeLinear", "DequantizeLinear")
EXPECTED = 0.95  # least share of the quantized layers that must run in int8

_CONV, _LINEAR, _PRODUCT = "conv", "linear", "product"
_INT8 = {
    "QLinearConv": _CONV,
    "ConvInteger": _CONV,
    "MatMulIntegerToFloat": _LINEAR,
    "QLinearMatMul": _LINEAR,
    "QGemm": _LINEAR,
    "DynamicQuantizeMatMul": _LINEAR,
}
_FLOAT = {
    "Conv": _CONV,
    "FusedConv": _CONV,
    "NhwcFusedConv": _CONV,
    "MatMul": _LINEAR,
    "FusedMatMul": _LINEAR,
    "Gemm": _LINEAR,
    "FusedGemm": _LINEAR,
}
Counts = tuple[Counter, Counter]  # by kind: how many run in int8, and in float


def audit(bundle: Bundle, component: Component, engine: str) -> dict[str, Any]:
    """Count the layers with weights and the products of attention that an engine runs in their format, and in float.

    Where only weights are quantized, a layer counts whose weights the engine keeps so.

    Returns:
        {"int8": {"conv": n, "linear": n, "product": n} of those in the component's own format, "float": {...},
        "layers": how many are quantized, "share": the least share of them, over the kinds, that runs in the format,
        "graph": file, "ok": whether it is at least `EXPECTED`; of weights alone whether it is above 0}.

    Raises:
        UserError: for an engine that cannot be audited or cannot run here, or TensorRT without an engine file.
    """
    able, form = computing_in(component.format), FORMATS[component.format]
    if engine not in able:
        raise UserError(f"the {engine} engine does not compute in {form.name}", f"one of: {', '.join(able)}")
    if not (state := status(engine)).ok:
        raise UserError(f"the {engine} engine cannot run here: {state.detail}", state.fix)
    read = {"onnxruntime": _onnxruntime, "openvino": _openvino, "tensorrt": _tensorrt, "tensorrt-rtx": _rtx}[engine]
    graph = onnx.load(str(graph_file(bundle, component, engine)), load_external_data=False).graph
    int8, floats = read(bundle, component, graph)
    # By kind: three attentions among a hundred layers may take half of the time. (A layer that excludes begin-of-text
    # tokens is two products, of which only one reads a quantized input.)
    wanted = Counter((_quantized(graph) if form.activations else _weighted(graph)).values())
    share = min(min(int8[kind] / count, 1.0) for kind, count in wanted.items())
    if not form.activations:  # OpenVINO keeps linear weights, and turns convolutions' into float
        share = sum(min(int8[kind], count) for kind, count in wanted.items()) / sum(wanted.values())
    return {
        "int8": dict(int8),
        "float": dict(floats),
        "layers": len(component.int8["layers"]),
        "share": round(share, 4),
        "graph": component.graph_for(engine),
        "ok": share >= EXPECTED if form.activations else share > 0,
    }


def _onnxruntime(bundle: Bundle, component: Component, graph: onnx.GraphProto) -> Counts:
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="accel-audit-") as folder:
        saved = Path(folder) / "optimised.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(saved)
        # Weights go to a file of their own: a graph above protobuf's 2 GB could not be saved.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        ort.InferenceSession(
            str(graph_file(bundle, component, "onnxruntime")),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=OFF_FOR_INT8,
        )
        model = onnx.load(str(saved), load_external_data=False)
    if not FORMATS[component.format].activations:
        return _kept(model.graph)
    return _count(model.graph, _products(graph))  # nodes keep their names


def _count(graph: onnx.GraphProto, products: Collection[str] = (), int8_nodes: Collection[str] = ()) -> Counts:
    """Count layers with weights, and the given products, in int8 (by operator, or by node name) and in float."""
    constant = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # what is computed from constants alone is one: weights that are dequantized at run time
        if node.op_type in ("DequantizeLinear", "Transpose", "ReorderInput") and node.input[0] in constant:
            constant.update(node.output)
    int8, floats = Counter(), Counter()
    for node in graph.node:
        if node.name in products:
            (int8 if node.op_type in _INT8 or node.name in int8_nodes else floats)[_PRODUCT] += 1
        elif node.op_type in _INT8:
            int8[_INT8[node.op_type]] += 1
        elif node.op_type in _FLOAT and len(node.input) > 1 and node.input[1] in constant:
            (int8 if node.name in int8_nodes else floats)[_FLOAT[node.op_type]] += 1
    return int8, floats


def _weighted(graph: onnx.GraphProto) -> dict[str, str]:
    """{node: kind} of the nodes that multiply by dequantized weights."""
    stored = {tensor.name for tensor in graph.initializer}
    made = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored}
    return {node.name: _FLOAT[node.op_type] for node in graph.node if node.op_type in _FLOAT and node.input[1] in made}


def _kept(graph: onnx.GraphProto) -> Counts:
    """Count layers whose weights an optimised graph keeps quantized, and those whose it has in float."""
    kept = Counter(_weighted(graph).values())
    kept[_LINEAR] += sum(node.op_type == "MatMulNBits" for node in graph.node)
    stored = {tensor.name for tensor in graph.initializer}
    floats = (_FLOAT[node.op_type] for node in graph.node if node.op_type in _FLOAT and set(node.input[1:2]) <= stored)
    return kept, Counter(floats)


def _quantized(graph: onnx.GraphProto) -> dict[str, str]:
    """{node: kind} of the nodes that multiply a dequantized activation by dequantized weights or by another one."""
    rounded = {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    read = {node.output[0]: node.input[0] in rounded for node in graph.node if node.op_type == "DequantizeLinear"}
    return {
        node.name: _CONV if node.op_type == "Conv" else _PRODUCT if read[node.input[1]] else _LINEAR
        for node in graph.node
        if node.op_type in ("Conv", "MatMul") and read.get(node.input[0]) and node.input[1] in read
    }


def _products(graph: onnx.GraphProto) -> dict[str, str]:
    """{node: the last product of its attention} of the products of two dequantized activations.

    Scores q k^T go through a softmax into another product; weights times v are the last one themselves.
    """
    nodes = {node.name: node for node in graph.node}
    reader = {tensor: node for node in graph.node for tensor in node.input}
    found = {}
    for name in (name for name, kind in _quantized(graph).items() if kind == _PRODUCT):
        end = nodes[name]
        while (after := reader.get(end.output[0])) and after.op_type in ("Softmax", *_PAIR):
            end = after
        found[name] = after.name if end.name != name and after.op_type == "MatMul" else name
    return found


def _openvino(bundle: Bundle, component: Component, graph: onnx.GraphProto) -> Counts:
    engine = load_engine(bundle, component.name, "openvino", verify=False)
    kinds = dict.fromkeys(("Convolution", "GroupConvolution", "Deconvolution"), _CONV)  # the last: `engines.folds`
    kinds |= {"FullyConnected": _LINEAR}
    int8, floats, holding, form = Counter(), Counter(), {}, FORMATS[component.format]
    for node in engine.model.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if kind := kinds.get(_text(info, "layerType")):
            if form.activations:
                # The kernel's own precision: `runtimePrecision` is int8 for float products of int8 weights too.
                able = _text(info, "primitiveType").lower().endswith("i8")
            else:
                able = node.input(1).get_source_output().get_element_type().bitwidth <= 8
            (int8 if able else floats)[kind] += 1
        low = [port.get_source_output().get_element_type().size == 1 for port in node.inputs()]
        holding |= dict.fromkeys(_text(info, "originalLayersNames").split(","), low)
    for name, end in _products(graph).items():
        # One kernel may hold the whole attention, of queries, keys and values; out of the cache it has the last
        # product's name alone, and the precision that it states is that of the queries.
        low = holding.get(name) or holding.get(end) or [False]
        sides = low[2:3] if len(low) > 2 and name == end else low[:2]
        (int8 if all(sides) else floats)[_PRODUCT] += 1
    engine.close()
    return int8, floats


def _rtx(bundle: Bundle, component: Component, graph: onnx.GraphProto) -> Counts:
    return _tensorrt(bundle, component, graph, "tensorrt-rtx")


def _tensorrt(bundle: Bundle, component: Component, graph: onnx.GraphProto, engine: str = "tensorrt") -> Counts:
    """TensorRT fuses layers, so they are not counted; each names the nodes of the graph that it was fused from."""
    engine_file = fitting_engine_file(bundle, component.name, engines=[engine])
    if engine_file is None:
        raise UserError(
            f"{component.name} has no engine file of {engine} that fits here",
            f"accel build {bundle.path} --components {component.name} --engine {engine}",
        )
    recorded = engine_file.record["audit"]
    if not FORMATS[component.format].activations:  # what it makes of weights is not in its list of layers
        return Counter(_weighted(graph).values()), Counter()
    if recorded["heavy"].get(component.format) and not recorded.get("int8_nodes"):
        raise UserError(
            f"TensorRT's inspector does not say which layers of {component.name} run in {component.format}",
            "report this to us",
        )
    return _count(graph, _products(graph), set(recorded.get("int8_nodes", ())))


def _text(info: Any, key: str) -> str:
    value = info[key] if key in info else ""
    return value if isinstance(value, str) else str(getattr(value, "value", value))
