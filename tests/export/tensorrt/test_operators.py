"""What TensorRT's published operator matrix says of a graph."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from accel.bundle import Bundle
from accel.cli import main
from accel.export.tensorrt.operators import MATRIX, check


def graph(*nodes, dtype=TensorProto.FLOAT, initializers=(), opset=20, domains=()):
    x = helper.make_tensor_value_info("x", dtype, [1, 4, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)
    made = helper.make_graph(list(nodes), "g", [x], [y], list(initializers))
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(made, opset_imports=imports)


def const(name, value):
    return numpy_helper.from_array(np.asarray(value), name)


def test_every_graph_of_a_bundle_passes(sd15_bundle):
    for component in Bundle.open(sd15_bundle).manifest.components.values():
        assert check(sd15_bundle / component.graph) == []


def exported(network, folder, dtype="float32", opset=20):
    """The graph of a network, traced as an export does it."""
    from accel.bundle.shape_profiles import Profile, Range
    from accel.export.graph import precision
    from accel.export.graph import trace as tracing
    from accel.models import networks

    side = Range(64, 64, 128)
    dims = Profile("p", Range(1, 1, 2), side, side).dims(vae_scale=8, latent_multiple=2, guidance=False)
    folder.mkdir()
    networks.save_config(network, folder)
    inputs, outputs = (precision.with_dtype(specs, dtype) for specs in (network.inputs, network.outputs))
    precision.save_weights(network.module.model, folder / tracing.WEIGHTS, precision.DtypePolicy(dtype))
    module = networks.rebuild(network.kind, folder / "config.json", folder / tracing.WEIGHTS, inputs, outputs)
    network = networks.Network(network.name, network.kind, module, inputs, outputs)
    tracing.export_graph(network, dims, folder, opset=opset)
    return folder / tracing.GRAPH


def small_unet(**config):
    """Two levels, the attention of each family; an operator does not depend on how often it occurs."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        **config,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_mask_of_a_text_encoder_is_added_to_the_scores(tmp_path, dtype):
    """TensorRT's Attention takes no yes and no; large scores of both signs must neither overflow nor shine through."""
    import onnxruntime
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from accel.models import networks

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=77,
        eos_token_id=39,
    )
    model = CLIPTextModel(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                tensor.normal_(std=6)
    model.to(getattr(torch, dtype)).float()
    ids = torch.randint(0, 40, (2, 77))
    with torch.no_grad():
        wanted = model(ids).last_hidden_state.numpy()
    path = exported(networks.text_encoder(model), tmp_path / "out", dtype, opset=23)
    attention = [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type == "Attention"]
    assert check(path) == [] and len(attention) == 1 and attention[0].input[3]
    session = onnxruntime.InferenceSession(path)
    found = session.run(["last_hidden_state"], {"input_ids": ids.numpy()})[0].astype(np.float32)
    assert np.abs(found - wanted).max() < (1e-4 if dtype == "float32" else 0.05)
    ids[:, 40:] = 0  # what comes later says nothing about what came before
    later = session.run(["last_hidden_state"], {"input_ids": ids.numpy()})[0].astype(np.float32)
    assert np.array_equal(found[:, :40], later[:, :40]) and not np.array_equal(found[:, 40:], later[:, 40:])


@pytest.mark.slow
def test_unets_of_sd2_and_of_sdxl_with_control_pass(tmp_path):
    from accel.models import networks

    sdxl = small_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
        use_linear_projection=True,
        transformer_layers_per_block=(2, 1),
    )
    sd2 = small_unet(use_linear_projection=True)
    assert check(exported(networks.unet(sdxl, adapter=2, control=True), tmp_path / "sdxl")) == []
    assert check(exported(networks.unet(sd2), tmp_path / "sd2", "float16")) == []


@pytest.mark.slow
def test_control_networks_and_tiny_vaes_pass(tmp_path):
    import diffusers

    from accel.models import control_networks, networks

    unet = small_unet()
    controlnet = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=3)
    adapter = diffusers.T2IAdapter(3, [8, 16], num_res_blocks=1, downscale_factor=8)
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    made = {
        "controlnet": control_networks.controlnet(controlnet, networks.unet(unet).inputs),
        "t2i_adapter": control_networks.t2i_adapter(adapter, [(8, 1), (16, 2)]),
    }
    found = [networks.Network(name, name, *parts) for name, parts in made.items()]
    for network in (*found, networks.vae_decoder(tiny), networks.vae_encoder(tiny)):
        network.module.eval()
        assert check(exported(network, tmp_path / network.name)) == [], network.name


