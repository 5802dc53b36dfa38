"""Which precision an engine computes in, and what is refused."""

from __future__ import annotations

import json

import pytest

from accel.bundle import Bundle
from accel.bundle.graph_file import graph
from accel.errors import UserError
from accel.export.tensorrt import audit
from accel.export.tensorrt.build import build
from accel.export.tensorrt.layers import Layer, Tensor
from accel.export.tensorrt.options import BuildOptions
from accel.trt import engine_files

VAE = ("vae_decoder",)
# For what calls nothing of TensorRT that the other tests do not call: one version shows it.
NEWEST = pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)


def layer(kind, name, dtype, tactic="", nodes=(), weights="", shape=(8, 8), more=()):
    """A layer with one input, and weights where their datatype is given."""
    return Layer(
        name=name,
        kind=kind,
        inputs=(Tensor(dtype), *map(Tensor, more)),
        constants=(Tensor("Float", (1, 64)), Tensor(weights, shape)) if weights else (),
        tactic=tactic,
        nodes=tuple(nodes),
    )


def test_the_audit_counts_the_layers_that_do_the_work():
    found = audit.audit(
        [
            layer("CaskConvolution", "conv", "Thirty-two wide channel vectorized row major Int8 format."),
            layer("gemm", "matmul_myl0_7", "Half"),
            layer("kgen", "__myl_FcMulAdd_myl0_8", "Half"),
            layer("kgen", "__myl_AddCastMean_myl0_8", "Float"),  # no matrix product in it
            layer("Reformat", "Reformatting CopyNode for conv", "Float"),
            layer("CaskGemmConvolution", "wide", "Float"),
            layer("CaskConvolution", "bf", "BFloat16"),
            layer("gemm", "known by its tactic", "N/A due to dynamic shapes", "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n"),
            layer("gemm", "unknown", "N/A due to dynamic shapes"),
            layer("correlation", "node_conv2d_myl0_2", "Int8", weights="Int8"),
            layer("kgen", "_gemm_mha_v2_myl0_23", "Half"),
            layer("runtime_fusion", "__myl_FcAddSilu_myl0_2", "Half", weights="Half"),
            layer("runtime_fusion", "__myl_CorrCastAdd_myl0_33", "Half", weights="Float", more=["Float"]),
        ]
    )
    assert found["heavy"] == {"bf16": 1, "fp16": 5, "fp32": 2, "int8": 2, "unknown": 1} and found["layers"] == 13
    assert found["float32_layers"] == ["wide", "__myl_CorrCastAdd_myl0_33"] and found["fused_attentions"] == 1
    line = audit.check("unet", "fp16", found)
    assert line.startswith("10 convolutions") and "; 1 more of unknown precision; 1 fused attentions" in line


@pytest.mark.parametrize(
    "found, precision",
    [
        # A kernel that casts its input and multiplies in float32 says so only by its weights.
        (layer("runtime_fusion", "__myl_CastFcCast_myl0_3", "Half", weights="Float"), "fp32"),
        (layer("correlation", "conv", "Int8", weights="Int8", more=["Float"]), "int8"),  # a float32 skip connection
        (layer("gemm", "weights alone are int8", "Half", weights="Int8"), "fp16"),
        (layer("gemm", "scores", "Int8", more=["Int8"]), "int8"),
        (layer("gemm", "one side alone", "Int8", more=["Half"]), "fp16"),
        (layer("kgen", "__myl_SlicFc_myl0_3", "Int32", more=["Half"], weights="Half"), "fp16"),  # where a slice begins
        (layer("gemm", "a bias", "Half", weights="Float", shape=(64,)), "fp16"),
    ],
)
def test_a_product_computes_in_the_wider_of_its_operands(found, precision):
    assert audit.audit([found])["heavy"] == {precision: 1}


@pytest.mark.parametrize(
    "wanted, heavy, ok",
    [
        ("fp16", {"fp16": 5, "fp32": 5}, True),
        ("fp16", {"fp16": 4, "fp32": 5}, False),
        ("fp32", {"fp32": 5}, True),
        ("int8", {"fp16": 5}, False),
        ("int8", {"int8": 1, "fp16": 5}, True),
        ("int8", {"int8": 2, "fp32": 5}, False),
    ],
)
def test_an_engine_that_is_mostly_float32_is_refused(wanted, heavy, ok):
    found = {"layers": 9, "heavy": heavy, "float32_layers": []}
    if ok:
        audit.check("unet", wanted, found)
    else:
        with pytest.raises(UserError, match="was to run in"):
            audit.check("unet", wanted, found)


@pytest.mark.parametrize("heavy", [{"unknown": 5}, {}])
def test_an_audit_that_knows_nothing_is_no_pass(heavy):
    with pytest.raises(UserError, match="does not tell in which precision the layers of unet compute") as caught:
        audit.check("unet", "fp16", {"layers": 9, "heavy": heavy})
    assert "accel doctor" in caught.value.fix


