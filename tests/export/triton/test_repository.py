"""Model repositories for Triton: each config.pbtxt is parsed by the published protobuf, compared with the graph."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from accel.bundle import Bundle
from accel.bundle.row_timesteps import with_row_timesteps
from accel.cli import main
from accel.errors import UserError
from accel.export.triton.repository import Serving, write
from accel.trt import engine_files

text_format = pytest.importorskip("google.protobuf.text_format")
# The package's own __init__ wants gRPC, which the messages do not.
model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")

NAMES = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
ONNX_TYPES = {1: "TYPE_FP32", 10: "TYPE_FP16", 7: "TYPE_INT64", 6: "TYPE_INT32"}


def parsed(out, name):
    return text_format.Parse((out / name / "config.pbtxt").read_text(), model_config.ModelConfig())


@pytest.fixture(scope="module")
def repository(sd15_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton") / "repo"
    assert write(Bundle.open(sd15_bundle), out, Serving(instances=2, kind="cpu")) == (
        f"tritonserver --model-repository {out}"
    )
    return out


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_types_are_the_graphs(repository, name):
    config = parsed(repository, name)
    assert config.name == name and config.backend == "onnxruntime"
    assert config.default_model_filename == "model.onnx" and (repository / name / "1" / "model.onnx").is_file()
    graph = onnx.load(repository / name / "1" / "model.onnx", load_external_data=False).graph
    for ours, theirs in ((config.input, graph.input), (config.output, graph.output)):
        assert [t.name for t in ours] == [v.name for v in theirs]
        for tensor, value in zip(ours, theirs, strict=True):
            kind = model_config.DataType.Name(tensor.data_type)
            assert kind == ONNX_TYPES[value.type.tensor_type.elem_type]
            sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
            if config.max_batch_size:
                assert sizes.pop(0) == -1
            if not sizes:
                assert list(tensor.dims) == [1] and tensor.HasField("reshape") and list(tensor.reshape.shape) == []
            else:
                assert list(tensor.dims) == sizes


def test_requests_of_several_clients_share_a_batch(repository):
    for name in NAMES:
        config = parsed(repository, name)
        largest = 8 if name == "unet" else 4  # guidance doubles the UNet's
        assert config.max_batch_size == largest and largest in config.dynamic_batching.preferred_batch_size
        assert config.dynamic_batching.max_queue_delay_microseconds == 2000
        (group,) = config.instance_group
        assert group.count == 2 and group.kind == model_config.ModelInstanceGroup.KIND_CPU


def test_rows_at_different_steps_compute_what_they_compute_alone(repository, sd15_bundle):
    """Two clients in one batch of the served UNet, each alone on the bundle's own."""
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 4, 16, 16), np.float32)
    text = rng.standard_normal((2, 77, 32), np.float32)
    times = np.array([999, 3.5], np.float32)
    served = onnxruntime.InferenceSession(repository / "unet" / "1" / "model.onnx")
    (together,) = served.run(None, {"sample": sample, "timestep": times, "encoder_hidden_states": text})
    own = onnxruntime.InferenceSession(sd15_bundle / "unet" / "model.onnx")
    for row in range(2):
        feeds = {"sample": sample[[row]], "timestep": times[row, ...], "encoder_hidden_states": text[[row]]}
        assert np.abs(own.run(None, feeds)[0] - together[row]).max() < 1e-5
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_a_graph_that_uses_its_timestep_otherwise_stays_as_it_is():
    value = helper.make_tensor_value_info
    timestep, out = value("timestep", onnx.TensorProto.FLOAT, []), value("y", onnx.TensorProto.FLOAT, None)
    for nodes in (
        [],
        [helper.make_node("Sin", ["timestep"], ["y"])],
        [helper.make_node("Unsqueeze", ["timestep", "axes"], ["y"])],
    ):
        assert with_row_timesteps(helper.make_model(helper.make_graph(nodes, "g", [timestep], [out]))) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_warm_up_is_a_call_that_the_graph_takes(repository, name):
    config = parsed(repository, name)
    (warmup,) = config.model_warmup
    assert set(warmup.inputs) == {t.name for t in config.input}
    session = onnxruntime.InferenceSession(repository / name / "1" / "model.onnx")
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feeds = {}
    for value in session.get_inputs():
        given = warmup.inputs[value.name]
        declared = next(t for t in config.input if t.name == value.name)
        shape = list(declared.reshape.shape) if declared.HasField("reshape") else list(given.dims)
        feeds[value.name] = np.zeros([warmup.batch_size, *shape], kinds[value.type])
        assert given.zero_data
    session.run(None, feeds)