@pytest.mark.slow
def test_int8_graphs_pass(sd15_bundle, tmp_path):
    """The signed graph is TensorRT's; the other, ONNX Runtime's, has zero points and is refused with that reason."""
    from accel.export.int8.settings import Int8Settings
    from accel.export.pipeline import export_pipeline

    options = Int8Settings(components=("unet", "vae_decoder"), images=1, evaluation_images=1)
    bundle = export_pipeline(sd15_bundle, tmp_path / "out", precision="int8", int8=options)
    for name in ("unet", "vae_decoder"):
        component = bundle.component(name)
        assert component.int8 and check(bundle.path / component.graph_for("tensorrt")) == []
        refused = check(bundle.path / component.graph_for("onnxruntime"))
        assert {problem.operator for problem in refused} == {"QuantizeLinear", "DequantizeLinear"}


@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 23])
def test_sdxl_and_the_newer_opset_pass(sdxl, tmp_path, opset):
    from accel.export.pipeline import export_pipeline

    bundle = export_pipeline(sdxl, tmp_path / "out", profile="batch=1-2,size=64-128", opset=opset)
    assert {name: check(bundle.path / c.graph) for name, c in bundle.manifest.components.items()} == {
        name: [] for name in bundle.manifest.components
    }


@pytest.mark.parametrize(
    "model, reason",
    [
        (graph(helper.make_node("BitShift", ["x", "x"], ["y"])), "no such operator"),
        (graph(helper.make_node("Fast", ["x"], ["y"], domain="mine"), domains=["mine"]), "not standard ONNX"),
        (graph(helper.make_node("Sigmoid", ["x"], ["y"])), None),
        (graph(helper.make_node("Sigmoid", ["x"], ["y"]), dtype=TensorProto.FLOAT16), None),
        (graph(helper.make_node("Relu", ["x"], ["y"]), dtype=TensorProto.INT16), "x is INT16"),
        (graph(helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT16)), "y is INT16"),
        (graph(helper.make_node("Relu", ["x"], ["y"]), opset=25), "opset 25"),
        (
            graph(
                helper.make_node("Resize", ["x", "", "s"], ["y"], mode="cubic"),
                initializers=[const("s", np.ones(4, np.float32))],
            ),
            "mode = cubic",
        ),
        (
            graph(
                helper.make_node("Resize", ["x", "", "s"], ["y"], mode="nearest"),
                initializers=[const("s", np.ones(4, np.float32))],
            ),
            None,
        ),
        (
            graph(
                helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear", antialias=1),
                initializers=[const("s", np.ones(4, np.float32))],
            ),
            "antialiasing",
        ),
        (
            graph(
                helper.make_node("LayerNormalization", ["x", "w"], ["y", "mean"]),
                initializers=[const("w", np.ones(8, np.float32))],
            ),
            "only its first output",
        ),
        (
            graph(
                helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]),
                initializers=[const("s", np.float32(1)), const("z", np.int8(3))],
            ),
            "zero point is not 0",
        ),
        (
            graph(
                helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]),
                initializers=[const("s", np.float32(1)), const("z", np.int8(0))],
            ),
            None,
        ),
        (
            graph(
                helper.make_node("DequantizeLinear", ["x", "s"], ["y"]),
                dtype=TensorProto.UINT8,
                initializers=[const("s", np.float32(1))],
            ),
            "x is UINT8",
        ),
        (graph(helper.make_node("ReduceMean", ["x", "x"], ["y"])), "axes must be a constant"),
        (graph(helper.make_node("Attention", ["x", "x", "x"], ["y"], softcap=1.0), opset=23), "softcap"),
        (graph(helper.make_node("Attention", ["x", "x", "x"], ["y"]), opset=23), None),
        (graph(helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[2, 2])), "dilations"),
        (graph(helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], dilations=[1, 1])), None),
    ],
)
def test_operators_types_and_attributes(model, reason):
    found = check(model)
    assert (found == []) if reason is None else (len(found) == 1 and reason in found[0].reason), found


def test_subgraphs_are_walked():
    inner = helper.make_graph(
        [helper.make_node("Det", ["x"], ["z"])],
        "then",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])],
        "else",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other)
    (found,) = check(graph(node, initializers=[const("c", np.bool_(True))]))
    assert found.operator == "Det"


def test_the_matrix_names_operators_that_exist():
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert set(MATRIX) - known == set() and len(MATRIX) > 140


def test_inspect_says_it(bundle_copy, capsys):
    assert main(["inspect", str(bundle_copy), "--engine", "tensorrt", "--no-verify"]) == 0
    assert "every node is one that TensorRT takes" in capsys.readouterr().out
    path = bundle_copy / "vae_decoder" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node[0].op_type = "Hardmax"
    model.graph.node.append(helper.make_node("Det", ["x"], ["nothing"], name="bad"))
    path.write_bytes(model.SerializeToString())
    assert main(["inspect", str(bundle_copy), "--engine", "tensorrt", "--no-verify", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["tensorrt_operators"]["vae_decoder"]
    assert row["operator"] == "Det" and row["node"] == "bad"
