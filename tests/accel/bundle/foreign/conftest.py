"""Folders as other exporters write them: optimum's names of dimensions, weights in the graph or in a file beside it."""

from __future__ import annotations

import shutil

import onnx
import pytest

from accel.bundle import Bundle

DIMS = {
    "text_encoder": {"input_ids": ["batch_size", "sequence_length"]},
    "unet": {
        "sample": ["batch_size", 4, "height", "width"],
        "encoder_hidden_states": ["batch_size", "sequence_length", None],
    },
    "vae_decoder": {"latent_sample": ["batch_size", 4, "latent_height", "latent_width"]},
}


@pytest.fixture(scope="session")
def optimum_folder(smallest_bundle, tmp_path_factory):
    """The smallest bundle without anything of accel's: as optimum lays a pipeline out."""
    bundle, folder = Bundle.open(smallest_bundle), tmp_path_factory.mktemp("optimum") / "theirs"
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(bundle.path / name, folder / name)
    shutil.copy(bundle.path / "model_index.json", folder)
    for part, dims in DIMS.items():
        (folder / part).mkdir()
        shutil.copy(bundle.path / part / "config.json", folder / part)
        model = onnx.load(bundle.path / part / "model.onnx")
        for value in model.graph.input:
            for axis, size in enumerate(dims.get(value.name, ())):
                if isinstance(size, str):
                    value.type.tensor_type.shape.dim[axis].dim_param = size
        if part == "unet":
            with_whole_timesteps(model)
        how = dict(save_as_external_data=True, location="model.onnx_data", size_threshold=0) if part == "unet" else {}
        onnx.save(model, folder / part / "model.onnx", **how)
    return folder


def with_whole_timesteps(model) -> None:
    """`timestep` as int64 [1], as older exports have it."""
    given = next(value for value in model.graph.input if value.name == "timestep")
    for node in model.graph.node:
        node.input[:] = ["timestep.float" if name == "timestep" else name for name in node.input]
    axes = onnx.helper.make_node("Constant", [], ["timestep.axes"], value_ints=[0])
    squeeze = onnx.helper.make_node("Squeeze", ["timestep", "timestep.axes"], ["timestep.scalar"])
    cast = onnx.helper.make_node("Cast", ["timestep.scalar"], ["timestep.float"], to=onnx.TensorProto.FLOAT)
    for node in (cast, squeeze, axes):
        model.graph.node.insert(0, node)
    given.CopyFrom(onnx.helper.make_tensor_value_info("timestep", onnx.TensorProto.INT64, [1]))


@pytest.fixture(scope="session")
def openvino_folder(optimum_folder, tmp_path_factory):
    """The same as OpenVINO IR."""
    import openvino

    folder = tmp_path_factory.mktemp("openvino") / "theirs"
    shutil.copytree(optimum_folder, folder, ignore=shutil.ignore_patterns("*.onnx*"))
    for part in DIMS:
        model = openvino.convert_model(optimum_folder / part / "model.onnx")
        openvino.save_model(model, folder / part / "openvino_model.xml", compress_to_fp16=False)
    return folder
