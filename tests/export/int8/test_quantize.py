"""int8 bundles: what is in them, that engines really run them in int8, and where int8 is accepted."""

import contextlib
import copy
import io
import json
import shutil
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open

import accel
from accel import engines
from accel.bundle import Bundle, Component, finalize
from accel.engines.onnxruntime import OFF_FOR_INT8
from accel.errors import Notice, UserError
from accel.export.graph import check, uint8
from accel.export.graph.trace import example
from accel.export.int8 import acceptance, audit, image_parity, quantize, sensitivity, speed
from accel.export.int8.calibration import Calibration, calibration, default_prompts, read_prompts
from accel.export.int8.settings import Int8Settings
from accel.export.pipeline import export_pipeline
from accel.export.tensorrt import build as tensorrt_build
from accel.int8 import fake_quant as fake
from accel.int8 import packed, summary
from accel.int8.config import Int8Config, is_product
from accel.machine import int8_saturates, machine_name
from accel.models import networks
from accel.parity import relative_l2
from accel.providers import gpu
from accel.trt import engine_files

SAMPLER = {"name": "dmd2", "timesteps": [999, 499], "guidance": 0.0}
QUICK = dict(images=2, evaluation_images=1)
SMALL = dict(components=("vae_decoder",), **QUICK)  # what does not depend on the network is tested on the smallest


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Speed is measured in five rounds: what is tested is what becomes of the figures."""
    patch = pytest.MonkeyPatch()
    patch.setattr(speed, "SECONDS", 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        yield
    patch.undo()


@pytest.fixture(scope="module")
def floating(smallest, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("float") / "bundle"
    export_pipeline(
        smallest, out, profile="batch=1-2,size=32", sampler=SAMPLER, components=("text_encoder", "unet", "vae_decoder")
    )
    return out


@pytest.fixture(scope="module")
def int8(floating, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "bundle"
    export_pipeline(floating, out, precision="int8", int8=Int8Settings(components=("unet",), **QUICK))
    return out


@pytest.fixture(scope="module")
def attention(floating, tmp_path_factory) -> Path:
    """As `int8`, and the products of self-attention too."""
    out = tmp_path_factory.mktemp("attention") / "bundle"
    options = Int8Settings(Int8Config(level="attention"), components=("unet",), **QUICK)
    export_pipeline(floating, out, precision="int8", int8=options)
    return out


@pytest.fixture(scope="module")
def mix_only(floating, tmp_path_factory) -> Path:
    """One of the two products in int8: what a budget may leave."""
    out = tmp_path_factory.mktemp("mix") / "bundle"
    options = Int8Settings(Int8Config(level="attention", keep=("*.scores",)), components=("unet",), **QUICK)
    export_pipeline(floating, out, precision="int8", int8=options)
    return out


@pytest.fixture(params=["int8", "attention"])
def low(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def for_gpus(floating, tmp_path_factory) -> tuple[Path, str, str]:
    """A bundle with int8 and float16, made by the command line on a machine without TensorRT; and what was said."""
    from accel.cli import main

    folder = tmp_path_factory.mktemp("gpus")
    (folder / "prompts.txt").write_text("the cat\nthe dog\n")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(
            [
                "export",
                str(floating),
                str(folder / "bundle"),
                "--precision",
                "int8-fp16",
                "--calibration",
                str(folder / "prompts.txt"),
                "--calibration-images",
                "2",
                "--int8-components",
                "text_encoder,vae_decoder",
                "--int8-level",
                "conv",
                "--int8-observer",
                "max",
            ]
        )
    assert code == 0, err.getvalue()
    return folder / "bundle", out.getvalue(), err.getvalue()


def unet_of(bundle: Path):
    return Bundle.open(bundle).component("unet")


def graph_of(bundle: Path, file: str = "model.onnx") -> onnx.ModelProto:
    return onnx.load(str(bundle / "unet" / file), load_external_data=False)


def module_of(bundle: Path) -> torch.nn.Module:
    record, folder = unet_of(bundle), bundle / "unet"
    return networks.rebuild(
        "unet",
        folder / "config.json",
        folder / "model.safetensors",
        record.inputs,
        record.outputs,
        record.int8["layers"],
    )


def feeds_of(bundle: Path, seed: int = 3) -> dict[str, torch.Tensor]:
    record = unet_of(bundle)
    return example(record.inputs, {dim: limits.min for dim, limits in record.dims.items()}, seed=seed)


# -------------------------------------------------------------------------------------------------- what is in a bundle


def test_weights_are_stored_once_as_int8(int8, floating):
    record = unet_of(int8)
    layers = record.int8["layers"]
    with safe_open(int8 / "unet" / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert all(stored[f"{layer}.weight"] == "I8" for layer in layers)
    assert {name for name, dtype in stored.items() if dtype == "I8"} == {f"{layer}.weight" for layer in layers}
    weights = (int8 / "unet" / "model.safetensors").stat().st_size
    assert weights < 0.6 * (floating / "unet" / "model.safetensors").stat().st_size  # narrow: a quarter at real size
    for file in ("model.onnx", uint8.FILE):
        graph = graph_of(int8, file)
        places = {tensor.name: {e.key: e.value for e in tensor.external_data} for tensor in graph.graph.initializer}
        assert all(places[f"{layer}.weight"]["location"] == "model.safetensors" for layer in layers)
        assert (int8 / "unet" / file).stat().st_size < 1_000_000
    assert record.precision == "int8 + float32" and record.parameters == unet_of(floating).parameters


def test_the_manifest_says_how_it_was_made(int8):
    record = unet_of(int8)
    assert record.int8["calibration"]["ranges"] == "calibrated" and record.int8["calibration"]["images"] == 2
    assert record.int8["calibration"]["sampler"]["timesteps"] == [999, 499]
    assert Int8Config.from_dict(record.int8["config"]) == Int8Config()
    assert record.int8["acceptance"]["machine"] == machine_name()
    assert "to_k" in " ".join(name for name, traits in record.int8["layers"].items() if "bos" in traits)
    assert not any("conv_in" in name or "time_emb" in name for name in record.int8["layers"])


def test_the_calibration_set_is_part_of_every_key(int8, tmp_path, edit_manifest, floating):
    set_one, set_two = Calibration(("a", "b")), Calibration(("a", "c"))
    digests = {calibrated.record(SAMPLER)["digest"] for calibrated in (set_one, set_two, Calibration(("a", "b"), 1))}
    assert len(digests) == 3 and set_one.record(SAMPLER)["digest"] in digests
    assert set_one.record({**SAMPLER, "timesteps": [999]})["digest"] not in digests
    other = Path(shutil.copytree(int8, tmp_path / "other"))
    edit_manifest(other, lambda data: data["components"]["unet"]["int8"]["calibration"].update(digest="0"))
    assert Bundle.open(other).digest != Bundle.open(int8).digest
    identities = [engine_files.sources(Bundle.open(bundle), unet_of(bundle)) for bundle in (other, int8)]
    assert identities[0]["int8"]["calibration"] != identities[1]["int8"]["calibration"]
    assert engine_files.sources(Bundle.open(floating), unet_of(floating))["int8"] == {}


# ----------------------------------------------------------------------------------------------------------- the graphs


@pytest.mark.parametrize("file", ["model.onnx", uint8.FILE])
def test_every_layer_is_torchs_layer_to_1e_5(low, file):
    module = module_of(low)
    packed.set_outputs(module, file == uint8.FILE)
    layers = unet_of(low).int8["layers"]
    errors = check.layers(low / "unet" / file, module.model, feeds_of(low), list(layers))
    assert len(errors) == len(layers) > 40
    # A sum that comes out on the other side of an output's rounding is one step of 127 away: rare, and not an error.
    rounded = {name for name, traits in layers.items() if "output" in traits and file == uint8.FILE}
    assert max(error for name, error in errors.items() if name not in rounded) < 1e-5
    assert np.median([*errors.values()]) < 1e-5
    assert all(error < 0.02 for error in errors.values())


def test_unsigned_activations_are_exactly_the_signed_ones(low):
    """Rule 2: uint8 around 128 is int8 around 0."""
    model = graph_of(low)
    uint8.rewrite(model, {})
    derived = low / "unet" / "test.onnx"
    try:
        onnx.save(model, str(derived))
        onnx.checker.check_model(str(derived), full_check=True)
        feeds = feeds_of(low)
        (one,), (two,) = check.run_onnx(low / "unet" / "model.onnx", [feeds]), check.run_onnx(derived, [feeds])
    finally:
        derived.unlink()
    assert np.array_equal(one[0], two[0])
    kinds = {t.name: t.data_type for t in model.graph.initializer if not t.dims}
    zeros = {kinds[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert zeros == {onnx.TensorProto.UINT8}


def test_the_canonical_graph_is_what_tensorrt_demands(low):
    """Signed, symmetric, nothing quantized but weights, the inputs of layers with weights, and products' two sides."""
    graph = graph_of(low).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if not t.dims and not t.external_data}
    quantize = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    layers = unet_of(low).int8["layers"]
    assert len(quantize) == len(layers) + sum(is_product(name) for name in layers)
    assert all(constants[node.input[2]].dtype == np.int8 and constants[node.input[2]] == 0 for node in quantize)
    assert not any(node.input[1].endswith("output_scale") for node in quantize)


