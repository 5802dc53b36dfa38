"""Whole exports: what must hold for every bundle, and what must stop one."""

import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import accel
from accel.bundle import Bundle
from accel.errors import UserError
from accel.export import pipeline as export
from accel.export.graph import trace
from accel.export.graph.trace import example, safetensors_header
from accel.export.pipeline import export_pipeline
from accel.parity import relative_l2

NUMPY = {"float32": np.float32, "float16": np.float16, "int64": np.int64}


def graph_of(bundle: Path, name: str) -> onnx.ModelProto:
    return onnx.load(str(bundle / name / "model.onnx"), load_external_data=False)


def external(tensor) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def feeds_for(bundle: Path, name: str, seed=0, **sizes) -> dict[str, np.ndarray]:
    component = Bundle.open(bundle).component(name)
    sizes = {dim: limits.min for dim, limits in component.dims.items()} | sizes
    return {key: tensor.numpy() for key, tensor in example(component.inputs, sizes, seed=seed).items()}


def replaced(source: Path, to: Path, component: str, model) -> Path:
    """A copy of a pipeline with one network exchanged."""
    shutil.copytree(source, to)
    shutil.rmtree(to / component)
    model.save_pretrained(to / component)
    return to


@pytest.fixture
def source_copy(sd15, tmp_path) -> Path:
    return Path(shutil.copytree(sd15, tmp_path / "source"))


def edit_weights(source: Path, component: str, change) -> None:
    (path,) = (source / component).glob("*.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def refusal(tmp_path, source, **options) -> UserError:
    """An export that must fail, and leave nothing."""
    out = tmp_path / "bundles" / "out"
    with pytest.raises(UserError) as caught:
        export_pipeline(source, out, **({"profile": "static", "components": ("vae_decoder",)} | options))
    assert caught.value.fix
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    return caught.value


# The layout and the graphs


def test_the_layout_and_the_tensor_names_are_optimums(sd15_bundle):
    names = {
        "text_encoder": (["input_ids"], ["last_hidden_state", "pooler_output"]),
        "unet": (["sample", "timestep", "encoder_hidden_states"], ["out_sample"]),
        "vae_decoder": (["latent_sample"], ["sample"]),
        "vae_encoder": (["sample"], ["latent_parameters"]),
    }
    for component, (inputs, outputs) in names.items():
        graph = graph_of(sd15_bundle, component).graph
        assert [value.name for value in graph.input] == inputs
        assert [value.name for value in graph.output] == outputs
        assert (sd15_bundle / component / "config.json").is_file()
    for file in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        assert (sd15_bundle / file).is_file()


COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_graph_is_plain_valid_onnx_without_traces_of_where_it_was_made(sd15_bundle, name):
    onnx.checker.check_model(str(sd15_bundle / name / "model.onnx"), full_check=True)
    model = graph_of(sd15_bundle, name)
    assert {node.domain for node in model.graph.node} == {""}
    assert [opset.domain for opset in model.opset_import] == [""] and not model.functions
    things = [model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output]
    assert [thing for thing in things if thing.doc_string or len(thing.metadata_props)] == []
    content = (sd15_bundle / name / "model.onnx").read_bytes()
    for left in (b".py", b"site-packages", b"torch/", str(Path(__file__).parents[2]).encode()):
        assert left not in content


@pytest.mark.parametrize("name", COMPONENTS)
def test_initializers_are_the_state_dict_and_point_into_the_safetensors_file(sd15_bundle, name):
    weights = sd15_bundle / name / "model.safetensors"
    header, start = safetensors_header(weights)
    stored = {t.name: t for t in graph_of(sd15_bundle, name).graph.initializer if t.external_data}
    assert stored and set(stored) <= set(header)
    size = weights.stat().st_size
    for key, tensor in stored.items():
        where, entry = external(tensor), header[key]
        assert where["location"] == "model.safetensors"
        assert list(tensor.dims) == entry["shape"]
        assert int(where["offset"]) == start + entry["data_offsets"][0]
        assert int(where["length"]) == entry["data_offsets"][1] - entry["data_offsets"][0]
        assert int(where["offset"]) + int(where["length"]) <= size
    # What the graph does not need is small: nothing was copied under another name.
    unused = sum(math.prod(header[key]["shape"]) for key in set(header) - set(stored))
    assert unused <= 0.01 * sum(math.prod(entry["shape"]) for entry in header.values()) + 128
    inline = sum(len(t.raw_data) for t in graph_of(sd15_bundle, name).graph.initializer if not t.external_data)
    assert inline < 50_000


def test_a_fresh_module_has_the_names_that_the_graph_has(sd15_bundle, sd15):
    from diffusers import UNet2DConditionModel

    state = UNet2DConditionModel.from_pretrained(sd15 / "unet").state_dict()
    stored = {t.name for t in graph_of(sd15_bundle, "unet").graph.initializer if t.external_data}
    assert stored == set(state)
    with safe_open(sd15_bundle / "unet/model.safetensors", "pt") as file:
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(key), state[key]) for key in state)


