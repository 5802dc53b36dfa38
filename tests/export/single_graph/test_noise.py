"""The noise as nodes: the same words on every engine, and numbers that differ in the last bits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from accel.export.single_graph import noise
from accel.export.single_graph.nodes import Nodes
from accel.sampling import counter_noise
from accel.trt import library

# Small, large, at the borders of 16 and 24 bits, and the largest that an int32 holds.
SEEDS = np.array([0, 7, 65535, 65536, 196607, 2**24 + 1, 123456789, 2**31 - 1], np.int32)
DRAWS, COUNT = [0, 1, 3], 4 * 8 * 8


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("noise") / "noise.onnx"
    made = noise.model(DRAWS, COUNT)
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, path)
    return path


@pytest.fixture(scope="module")
def expected() -> tuple[np.ndarray, np.ndarray]:
    """Words uint32 [seeds, 2, positions] and numbers float32 [seeds, positions]."""
    counter = np.zeros((4, len(DRAWS) * COUNT), np.uint32)
    counter[0], counter[2] = np.repeat(DRAWS, COUNT), np.tile(np.arange(COUNT), len(DRAWS))
    words = np.stack([counter_noise.words(counter, (int(seed), 0))[:2] for seed in SEEDS])
    numbers = [counter_noise.normal(SEEDS.tolist(), draw, (COUNT,)) for draw in DRAWS]
    return words, np.concatenate(numbers, axis=1)


def check(outputs: list[np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    words, numbers = expected
    for i, halves in enumerate(outputs[:2]):
        whole = halves[:, 0].astype(np.int64) + halves[:, 1].astype(np.int64) * 65536
        assert np.array_equal(whole, words[:, i])
    assert np.abs(outputs[2] - numbers).max() <= 1e-6


def test_onnxruntime_computes_the_same_words(graph, expected):
    import onnxruntime

    check(onnxruntime.InferenceSession(graph).run(None, {"seed": SEEDS}), expected)


def test_openvino_computes_the_same_words(graph, expected):
    openvino = pytest.importorskip("openvino")
    check(list(openvino.Core().compile_model(graph, "CPU")({"seed": SEEDS}).values()), expected)


def test_onnxs_reference_computes_the_same_words(graph, expected):
    from onnx.reference import ReferenceEvaluator

    check(ReferenceEvaluator(str(graph)).run(None, {"seed": SEEDS}), expected)


@pytest.mark.skipif(library.installed("tensorrt-rtx") is None, reason="TensorRT-RTX is not installed")
def test_tensorrt_rtx_takes_every_node(graph):
    job = {"engine": "tensorrt-rtx", "name": "noise", "graph": str(graph), "what": "parse"}
    code = "import json, sys; from accel.export.tensorrt.compiler import Job, compile_graph\n"
    code += "print(json.dumps(compile_graph(Job(**json.loads(sys.argv[1])), lambda *_: None).problems))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(job)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_no_number_on_the_way_needs_more_than_a_float32s_24_bits(graph):
    """So an engine that computes int32 in float32 computes the same. Only a seed itself may be larger."""
    model = onnx.load(graph)
    del model.graph.output[:]
    integers = [
        node.output[0] for node in model.graph.node if node.op_type in ("Mul", "ReduceSum", "Add", "Sub", "Div")
    ]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in integers)
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [output.name for output in session.get_outputs() if "int32" in output.type]
    found = session.run(names, {"seed": SEEDS[:4]})
    assert len(names) > 200
    assert max(int(np.abs(value).max()) for value in found) < 2**24


def test_nodes_share_equal_constants():
    nodes = Nodes("test")
    first, second = nodes.op("Add", "a", np.float32(2)[None]), nodes.op("Mul", "a", np.float32(2)[None])
    assert first != second and len(nodes.constants) == 1


def test_node_computes_the_same_words(graph, expected, tmp_path):
    runtime = Path(__file__).parents[3] / "examples" / "single_graph"
    if shutil.which("node") is None or not (runtime / "node_modules").is_dir():
        pytest.skip("no Node.js, or not yet: npm install --ignore-scripts --prefix examples/single_graph")
    script = tmp_path / "run.mjs"
    script.write_text(
        f"""import {{ createRequire }} from "node:module";
const ort = createRequire("{runtime}/package.json")("onnxruntime-node");
const session = await ort.InferenceSession.create("{graph}");
const out = await session.run({{seed: new ort.Tensor("int32", Int32Array.from({SEEDS.tolist()}), [{len(SEEDS)}])}});
console.log(JSON.stringify(["first", "second", "noise"].map((name) => [...out[name].data])));"""
    )
    done = subprocess.run([shutil.which("node"), script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, numbers = json.loads(done.stdout)
    shape = (len(SEEDS), len(DRAWS) * COUNT)
    halves = (len(SEEDS), 2, len(DRAWS) * COUNT)
    check(
        [np.array(first).reshape(halves), np.array(second).reshape(halves), np.array(numbers).reshape(shape)], expected
    )