def test_rule_5_linear_weights_lie_as_they_are_multiplied(int8):
    graph = graph_of(int8).graph
    made_by = {out: node for node in graph.node for out in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in made_by]
    weights = [made_by[node.input[1]] for node in products]
    assert not any(node.op_type == "Transpose" and node.input[0].endswith(".weight") for node in weights)
    dequantized = [node for node in weights if node.op_type == "DequantizeLinear"]
    assert dequantized and all(node.attribute[0].i == 1 for node in dequantized)


def test_rule_6_attention_products_stay_float_unless_asked_for(int8, attention):
    assert audit._products(graph_of(int8, uint8.FILE).graph) == {}
    own = [name for name in unet_of(attention).int8["layers"] if is_product(name)]
    assert len(audit._products(graph_of(attention).graph)) == len(own) > 4
    graph = graph_of(int8, uint8.FILE).graph
    made_by = {out: node for node in graph.node for out in node.output}
    attention = [
        node
        for node in graph.node
        if node.op_type == "MatMul" and any(made_by.get(n) and made_by[n].op_type == "Softmax" for n in node.input)
    ]
    assert attention
    for node in attention:
        assert not any(made_by[name].op_type == "DequantizeLinear" for name in node.input if name in made_by)


# ----------------------------------------------------------------------------------------------- what engines really do