@pytest.mark.parametrize("name", COMPONENTS)
def test_weights_are_stored_once(sd15_bundle, name):
    component = Bundle.open(sd15_bundle).component(name)
    weights = (sd15_bundle / name / "model.safetensors").stat().st_size
    assert weights == pytest.approx(4 * component.parameters, rel=0.2)
    graph = (sd15_bundle / name / "model.onnx").read_bytes()
    with safe_open(sd15_bundle / component.weights, "np") as file:
        largest = max((file.get_tensor(key) for key in file.keys()), key=lambda array: array.size)
    assert largest.tobytes()[:256] not in graph


def test_the_bundle_says_what_was_measured(sd15_bundle):
    for component in Bundle.open(sd15_bundle).manifest.components.values():
        assert 0 <= component.parity["relative_l2"] <= component.parity["limit"] == 1e-4
        first, second = component.parity["shapes"]
        assert all(first[key] != second[key] for key in first if key != "timestep"), "two different shapes"


# The same network


def source_output(source: Path, name: str, feeds):
    """What diffusers and transformers make of the source, without any of our code."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    tensors = {key: torch.from_numpy(np.array(value)) for key, value in feeds.items()}
    with torch.no_grad():
        if name == "unet":
            model = UNet2DConditionModel.from_pretrained(source / "unet").eval()
            tensors["added_cond_kwargs"] = {k: tensors.pop(k) for k in ("text_embeds", "time_ids") if k in tensors}
            features = [tensors.pop(k) for k in sorted(tensors) if k.startswith("adapter_features")]
            return model(**tensors, down_intrablock_additional_residuals=features or None)[0].numpy()
        if name == "text_encoder":
            return CLIPTextModel.from_pretrained(source / "text_encoder").eval()(**tensors)[0].numpy()
        vae = AutoencoderKL.from_pretrained(source / "vae").eval()
        if name == "vae_decoder":
            return vae.decode(tensors["latent_sample"])[0].numpy()
        return vae.encode(tensors["sample"]).latent_dist.parameters.numpy()


SIZES = (
    {},
    {"batch": 3, "images": 2, "latent_height": 32, "height": 128},
    {"batch": 2, "images": 3, "latent_width": 32, "width": 128},
)


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("sizes", SIZES, ids=["smallest", "tall", "wide"])
def test_eager_is_bit_equal_and_compiled_engines_equal_the_source(sd15_bundle, sd15, name, sizes):
    known = Bundle.open(sd15_bundle).component(name).dims
    feeds = feeds_for(sd15_bundle, name, seed=3, **{k: v for k, v in sizes.items() if k in known})
    truth = source_output(sd15, name, feeds)
    first = Bundle.open(sd15_bundle).component(name).outputs[0].name
    eager = accel.load_engine(sd15_bundle, name, "eager", device="cpu")(**feeds)[first]
    assert np.array_equal(eager.numpy(), truth)
    for engine in ("onnxruntime", "openvino"):
        assert relative_l2(accel.load_engine(sd15_bundle, name, engine)(**feeds)[first], truth) < 1e-5


def static_unet(source: Path, out: Path, **options) -> Path:
    export_pipeline(source, out, **({"profile": "static", "components": ("unet",)} | options))
    return out


def assert_same(bundle: Path, source: Path, name: str = "unet", limit: float = 1e-5, **sizes) -> None:
    feeds = feeds_for(bundle, name, seed=5, **sizes)
    output = Bundle.open(bundle).component(name).outputs[0].name
    found = accel.load_engine(bundle, name, "onnxruntime")(**feeds)[output]
    assert relative_l2(found, source_output(source, name, feeds)) < limit


def test_an_sdxl_unet_is_the_same_with_its_sizes_and_pooled_text(sdxl, sdxl_bundle):
    names = [spec.name for spec in Bundle.open(sdxl_bundle).component("unet").inputs]
    assert names == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert_same(sdxl_bundle, sdxl)


def test_a_unet_that_takes_the_guidance_scale_is_the_same(small, tmp_path):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(small / "unet") | {"time_cond_proj_dim": 16}
    source = replaced(small, tmp_path / "embedded", "unet", UNet2DConditionModel.from_config(config))
    bundle = static_unet(source, tmp_path / "out", opset=23)
    assert "timestep_cond" in [spec.name for spec in Bundle.open(bundle).component("unet").inputs]
    assert graph_of(bundle, "unet").opset_import[0].version == 23
    assert Bundle.open(bundle).manifest.exporter["opset"] == 23
    assert_same(bundle, source)


def test_a_unet_with_an_adapter_is_the_same_at_two_shapes(small, tmp_path):
    bundle = static_unet(small, tmp_path / "out", adapter=True, profile="batch=1-2,size=64-128")
    component = Bundle.open(bundle).component("unet")
    inner = [spec for spec in component.inputs if spec.name.startswith("adapter_features")]
    assert len(inner) == 2
    assert_same(bundle, small)
    tall = {
        f"latent_height{s}": component.dims[f"latent_height{s}"].max
        for s in ("", "_2")
        if f"latent_height{s}" in component.dims
    }
    assert_same(bundle, small, batch=2, **tall)


# float16


@pytest.fixture(scope="module")
def half(small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("half") / "out"
    export_pipeline(small, out, profile="static", precision="fp16", components=("unet", "vae_decoder"))
    return out


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_float16_is_in_the_graph_the_weights_and_the_manifest(half, name):
    component = Bundle.open(half).component(name)
    assert component.dtype == "float16"
    graph = graph_of(half, name).graph
    types = {"float16": onnx.TensorProto.FLOAT16, "float32": onnx.TensorProto.FLOAT}
    for value, spec in zip((*graph.input, *graph.output), (*component.inputs, *component.outputs), strict=True):
        assert value.type.tensor_type.elem_type == types[spec.dtype]
        assert spec.dtype == ("float32" if spec.name == "timestep" else "float16")
    for tensor in graph.initializer:
        if tensor.external_data:
            island = any(tensor.name.startswith(f"{part}.") for part in component.float32)
            assert tensor.data_type == types["float32" if island else "float16"], tensor.name
    assert (component.float32 == ("time_embedding",)) == (name == "unet")


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_float16_is_no_further_from_the_truth_than_torchs_own(half, name, small):
    parity = Bundle.open(half).component(name).parity
    assert 0 < parity["torch_relative_l2"] < 0.01
    assert parity["limit"] == 2 * parity["torch_relative_l2"]
    assert 0 < parity["relative_l2"] <= parity["limit"]
    feeds = feeds_for(half, name, seed=7)
    truth = source_output(small, name, {key: value.astype(np.float32) for key, value in feeds.items()})
    output = Bundle.open(half).component(name).outputs[0].name
    found = accel.load_engine(half, name, "onnxruntime")(**feeds)[output]
    assert found.dtype == np.float16
    assert 0 < relative_l2(found, truth) < 0.01


def test_a_network_that_is_too_loud_for_float16_stays_in_float32_and_says_why(source_copy, tmp_path):
    def louder(state):
        state["decoder.conv_in.weight"] *= 1e6

    edit_weights(source_copy, "vae", louder)
    bundle = export_pipeline(
        source_copy, tmp_path / "out", profile="static", precision="fp16", components=("vae_decoder",)
    )
    component = bundle.component("vae_decoder")
    assert component.dtype == "float32"
    assert "activations reach" in component.parity["precision_reason"]
    assert "in decoder." in component.parity["precision_reason"]
    assert "65,504" in component.parity["precision_reason"]
    assert component.parity["limit"] == 1e-4
    with safe_open(tmp_path / "out" / component.weights, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}


# What must stop an export


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(source_copy, tmp_path, precision, value):
    def damage(state):
        state["decoder.conv_out.weight"].view(-1)[3] = value

    edit_weights(source_copy, "vae", damage)
    error = refusal(tmp_path, source_copy, precision=precision)
    assert "decoder.conv_out.weight is not finite" in error.message


@pytest.fixture(scope="module")
def traced(sd15, half, tmp_path_factory) -> Callable[[str], bytes]:
    """The decoder's graph by precision, traced once: what is damaged below is the file."""

    @cache
    def get(precision: str) -> bytes:
        out = half
        if precision == "fp32":
            out = tmp_path_factory.mktemp("traced") / "out"
            export_pipeline(sd15, out, profile="static", components=("vae_decoder",))
        return (out / "vae_decoder/model.onnx").read_bytes()

    return get