def test_one_layer_that_lost_the_precision_of_its_graph_is_refused():
    """Of a hundred layers, one; the rest may be float32 where the graph has them so."""
    nodes = {f"node_{i}": "fp16" for i in range(100)} | {"embedding": "fp32"}
    layers = [layer("gemm", f"g{i}", "Half", nodes=[f"node_{i}"], weights="Half") for i in range(100)]
    layers.append(layer("gemm", "e", "Float", nodes=["embedding"]))
    audit.check("unet", "fp16", audit.audit(layers, nodes))
    layers[7] = layer("runtime_fusion", "__myl_CastFcCast", "Half", nodes=["cast", "node_7"], weights="Float")
    with pytest.raises(UserError, match="node_7 in float32, which the graph has in fp16") as caught:
        audit.check("unet", "fp16", audit.audit(layers, nodes))
    assert "--precision fp16" in caught.value.fix


def test_float32_layers_that_the_graph_asks_for_do_not_count_against_it():
    """An int8 graph whose products with weights alone are quantized may be mostly float32."""
    nodes = {"q": "int8"} | {f"f{i}": "fp32" for i in range(9)}
    layers = [
        layer("gemm", "q", "Int8", nodes=["q"]),
        *(layer("gemm", f"f{i}", "Float", nodes=[f"f{i}"]) for i in range(9)),
    ]
    found = audit.audit(layers, nodes)
    assert "1 of 1 int8 nodes" in audit.check("unet", "int8", found)
    with pytest.raises(UserError, match="was to run in int8"):
        audit.check("unet", "int8", audit.audit(layers[1:], nodes))


def test_a_graph_with_one_layer_turned_to_float32_is_refused_before_its_build(bundle_copy, edit_manifest, tensorrt):
    """The graph decides the precision, so the compiler would build it without a word."""
    edit_manifest(
        bundle_copy, lambda data: data["components"]["vae_decoder"].update(dtype="float16", float32=["decoder"])
    )
    bundle = Bundle.open(bundle_copy)
    component = bundle.component("vae_decoder")
    nodes = audit.expected(bundle, component)
    found = audit.unexplained(component, graph(bundle, component), nodes)
    assert found and all("post_quant_conv" in name for name in found)
    with pytest.raises(UserError, match=r"1 layers in float32 that its manifest does not name: .*post_quant_conv"):
        build(bundle, VAE)
    assert tensorrt._world.calls == []


@NEWEST
def test_the_build_of_an_fp16_graph_that_ran_in_float32_keeps_nothing(bundle_copy, edit_manifest, tensorrt):
    edit_manifest(bundle_copy, lambda data: data["components"]["vae_decoder"].update(dtype="float16"))
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(UserError, match="was to run in fp16.*layers in float32"):
        build(bundle, VAE)
    assert engine_files.find(bundle) == []


@NEWEST
def test_int8_engines_must_have_int8_layers_and_are_not_refittable(bundle_copy, edit_manifest, tensorrt):
    quantized = {name: {} for name in ("recipe", "layers", "graphs", "calibration")}
    edit_manifest(bundle_copy, lambda data: data["components"]["vae_decoder"].update(int8=quantized))
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(UserError, match="was to run in int8.*in fp32"):
        build(bundle, VAE)
    with pytest.raises(UserError, match="vae_decoder is int8") as caught:
        build(bundle, VAE, options=BuildOptions(refittable=True))
    assert "--lora" in caught.value.fix
    tensorrt._world.dtype = "Int8"
    (file,) = build(bundle, VAE)
    assert file.record["audit"]["wanted"] == "int8"


@NEWEST
@pytest.mark.parametrize("level, layers", [("attention", ["a.attn1.scores", "a.attn1.mix"]), ("all", ["a.attn1.to_q"])])
def test_levels_that_take_attention_apart_are_discouraged(bundle_copy, edit_manifest, tensorrt, level, layers):
    quantized = {"config": {"level": level}, "layers": {name: [] for name in layers}, "graphs": {}, "calibration": {}}
    edit_manifest(bundle_copy, lambda data: data["components"]["vae_decoder"].update(int8=quantized))
    tensorrt._world.dtype, said = "Int8", []
    build(Bundle.open(bundle_copy), VAE, announce=said.append)
    told = [line for line in said if "takes attention apart" in line]
    assert len(told) == (level == "attention") and all("--int8-level all" in line for line in told)


def test_the_audit_is_part_of_the_record(bundle, tensorrt):
    (file,) = build(bundle, VAE)
    record = json.loads(file.path.with_suffix(".json").read_text())
    assert record["audit"]["wanted"] == "fp32" and record["audit"]["heavy"]["fp32"] > 10