def count(graph: Path, disabled=OFF_FOR_INT8) -> dict[str, dict[str, int]]:
    """What ONNX Runtime makes of a graph."""
    import onnxruntime as ort

    saved = graph.with_name("optimised.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(saved), 4
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    found = audit._count(onnx.load(str(saved), load_external_data=False).graph)
    saved.unlink()
    return {"int8": dict(found[0]), "float": dict(found[1])}


def kinds_of(bundle: Path) -> dict[str, int]:
    layers = unet_of(bundle).int8["layers"]
    convs = sum("output" in traits for traits in layers.values())
    products = sum(map(is_product, layers))
    return {"conv": convs, "linear": len(layers) - convs - products} | ({"product": products} if products else {})


def test_rule_1_integer_convolutions_need_the_derived_file(int8):
    assert count(int8 / "unet" / uint8.FILE)["int8"] == kinds_of(int8)
    assert count(int8 / "unet" / "model.onnx")["int8"].get("conv", 0) == 0, "outputs are not quantized"


def test_rule_4_static_shapes_want_one_optimizer_off(int8):
    """MatMulAddFusion makes a float Gemm of a product and its bias, where shapes are known."""
    model = graph_of(int8, uint8.FILE)
    sizes = {"batch": 1, "latent_height": 8, "latent_width": 8}
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    static = int8 / "unet" / "static.onnx"
    try:
        onnx.save(model, str(static))
        wanted = kinds_of(int8)
        assert count(static)["int8"] == wanted
        assert count(static, disabled=[])["int8"].get("linear", 0) < wanted["linear"]
    finally:
        static.unlink()


def test_rule_3_no_signed_kernels_are_asked_for(int8):
    engine = accel.load_engine(int8, "unet", "onnxruntime")
    with pytest.raises(Exception, match="qdqisint8allowed"):
        engine.session.get_session_options().get_session_config_entry("session.qdqisint8allowed")


def test_rule_7_no_int8_on_onnxruntimes_cuda(int8, monkeypatch):
    import onnxruntime as ort

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(UserError, match="CUDA provider does not run int8"):
        accel.load_engine(int8, "unet", "onnxruntime", provider="cuda")
    monkeypatch.setattr(gpu, "trouble", lambda *args: None)
    with pytest.warns(Notice, match="does not run int8 graphs in int8.*runs on the CPU.*accel build"):
        assert accel.load_engine(int8, "unet", "onnxruntime").device == "cpu"


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_audit_counts_and_can_fail(low, engine):
    pytest.importorskip(engine)
    bundle = Bundle.open(low)
    found = audit.audit(bundle, bundle.component("unet"), engine)
    assert found["share"] == 1 and found["ok"] and sum(found["float"].values()) > 0
    assert unet_of(low).int8["audit"][engine] == found and found["int8"] == kinds_of(low)
    if engine == "onnxruntime":  # the canonical graph runs partly in float there, and that is found
        record = bundle.component("unet")
        broken = copy.copy(record)
        object.__setattr__(broken, "int8", dict(record.int8) | {"graphs": {}})
        found = audit.audit(bundle, broken, engine)
        assert not found["ok"] and found["share"] < 0.9


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_audit_tells_one_product_of_an_attention_from_the_other(mix_only, engine):
    """OpenVINO runs both in one kernel, which calls itself float where the scores are."""
    pytest.importorskip(engine)
    found = audit.audit(Bundle.open(mix_only), unet_of(mix_only), engine)
    assert found["ok"] and found["int8"] == kinds_of(mix_only) and found["int8"]["product"] > 2


def test_products_in_float_fail_the_audit_however_many_layers_there_are(attention, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(audit, "_openvino", lambda *_: (Counter(conv=999, linear=999), Counter(product=1)))
    found = audit.audit(Bundle.open(attention), unet_of(attention), "openvino")
    assert found["share"] == 0 and not found["ok"]


@pytest.mark.skipif(int8_saturates(), reason="no VNNI: random weights saturate int16; digits are compared all the same")
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_are_as_close_to_float_as_torchs_int8_is(low, floating, engine):
    """End to end int8 is chaotic, so distances to float32 are compared, not outputs."""
    pytest.importorskip(engine)
    feeds = {name: tensor.numpy() for name, tensor in feeds_of(low).items()}
    truth = accel.load_engine(floating, "unet", "eager")(**feeds)["out_sample"].numpy()
    own = accel.load_engine(low, "unet", "eager")(**feeds)["out_sample"].numpy()
    found = accel.load_engine(low, "unet", engine)(**feeds)["out_sample"]
    floor = relative_l2(own, truth)
    assert 0 < floor < 0.2
    assert relative_l2(found, truth) < 2 * floor


def test_the_whole_pipeline_runs_on_every_engine(int8, floating):
    truth = accel.load(floating, "eager")("the cat", seed=5, output_type="np").images
    for engine in ("eager", "onnxruntime", "openvino"):
        made = accel.load(int8, engine)("the cat", seed=5, output_type="np").images
        assert image_parity.compare(made, truth, 1.0).psnr > 20
        assert not np.array_equal(made, truth)


def test_float16_around_int8_has_no_casts_inside(for_gpus):
    """For GPUs: scales in float16, so that what is dequantized is float16 as well; and so is what is not int8."""
    bundle, _, _ = for_gpus
    record = Bundle.open(bundle).component("vae_decoder")
    assert record.dtype == "float16" and record.precision == "int8 + float16"
    with safe_open(bundle / "vae_decoder" / "model.safetensors", "pt") as file:
        kinds = {
            name.rpartition(".")[2]: file.get_slice(name).get_dtype()
            for name in file.keys()  # noqa: SIM118
            if name.rpartition(".")[0] in record.int8["layers"]
        }
    assert kinds == {"weight": "I8", **dict.fromkeys(("weight_scale", "input_scale", "output_scale", "bias"), "F16")}
    operators = record.parity["operators"]
    assert operators["QuantizeLinear"] == len(record.int8["layers"]) and operators.get("Cast", 0) < 10
    assert {Bundle.open(bundle).component(name).precision for name in ("unet", "text_encoder")} == {"float16"}


def test_what_has_no_layer_of_the_level_stays_float_and_that_is_said(for_gpus, floating):
    bundle, said, _ = for_gpus
    record = Bundle.open(bundle).component("text_encoder")
    assert record.precision == "float16" and record.parity["int8_tried"] == {"reason": "it has no layer of level conv"}
    assert "not int8: it has no layer of level conv" in said and said.count("not int8") == 1
    with pytest.raises(UserError, match="has a layer of level conv\n.*--int8-level all"):
        export_pipeline(
            floating,
            bundle.parent / "out",
            precision="int8",
            int8=Int8Settings(config=Int8Config(level="conv"), components=("text_encoder",), **QUICK),
        )


def test_parity_decides_where_the_engine_is_not_here_and_that_is_said(for_gpus):
    bundle, said, errors = for_gpus
    record = Bundle.open(bundle).component("vae_decoder")
    assert (
        record.int8["acceptance"]["engines"] == {} == record.int8["audit"]
        and record.int8["acceptance"]["enabled_engines"] == []
    )
    assert "only 2 calibration images" in errors and "dB from float32's" in said
    assert "speed was not measured: TensorRT" in said
    Bundle.open(bundle).verify()


@pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
def test_tensorrt_compares_int8_with_float16(tensorrt, for_gpus, floating, tmp_path):
    """With a fake of TensorRT, whose speed says nothing: engine files are built, audited, timed, kept and chosen."""
    made, _, _ = for_gpus
    folder = Path(shutil.copytree(made, tmp_path / "bundle"))
    settings = Int8Settings(Int8Config(), precision="auto")
    dtype, parity = "float16", {"psnr": 40.0, "ok": True, "budget": 20.0}

    def benchmark(faster: float) -> Component:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(speed, "FASTER", faster)
            scratch = tmp_path / f"scratch-{faster}"
            pair = speed.pair(Bundle.open(folder), Bundle.open(floating), "vae_decoder", dtype, scratch)
            speeds = speed.measure(pair, "vae_decoder", speed.engines_for(dtype))
        decision = acceptance.accept("vae_decoder", {"parity": parity} | speeds, settings)
        manifest = Bundle.open(folder).manifest
        record = acceptance.apply(decision, Bundle.open(made).component("vae_decoder"), pair.float, folder)
        finalize(folder, replace(manifest, components=dict(manifest.components) | {"vae_decoder": record}))
        acceptance.keep_engine_files(record, pair.int8, folder)
        return record

    record = benchmark(0.0)
    said, audits = record.int8["acceptance"], record.int8["audit"]
    assert said["against"] == "float16" and said["enabled_engines"] == ["tensorrt"] == list(said["engines"])
    assert said["engines"]["tensorrt"]["on"] == tensorrt._world.gpu
    assert audits["tensorrt"]["share"] == 1 and sum(audits["tensorrt"]["float"].values()) > 0
    bundle = Bundle.open(folder)
    assert engines.choose("auto", bundle.component("vae_decoder"), bundle) == "tensorrt"
    assert not any(name.startswith("engines/") for name in bundle.manifest.files)
    tensorrt._world.dtype = "Half"  # an engine file that computes in float16 is refused when it is built
    shutil.rmtree(folder / "engines")
    with pytest.raises(UserError, match="was to run in int8"):
        tensorrt_build.build(bundle, ["vae_decoder"])
    tensorrt._world.dtype = ""
    with pytest.raises(UserError, match="has no engine file of tensorrt that fits here"):
        audit.audit(bundle, record, "tensorrt")
    slower = benchmark(1e9)
    assert slower.precision == "float16" and "not faster" in slower.parity["int8_tried"]["reason"]
    assert slower.parity["precision_reason"] == record.parity["precision_reason"], "why it is float16 is another fact"
    assert not (folder / "engines").exists()


def test_precision_auto_keeps_float_where_int8_is_slower(floating, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "FASTER", 1e9)
    monkeypatch.setattr(speed, "computing_in", lambda form: ("onnxruntime",))
    bundle = export_pipeline(floating, tmp_path / "auto", precision="auto", int8=Int8Settings(**SMALL))
    assert all(record.precision == "float32" for record in bundle.manifest.components.values())
    record = bundle.component("vae_decoder")
    assert "not faster" in record.parity["int8_tried"]["reason"] and record.parity["int8_tried"]["engines"]
    bundle.verify()
    assert not (tmp_path / "auto" / "vae_decoder" / uint8.FILE).exists()
    accel.load(bundle, "onnxruntime")("the cat")


def test_the_inspection_says_what_was_measured(int8, capsys):
    from accel.cli import main

    assert main(["inspect", str(int8)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "int8:" in said and "layers run in int8" in said and "dB from float32's" in said
    record = unet_of(int8)
    bare = summary.lines(replace(record, int8=dict(record.int8) | {"audit": {}}))
    assert len(bare) > 1 and all(line.endswith(("not audited", "not choose it")) for line in bare[1:])
    assert "nan" not in " ".join(bare)


def test_the_report_of_a_benchmark_names_it(int8):
    from accel import bench

    settings = bench.BenchSettings(rounds=1, memory=False, steps=1)
    found = bench.measure(int8, [bench.parse("onnxruntime")], settings).document.as_dict()
    (note,) = [note for note in found["notes"] if note.startswith("unet is int8")]
    assert "layers run in int8" in note and "dB from float32's" in note


# ---------------------------------------------------------------------------------------------- sensitivity and budgets


class Pretend:
    """An evaluator for which every layer has a cost that adds up."""

    budget = 30.0

    def __init__(self, **costs: float):
        self.costs = costs

    def component(self, network, layers=None):
        total = sum(self.costs[layer] for layer in (self.costs if layers is None else layers))
        psnr = 100.0 if not total else -10 * np.log10(total)
        return {"psnr": psnr, "ok": psnr >= self.budget}


def test_the_budget_leaves_out_the_worst_layers_and_no_more():
    evaluator = Pretend(a=1e-5, b=2e-3, c=1e-4, d=1e-2, e=2e-4)
    costs = sensitivity.measure(evaluator, "unet", sensitivity.one_by_one(list(evaluator.costs)))
    assert [cost.name for cost in costs] == ["d", "b", "e", "c", "a"]
    assert sensitivity.layers_to_keep(evaluator, "unet", costs) == ["d", "b"]
    easy = Pretend(a=1e-5)
    assert sensitivity.layers_to_keep(easy, "unet", sensitivity.measure(easy, "unet", {"a": ["a"]})) == []
    hard = Pretend(a=1e-2)
    with pytest.raises(UserError, match="no layer can compute in int8 within 30 dB.*20.0 dB"):
        sensitivity.layers_to_keep(hard, "unet", sensitivity.measure(hard, "unet", {"a": ["a"]}))


@pytest.fixture(scope="module")
def calibrated(floating):
    """A calibrated pipeline in torch, its UNet, and an evaluator of its images."""
    settings = Int8Settings(Int8Config(level="conv"), calibration=Calibration(("the cat", "the dog")))
    pipeline = accel.load(floating, "eager")
    models = {"unet": pipeline.engines["unet"].module.model}
    assert quantize.calibrate(pipeline, models, settings) == {"unet": {}}
    return pipeline, models["unet"], image_parity.Evaluator(pipeline, models, settings.calibration.held_out(1))


def test_a_budget_is_met_and_the_table_is_written(calibrated, tmp_path):
    _, unet, evaluator = calibrated
    before = evaluator.component("unet")["psnr"]
    assert 10 < before < 90 and evaluator.component("unet", [])["psnr"] == 100
    evaluator.budget = before + 3
    layers = [name for name, _ in fake.fake_layers(unet)]
    costs = sensitivity.measure(evaluator, "unet", sensitivity.one_by_one(layers))
    kept = sensitivity.layers_to_keep(evaluator, "unet", costs)
    assert 0 < len(kept) < len(costs)
    rest = [cost.name for cost in costs if cost.name not in kept]
    assert evaluator.component("unet", rest)["psnr"] >= before + 3
    blocks = sensitivity.measure(evaluator, "unet", sensitivity.by_block(layers))
    sensitivity.write(tmp_path, costs, blocks, "a model", dict.fromkeys(kept, "sensitive"))
    table = json.loads((tmp_path / "sensitivity.json").read_text())
    errors = [row["mse"] for row in table["layers"]]
    assert errors == sorted(errors, reverse=True) and table["kept"] == sorted(kept)
    assert sum(block["layers"] for block in table["blocks"]) == len(errors) == len(costs)
    down = next(row for row in blocks if row.name == "down_blocks.0.resnets")
    assert down.psnr == evaluator.component("unet", [name for name in layers if name.startswith(down.name)])["psnr"]
    assert "| block |" in (tmp_path / "sensitivity.md").read_text()


def test_every_network_is_judged_by_the_images_that_it_changes(floating):
    """Networks before it answer as in float32, from what they said then; the text encoder is not remembered."""
    settings = Int8Settings(Int8Config(), calibration=Calibration(("the cat", "the dog", "a cat")))
    pipeline = accel.load(floating, "eager")
    names = ("unet", "text_encoder", "vae_decoder")
    models = {name: pipeline.engines[name].module.model for name in names}
    quantize.calibrate(pipeline, models, settings)
    evaluator = image_parity.Evaluator(pipeline, models, settings.calibration.held_out(3))
    for name in names:
        found = evaluator.component(name)["psnr"]
        whole = image_parity.compare(evaluator._draw({name: None}), evaluator.reference, 1.0).psnr
        assert 10 < found < 95 and found == whole
    calls = []
    models["unet"].conv_in.register_forward_hook(lambda *_: calls.append(1))
    evaluator.component("vae_decoder")
    assert not calls
    evaluator.component("text_encoder")
    assert calls


def test_a_budget_that_no_layer_meets(floating, tmp_path):
    """An error where int8 was asked for, float where it was to be tried; what was measured is kept either way."""
    config = Int8Config(level="conv", keep=("down_blocks", "up_blocks.0", "up_blocks.1.resnets"))
    options = Int8Settings(config=config, budget=99.0, components=("unet",), sensitivity=tmp_path / "costs", **QUICK)
    with pytest.raises(UserError, match="no layer can compute in int8 within 99 dB.*\n.*smaller --budget"):
        export_pipeline(floating, tmp_path / "out", precision="int8", int8=options)
    table = tmp_path / "costs" / "sensitivity.json"
    assert 0 < len(json.loads(table.read_text())["layers"]) < 10
    table.unlink()
    bundle = export_pipeline(floating, tmp_path / "out", precision="auto", int8=options)
    record = bundle.component("unet")
    assert record.precision == "float32" and not (tmp_path / "out" / "unet" / uint8.FILE).exists()
    assert "outside the parity budget of 99 dB" in record.parity["int8_tried"]["reason"] and table.exists()


def test_calibration_sees_the_deployed_steps_and_no_others(floating):
    """And the ranges are those of the images, however many times they are drawn in one observation."""
    seen = []

    class Twice(Calibration):
        def run(self, *args):
            super().run(*args)
            return super().run(*args)

    def scales(images: Calibration) -> dict[str, torch.Tensor]:
        pipeline = accel.load(floating, "eager")
        unet = pipeline.engines["unet"].module.model
        unet.register_forward_pre_hook(lambda module, args: seen.append(float(args[1])))
        quantize.calibrate(pipeline, {"unet": unet}, Int8Settings(Int8Config(level="conv"), calibration=images))
        return fake.scales(unet)

    once, calls = scales(Calibration(("the cat",))), len(seen)
    twice = scales(Twice(("the cat",)))
    assert len(seen) == 3 * calls and set(seen) == {999.0, 499.0}
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_calibration_prompts_that_are_missing_or_empty(tmp_path, floating):
    with pytest.raises(UserError, match="cannot be read: .*missing.*\n.*one prompt per line"):
        read_prompts(tmp_path / "none.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(UserError, match="no prompts in it"):
        export_pipeline(floating, tmp_path / "out", precision="int8", int8=Int8Settings(prompts=empty))
    assert not (tmp_path / "out").exists()
    lines = tmp_path / "captions.jsonl"
    lines.write_text('{"file_name": "a.png", "text": "a cat"}\n')
    assert read_prompts(lines) == ["a cat"]
    for line in ("{}", '{"text": 5}', '{"text": null}', "[]", "5", "a cat"):
        lines.write_text(f"{line}\n")
        with pytest.raises(UserError, match="no text, prompt or caption"):
            read_prompts(lines)
    with pytest.raises(UserError, match="no calibration prompts"):
        calibration([" "])
    with pytest.raises(UserError, match="invalid number of calibration images: 0"):
        calibration(["a"], 0)


def test_too_few_images_are_said_with_their_number():
    with pytest.warns(Notice, match="only 3 calibration images"):
        calibration(["a"], 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert len(calibration(["a", "b"], 32).prompts) == 32
    assert len(default_prompts("digits/tiny")) == 70 and len(default_prompts("org/model")) == 32


def test_a_recipe_that_names_no_layer(floating, tmp_path):
    with pytest.raises(UserError, match="no layer is called 'blocks'.*\n.*some of: .*conv_in"):
        export_pipeline(
            floating,
            tmp_path / "out",
            precision="int8",
            int8=Int8Settings(config=Int8Config(keep=("blocks",)), **QUICK),
        )
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_named(smallest, tmp_path):
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(smallest, tmp_path / "source"))
    (path,) = (source / "unet").glob("*.safetensors")
    state = load_file(path)
    state["conv_out.bias"][0] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="conv_out.bias is not finite"):
        export_pipeline(source, tmp_path / "out", profile="batch=1,size=32", precision="int8")
    with pytest.raises(UserError, match="calibrated on whole images"):
        export_pipeline(smallest, tmp_path / "out", precision="int8", components=("unet",))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def changed_unet(floating, tmp_path, edit_manifest):
    """The float32 bundle, its UNet's inputs as the manifest names them changed."""

    def change(edit) -> Path:
        bundle = Path(shutil.copytree(floating, tmp_path / "changed", dirs_exist_ok=True))
        edit_manifest(bundle, lambda data: edit(data["components"]["unet"]["inputs"]))
        return bundle

    return change


def test_unets_that_take_images_are_refused_before_anything_is_drawn(changed_unet, tmp_path):
    control = {"name": "mid_residual", "dtype": "float32", "shape": ["batch", 16, 4, 4]}
    bundle = changed_unet(lambda inputs: inputs.append(control))
    with pytest.raises(
        UserError, match="cannot be quantized: calibration has no control.*\n.*--int8-components text_enc"
    ):
        export_pipeline(bundle, tmp_path / "out", precision="int8", int8=Int8Settings(**QUICK))
    bundle = changed_unet(lambda inputs: inputs[0].update(shape=["batch", 9, "latent_height", "latent_width"]))
    with pytest.raises(UserError, match="inpainting model cannot be quantized"):
        export_pipeline(bundle, tmp_path / "out", precision="int8", int8=Int8Settings(**QUICK))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def refused(capsys):
    """Run `accel export` with arguments that are wrong: the one sentence and its fix."""
    from accel.cli import main

    def call(*args) -> str:
        assert main(["export", *map(str, args)]) in (1, 2)
        err = capsys.readouterr().err
        assert err.count("error:") == 1 == err.count("fix:") and "Traceback" not in err, err
        return err

    return call


@pytest.mark.parametrize(
    "option",
    [
        "--lora=a",
        "--unet=a",
        "--vae=a",
        "--adapter",
        "--adapter=a",
        "--controlnet=a",
        "--base=a",
        "--variant=fp16",
        "--sampler=ddim",
        "--steps=4",
        "--guidance=0",
        "--profile=native",
        "--opset=20",
        "--components=unet",
    ],
)
def test_a_bundle_is_quantized_as_it_is(floating, tmp_path, refused, option):
    """Nothing that was asked for is dropped in silence, the defaults written out included."""
    err = refused(floating, tmp_path / "out", "--precision", "int8", option)
    assert f"{floating} is quantized as it is; {option.partition('=')[0]} cannot be changed" in err
    assert list(tmp_path.iterdir()) == []


def test_options_of_int8_want_int8(floating, tmp_path, refused):
    for option in ("--int8-level=conv", "--budget=30", "--calibration=a", "--calibration-images=32", "--smooth=0"):
        err = refused(floating, tmp_path / "out", "--precision", "fp16", option)
        assert f"{option.partition('=')[0]} is for int8" in err and "--precision int8" in err


def test_wrong_options_are_said_before_the_pipeline_is_exported(smallest, tmp_path, monkeypatch, refused):
    monkeypatch.setattr("accel.export.pipeline._export_component", lambda *_: pytest.fail("this may take an hour"))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for words, *option in (
        ("invalid number of calibration images: 0", "--calibration-images=0"),
        ("no prompts in it", "--calibration", empty),
        ("cannot be read", "--calibration", tmp_path / "none.txt"),
        ("budget: -5 dB", "--budget=-5"),
        ("--int8-level 'convs' is not known", "--int8-level=convs"),
        ("alpha: 1.5", "--smooth=1.5"),
        ("no component is named", "--int8-components="),
        ("--int8-observer 'mean' is not known", "--int8-observer=mean"),
        (f"{empty} is a file", "--sensitivity", empty),
        (f"{empty} is a file", "--sensitivity", empty / "costs"),
        ("no layer is called 'up_block'", "--int8-keep=up_block"),
        ("quantizes no layer", "--int8-keep=*", "--int8-components=unet"),
    ):
        assert words in refused(smallest, tmp_path / "out", "--precision", "int8", *option)
    assert list(tmp_path.iterdir()) == [empty]
    theirs = tmp_path / ".out.float" / "file"  # where the float32 bundle is to lie meanwhile
    theirs.parent.mkdir()
    theirs.write_text("precious")
    assert "not something accel wrote" in refused(smallest, tmp_path / "out", "--precision", "int8")
    assert theirs.read_text() == "precious"


def test_options_that_cannot_be(floating, int8, tmp_path):
    with pytest.raises(UserError, match="parity budget: 0 dB"):
        export_pipeline(floating, tmp_path / "out", precision="int8", int8=Int8Settings(budget=0.0))
    with pytest.raises(UserError, match="unet is not float32 but int8 [+] float32"):
        export_pipeline(int8, tmp_path / "out", precision="int8", int8=Int8Settings(**QUICK))
    with pytest.raises(UserError, match="is quantized as it is; profile, sampler cannot be changed"):
        export_pipeline(floating, tmp_path / "out", precision="int8", sampler=SAMPLER, profile="static")
    with pytest.raises(UserError, match="'tokenizer' cannot be quantized"):
        export_pipeline(floating, tmp_path / "out", precision="int8", int8=Int8Settings(components=("tokenizer",)))
    for images in (dict(adapter=True), dict(controlnet="anywhere")):
        with pytest.raises(UserError, match="ControlNet cannot be quantized: calibration has no control images"):
            export_pipeline(floating, tmp_path / "out", precision="int8", **images)
    with pytest.raises(UserError, match="unknown precision 'int4'\n.*int8"):
        export_pipeline(floating, tmp_path / "out", precision="int4")
    with pytest.raises(UserError, match="exists already"):
        export_pipeline(floating, int8, precision="int8")