def test_engine_files_for_the_tensorrt_backend(bundle_copy, tensorrt, tmp_path):
    from accel.export.tensorrt.build import build

    bundle, out = Bundle.open(bundle_copy), tmp_path / "repo"
    with pytest.raises(UserError, match="no TensorRT engine file of text_encoder"):
        write(bundle, out, Serving("tensorrt"))
    assert not out.exists()
    build(bundle, profiles=["batch=1-2,size=64"])
    tensorrt._world.gpu = "no GPU here"  # the server has its own
    assert write(bundle, out, Serving("tensorrt")) == f"tritonserver --model-repository {out}"
    config = parsed(out, "vae_decoder")
    assert config.backend == "tensorrt" and config.max_batch_size == 2
    assert list(config.instance_group[0].profile) == ["0"]
    (file,) = engine_files.find(bundle, "vae_decoder")
    assert (out / "vae_decoder/1/model.plan").read_bytes() == file.path.read_bytes()
    assert list(config.model_warmup[0].inputs["latent_sample"].dims) == [4, 16, 16]
    unet = parsed(out, "unet")  # an engine file has one timestep for the whole batch
    assert unet.max_batch_size == 0 and not unet.HasField("dynamic_batching")
    (timestep,) = (tensor for tensor in unet.input if tensor.name == "timestep")
    assert list(timestep.dims) == [1] and list(timestep.reshape.shape) == []


@pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
def test_engine_files_that_triton_cannot_load(bundle_copy, edit_manifest, tensorrt, tmp_path):
    from accel.export.tensorrt.build import BuildOptions, build

    edit_manifest(
        bundle_copy,
        lambda data: data.update(
            components={name: c for name, c in data["components"].items() if name == "text_encoder"}
        ),
    )
    bundle = Bundle.open(bundle_copy)
    build(bundle, options=BuildOptions(strip_plan=True))
    with pytest.raises(UserError, match="without weights .*does not refit") as caught:
        write(bundle, tmp_path / "repo", Serving("tensorrt"))
    assert caught.value.fix == f"accel build {bundle.path} --components text_encoder"
    build(bundle, options=BuildOptions(version_compatible=True))
    command = write(bundle, tmp_path / "repo", Serving("tensorrt"))
    assert command.endswith("repo --backend-config=tensorrt,version-compatible=true")
    (file,) = (f for f in engine_files.find(bundle) if f.identity["options"]["version_compatible"])
    file.path.write_bytes(file.path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="the file was changed after it was built .*and 1 more"):
        write(bundle, tmp_path / "repo", Serving("tensorrt"), overwrite=True)


@pytest.mark.parametrize(
    "serving", [Serving("pytorch"), Serving(instances=0), Serving("tensorrt", kind="cpu"), Serving(kind="tpu")]
)
def test_invalid_options_are_refused(sd15_bundle, tmp_path, serving):
    with pytest.raises(UserError):
        write(Bundle.open(sd15_bundle), tmp_path / "repo", serving)


def test_the_command_line(sd15_bundle, tmp_path, capsys):
    command = ["export", str(sd15_bundle), str(tmp_path / "repo"), "--target", "triton-server", "--kind", "cpu"]
    assert main(command) == 0 and "tritonserver --model-repository" in capsys.readouterr().out
    assert main(command) == 1 and "exists already" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "onnxruntime"
    assert json.loads((tmp_path / "repo/accel.json").read_text())["schema"] == 1


@pytest.mark.parametrize("option", [["--precision", "int8"], ["--lora", "a.safetensors"], ["--budget", "30"]])
def test_a_bundle_is_served_as_it_is(sd15_bundle, tmp_path, capsys, option):
    command = ["export", str(sd15_bundle), str(tmp_path / "out"), "--target", "triton-server", *option]
    assert main(command) == 1
    assert f"{option[0]} cannot be changed any more" in capsys.readouterr().err and not (tmp_path / "out").exists()