def after_export(monkeypatch, graph: bytes, damage) -> None:
    """Let something go wrong between the exporter and the check."""

    def export_graph(network, dims, folder, **options):
        (folder / "model.onnx").write_bytes(graph)
        damage(folder)

    monkeypatch.setattr(trace, "export_graph", export_graph)


def change_a_weight(folder: Path) -> None:
    header, start = safetensors_header(folder / "model.safetensors")
    begin, end = header["decoder.conv_out.weight"]["data_offsets"]
    content = bytearray((folder / "model.safetensors").read_bytes())
    values = np.frombuffer(content, np.float32, (end - begin) // 4, start + begin)
    values *= 1.01
    (folder / "model.safetensors").write_bytes(content)


def on_graph(change):
    def damage(folder: Path) -> None:
        model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        change(model.graph)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    damage.__name__ = change.__name__
    return damage


def swap_two_weights(graph) -> None:
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    first = convolutions[2]
    second = next(n for n in convolutions[3:] if shapes[n.input[1]] == shapes[first.input[1]])
    first.input[1], second.input[1] = second.input[1], first.input[1]


def drop_an_activation(graph) -> None:
    node = next(node for node in graph.node if node.op_type == "Sigmoid")
    node.op_type = "Identity"


def foreign_operator(graph) -> None:
    node = next(node for node in graph.node if node.op_type == "Sigmoid")
    node.domain = "com.microsoft"


@pytest.mark.parametrize(
    ("damage", "precision"),
    [(change_a_weight, "fp32"), (on_graph(swap_two_weights), "fp32"), (on_graph(drop_an_activation), "fp16")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_graph_that_is_not_the_same_network_is_refused(sd15, traced, tmp_path, monkeypatch, damage, precision):
    after_export(monkeypatch, traced(precision), damage)
    assert "differs from torch" in refusal(tmp_path, sd15, precision=precision).message


def test_an_undamaged_graph_passes(sd15, traced, tmp_path, monkeypatch):
    """Otherwise the refusals below might have another reason."""
    after_export(monkeypatch, traced("fp32"), lambda folder: None)
    bundle = export_pipeline(sd15, tmp_path / "out", profile="static", components=("vae_decoder",))
    assert bundle.component("vae_decoder").parity["relative_l2"] < 1e-5


def test_a_graph_that_is_no_standard_onnx_is_refused(sd15, traced, tmp_path, monkeypatch):
    after_export(monkeypatch, traced("fp32"), on_graph(foreign_operator))
    out = tmp_path / "out"
    with pytest.raises((UserError, onnx.checker.ValidationError)):
        export_pipeline(sd15, out, profile="static", components=("vae_decoder",))
    assert not out.exists()


@pytest.fixture
def never_load(monkeypatch):
    """Wrong options are told before gigabytes are read."""
    monkeypatch.setattr(export.Source, "load", lambda *_: pytest.fail("weights were read"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opset": 17}, "opset 17"),
        ({"opset": 99}, "opset 99"),
        ({"precision": "fp4"}, "fp4"),
        ({"components": ("unet", "decoder")}, "decoder"),
        ({"components": ()}, "no component"),
        ({"profile": "size=102"}, "multiple"),
        ({"profile": "huge"}, "huge"),
        ({"sampler": {"name": "plms", "steps": 4, "guidance": 1}}, "plms"),
        ({"sampler": {"name": "ddim", "steps": 0, "guidance": 1}}, "invalid steps: 0"),
        ({"sampler": {"name": "ddim", "guidance": 1}}, "invalid steps: None"),
        ({"sampler": {"name": "ddim", "steps": 4, "guidance": float("nan")}}, "invalid guidance: nan"),
        ({"sampler": {"name": "ddim", "steps": 4, "guidance": -1}}, "invalid guidance: -1"),
        ({"sampler": {"name": "ddim", "steps": 4}}, "invalid guidance: None"),
        ({"sampler": {"name": "dmd2", "timesteps": [], "guidance": 0}}, "invalid timesteps: ()"),
    ],
)
def test_wrong_options_are_told_before_anything_is_loaded(sd15, tmp_path, never_load, options, words):
    assert words in refusal(tmp_path, sd15, **options).message


@pytest.mark.parametrize("content", ["[]", "{", '{"name": "dmd2"}', '{"name": ["dmd2"], "guidance": 0, "steps": 1}'])
def test_a_sampler_file_that_makes_no_sense_is_refused(source_copy, tmp_path, never_load, content):
    (source_copy / "sampler.json").write_text(content)
    refusal(tmp_path, source_copy)


def test_too_little_space_is_told_before_anything_is_loaded(sd15, tmp_path, never_load, monkeypatch):
    from accel import files

    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 999, 1))
    assert "are needed" in refusal(tmp_path, sd15).message


def test_a_disk_that_fills_up_while_weights_are_written_is_told(sd15, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("accel.export.graph.precision.save_file", full)
    assert "no space left" in refusal(tmp_path, sd15).message


# What travels along


def test_the_sources_sampler_and_companions_end_up_in_the_bundle_and_a_component_named_twice_counts_once(
    source_copy, tmp_path
):
    constants = {"name": "dmd2", "timesteps": [999, 749, 499, 249], "guidance": 0.0}
    (source_copy / "sampler.json").write_text(json.dumps(constants))
    bundle = export_pipeline(
        source_copy, tmp_path / "out", profile="static", components=("text_encoder", "text_encoder")
    )
    assert dict(bundle.manifest.sampler) == constants
    assert (tmp_path / "out/tokenizer/tokenizer_config.json").read_bytes() == (
        source_copy / "tokenizer/tokenizer_config.json"
    ).read_bytes()
    # With which diffusers draws the same.
    assert json.loads((tmp_path / "out/model_index.json").read_text())["scheduler"] == ["diffusers", "LCMScheduler"]
    theirs = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert theirs["_class_name"] == "LCMScheduler" and theirs["original_inference_steps"] == 1000
    assert bundle.manifest.source["scheduler"] == "PNDMScheduler"
    bundle.verify()


def test_what_the_caller_asks_for_goes_before_what_the_source_says(sd15_bundle):
    assert dict(Bundle.open(sd15_bundle).manifest.sampler) == {"name": "dpmpp_2m", "steps": 4, "guidance": 5}


def test_every_file_of_a_bundle_can_be_read_by_another_user(sd15_bundle):
    private = [path for path in sd15_bundle.rglob("*") if not path.stat().st_mode & 0o004]
    assert private == []


def test_a_context_the_text_encoder_does_not_have_is_refused(sd15, tmp_path):
    with pytest.raises(UserError, match="50 tokens"):
        export_pipeline(sd15, tmp_path / "out", profile="size=64,tokens=50")
    assert not (tmp_path / "out").exists()


def test_sdxl_in_fp16_keeps_time_and_size_embeddings_in_float32(sdxl_maker, stored_graphs, tmp_path):
    """torch promotes the pooled text (float16) beside the sinusoids of the sizes (float32); ONNX has to be told."""
    source = sdxl_maker(tmp_path / "source", layers_per_block=1)
    bundle = export_pipeline(source, tmp_path / "out", profile="static", precision="fp16", components=("unet",))
    unet = bundle.component("unet")
    assert unet.dtype == "float16" and set(unet.float32) == {"time_embedding", "add_embedding"}
    assert {spec.name: spec.dtype for spec in unet.inputs}["time_ids"] == "float32"
    feeds = example(unet.inputs, {dim: limit.min for dim, limit in unet.dims.items()}, seed=3)
    outputs = [
        accel.load_engine(bundle, "unet", engine=name)(**feeds)["out_sample"] for name in ("eager", "onnxruntime")
    ]
    assert relative_l2(np.asarray(outputs[1], np.float32), np.asarray(outputs[0], np.float32)) < 0.02
