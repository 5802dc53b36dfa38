"""Bundles in fp8 and with quantized weights alone: what is in them, and what torch and each engine make of them."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open

from accel import engines
from accel.bundle import Bundle
from accel.bundle.graph_file import graph
from accel.engines.base import to_numpy
from accel.errors import Notice, UserError
from accel.export.graph import check
from accel.export.graph.trace import example
from accel.export.int8 import audit, speed
from accel.export.int8.settings import Int8Settings
from accel.export.pipeline import export_pipeline
from accel.export.single_graph import export as single_graph
from accel.int8 import summary
from accel.int8.config import Int8Config
from accel.int8.formats import FORMATS, of_layer
from accel.models import networks
from accel.parity import psnr, relative_l2

PRECISIONS = ("fp8", "int8-weight-only", "int4-weight-only")


@pytest.fixture(scope="module")
def bundles(smallest_bundle, tmp_path_factory) -> dict[str, Bundle]:
    patch = pytest.MonkeyPatch()
    patch.setattr(speed, "SECONDS", 0.0)  # five rounds
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        for name in PRECISIONS:
            config = Int8Config(block=32) if name == "int4-weight-only" else None
            settings = Int8Settings(config, components=("unet",), images=2, evaluation_images=1)
            out = tmp_path_factory.mktemp(name) / "bundle"
            found[name] = export_pipeline(smallest_bundle, out, precision=name, int8=settings)
    patch.undo()
    return found


@pytest.fixture(params=PRECISIONS)
def bundle(request, bundles) -> Bundle:
    return bundles[request.param]


def feeds_of(bundle: Bundle, seed: int = 3) -> dict[str, torch.Tensor]:
    unet = bundle.component("unet")
    return example(unet.inputs, {name: limits.min for name, limits in unet.dims.items()}, seed=seed)


def output(bundle: Bundle, engine: str) -> np.ndarray:
    feeds = {name: value.numpy() for name, value in feeds_of(bundle).items()}
    with engines.load_engine(bundle, "unet", engine) as unet:
        return to_numpy(unet(**feeds)["out_sample"]).astype(np.float32)


def test_weights_are_stored_once_in_their_format(bundle, smallest_bundle):
    unet, form = bundle.component("unet"), FORMATS[bundle.manifest.precision]
    layers = {name: of_layer(own) for name, own in unet.int8["layers"].items()}
    dtypes = {"int8": "I8", "float8_e4m3fn": "F8_E4M3", "uint8": "U8"}
    with safe_open(bundle.file(unet.weights), "pt") as file:
        for name, (own, block) in layers.items():
            assert file.get_slice(f"{name}.weight").get_dtype() == dtypes[own.stored]
            assert bool(block) == own.blocked
    tensors = {tensor.name: tensor for tensor in graph(bundle, unet).graph.initializer}
    kinds = {8: {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN}, 4: {onnx.TensorProto.INT4}}
    assert all(tensors[f"{name}.weight"].data_type in kinds[own.bits] for name, (own, _) in layers.items())
    assert any(own is form for own, _ in layers.values())
    assert unet.format == form.name and unet.precision == f"{form.name} + {unet.dtype}"
    model = graph(bundle, unet)
    assert model.opset_import[0].version >= form.opset
    assert ("QuantizeLinear" in {node.op_type for node in model.graph.node}) == form.activations
    assert unet.parameters == Bundle.open(smallest_bundle).component("unet").parameters
    assert form.name in summary.lines(unet)[0]


def test_every_layer_of_the_graph_is_torchs(bundle):
    unet = bundle.component("unet")
    if not FORMATS[unet.format].activations:
        return  # rounded weights are compared end to end, to 1e-4, by the export itself
    module = networks.rebuild(
        "unet",
        bundle.file(f"{unet.folder}/config.json"),
        bundle.file(unet.weights),
        unet.inputs,
        unet.outputs,
        unet.int8["layers"],
    )
    feeds = {spec.name: feeds_of(bundle)[spec.name] for spec in unet.inputs}
    networks.keep_float32(module.model, unet.float32)
    errors = check.layers(bundle.file(unet.graph), module.model, feeds, list(unet.int8["layers"]))
    assert len(errors) == len(unet.int8["layers"])
    # The rest is float16, whose sums differ by their order.
    assert max(errors.values()) < 2e-3 and np.median(list(errors.values())) < 1e-3


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_compute_what_torch_does(bundle, engine):
    pytest.importorskip(engine)
    reference, found = output(bundle, "eager"), output(bundle, engine)
    if bundle.manifest.precision != "fp8":
        assert relative_l2(found, reference) < 1e-4
    else:  # what differs by 1e-4 rounds to the other side somewhere: the distance is of fp8's own size
        assert relative_l2(found, reference) < 1.2 * bundle.component("unet").parity["torch_relative_l2"]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_weights_stay_as_they_are_stored(bundles, engine):
    pytest.importorskip(engine)
    for name in ("int8-weight-only", "int4-weight-only"):
        unet = bundles[name].component("unet")
        found = audit.audit(bundles[name], unet, engine)
        linear = sum(".attn" in layer or ".ff." in layer for layer in unet.int8["layers"])
        assert found["ok"] and found["int8"]["linear"] >= linear > 10
        if engine == "onnxruntime":
            assert found["share"] == 1 and found["int8"]["conv"] > 2
        else:  # it makes float weights of convolutions', as it loads
            assert 0.3 < found["share"] < 1 and not found["int8"].get("conv")


def test_auto_takes_an_engine_that_keeps_weights_whether_it_is_faster_or_not(bundles):
    unet = bundles["int4-weight-only"].component("unet")
    assert set(unet.int8["acceptance"]["enabled_engines"]) == set(unet.int8["acceptance"]["engines"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert engines.choose("auto", unet, bundles["int4-weight-only"]) in ("onnxruntime", "openvino")


def test_auto_says_that_nothing_here_multiplies_fp8(bundles):
    bundle = bundles["fp8"]
    with pytest.warns(Notice, match=r"no engine that computes fp8 of unet can run here, so onnxruntime rounds.*8\.9"):
        assert engines.choose("auto", bundle.component("unet"), bundle) == "onnxruntime"
    with pytest.raises(UserError, match="does not compute in fp8"):
        audit.audit(bundle, bundle.component("unet"), "onnxruntime")


@pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
def test_a_gpu_without_fp8_is_refused_before_the_build(bundles, tensorrt, fakes, monkeypatch):
    from accel.export.tensorrt.build import build

    monkeypatch.setattr(fakes("cuda").Cuda, "capability", "8.6")
    with pytest.raises(UserError, match=r"unet is fp8, which sm86 cannot compute: it takes compute capability 8\.9"):
        build(bundles["fp8"], ["unet"])


def test_a_format_is_not_written_below_its_opset(bundles, smallest_bundle):
    assert Bundle.open(smallest_bundle).manifest.exporter["opset"] == 20
    unet = bundles["int4-weight-only"].component("unet")
    assert graph(bundles["int4-weight-only"], unet).opset_import[0].version == 21


def test_a_lora_at_run_time_is_refused_with_the_way_that_works(bundles):
    from accel.models.lora.for_bundle import Weights, own

    for name in ("fp8", "int4-weight-only"):
        unet = bundles[name].component("unet")
        layer = next(layer for layer, own in unet.int8["layers"].items() if of_layer(own)[0].name == name)
        weights = Weights(own(bundles[name], unet), unet)
        with pytest.raises(UserError, match=f"stored in {name}, which takes no LoRA"):
            weights.value(f"{layer}.weight")


@pytest.mark.parametrize(
    ("precision", "option", "said"),
    [
        ("int8-weight-only", ["--smooth", "0.5"], "calibrates nothing"),
        ("int4-weight-only", ["--int8-observer", "max"], "calibrates nothing"),
        ("fp8", ["--weight-block", "32"], "has no blocks"),
        ("int4-weight-only", ["--opset", "20"], "opset 20 has no int4-weight-only"),
        ("fp8", ["--opset", "18"], "opset 18 has no fp8"),
        ("fp8", ["--engine", "tensorrt-rtx", "--targets", "sm86,sm89"], "which sm86 cannot compute"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(precision, option, said, tmp_path: Path, capsys):
    from accel.cli import main
    from accel.trt import library

    if "--engine" in option and library.installed("tensorrt-rtx") is None:
        pytest.skip("TensorRT-RTX is not installed")
    assert main(["export", "digits/4step", str(tmp_path / "out"), "--precision", precision, *option]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_one_graph_draws_with_quantized_weights(bundles, tmp_path):
    openvino = pytest.importorskip("openvino")
    record = single_graph.write(bundles["int8-weight-only"], tmp_path / "graph", size=True)
    assert record["parity"]["psnr"] is None or record["parity"]["psnr"] > 40
    model = onnx.load(tmp_path / "graph" / "model.onnx", load_external_data=False)
    (loop,) = [node for node in model.graph.node if node.op_type == "Loop"]
    outside, inside = ({node.op_type for node in nodes} for nodes in (model.graph.node, loop.attribute[0].g.node))
    assert "DequantizeLinear" in outside - inside, "ONNX Runtime does not find weights of a body that it lays out anew"
    ids = np.full((1, 77), 5, np.int64)
    given = {"input_ids": ids, "negative_input_ids": ids, "seed": np.array([3], np.int32)}
    given |= {name: np.array([side], np.int32) for name, side in (("height", 32), ("width", 64))}
    ours = single_graph.onnxruntime_session(str(tmp_path / "graph" / "model.onnx")).run(None, given)[0]
    compiled = openvino.Core().compile_model(tmp_path / "graph/model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert psnr(compiled(given)[0].astype(np.float32), ours.astype(np.float32), 255.0) > 40


def test_one_graph_of_networks_of_two_opsets_is_refused(bundles, tmp_path):
    """Weights in int4 need opset 21, and a decoder that stays float32 has 20."""
    with pytest.raises(UserError, match="vae_decoder has opset 20, others 21") as caught:
        single_graph.write(bundles["int4-weight-only"], tmp_path / "graph")
    assert "--opset" in caught.value.fix and not (tmp_path / "graph").exists()


def test_one_graph_of_fp8_is_refused_before_anything_is_written(bundles, tmp_path):
    with pytest.raises(UserError, match="unet of .+ is fp8, and no engine draws with such a graph") as caught:
        single_graph.write(bundles["fp8"], tmp_path / "graph")
    assert "int8-weight-only" in caught.value.fix and not (tmp_path / "graph").exists()
