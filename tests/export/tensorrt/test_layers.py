"""Real listings of TensorRT-RTX's builder, and the forms in which TensorRT 10 and 11 tell the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from accel.export.tensorrt import audit, kernels, layers

LISTINGS = Path(__file__).parent / "listings"


def listing(name: str) -> list[layers.Layer]:
    return layers.from_log([gzip.decompress((LISTINGS / f"{name}.txt.gz").read_bytes()).decode()])


@pytest.mark.parametrize(
    "name, heavy, fused",
    [
        ("4step-vae_decoder-", {"fp32": 26}, 0),  # digits in float32: no attention of float32 is fused
        ("digits-int8-unet-int8", {"fp32": 114, "int8": 179}, 0),
        ("digits-int8-vae_decoder-int8", {"fp32": 6, "int8": 20}, 0),
        ("dt-int8fp16-unet-fam", {"fp16": 41, "fp32": 2, "int8": 110}, 6),  # int8-fp16 with quantised attention
        ("real-vae16", {"fp16": 39}, 0),  # its one attention has a head of 512
        ("te16v", {"fp16": 60}, 12),  # CLIP-L: twelve layers, twelve attentions
        ("tiny16-dyn-2cc", {"fp16": 133, "fp32": 2}, 18),  # SD-Tiny; the time embedding is float32
    ],
)
def test_every_layer_that_does_the_work_is_counted(name, heavy, fused):
    found = audit.audit(listing(name))
    assert found["heavy"] == heavy and found["fused_attentions"] == fused and "unknown" not in found["heavy"]


@pytest.mark.parametrize(
    "name, component", [("digits-int8-unet-int8", "unet"), ("digits-int8-vae_decoder-int8", "vae_decoder")]
)
def test_every_quantised_layer_of_the_shipped_digits_runs_in_int8(name, component):
    from accel.assets import resolve
    from accel.bundle import Bundle

    bundle = Bundle.open(resolve("digits/4step-int8"))
    found = audit.audit(listing(name), audit.expected(bundle, bundle.component(component)))
    count = {"unet": 242, "vae_decoder": 22}[component]
    assert found["int8_share"] == [count, count] and found["wider"] == []
    assert f"{count} of {count} int8 nodes" in audit.check(component, "int8", found)


@pytest.mark.parametrize(
    "name, kernels_, attentions, tensors, islands",
    [
        ("te16v", 134, 12, 2, 1),
        ("tiny16-dyn-2cc", 255, 18, 38, 19),  # normalizations in two kernels, and the embedding of time
        ("dt-int8fp16-unet-fam", 372, 6, 42, 41),  # int8 convolutions that write float32
        ("digits-int8-vae_decoder-int8", 72, 0, 51, 12),  # float32 is what this graph has between int8 layers
    ],
)
def test_kernels_and_the_float32_that_they_hand_to_each_other(name, kernels_, attentions, tensors, islands):
    found = kernels.count(listing(name))
    assert (found.kernels, found.attentions, found.float32_tensors, found.islands) == (
        kernels_,
        attentions,
        tensors,
        islands,
    )
    assert sum(found.by_kind.values()) == found.kernels and not {"shape_call", "reshape", "cast"} & found.by_kind.keys()


def test_an_island_is_what_float32_tensors_connect():
    """Two that meet in one kernel are one; shapes, and what nobody reads, count for nothing."""

    def layer(name, takes, gives, kind="kgen", datatype="Float"):
        tensors = [[layers.Tensor(datatype, (2, 8), t) for t in names] for names in (takes, gives)]
        return layers.Layer(name, kind, tuple(tensors[0]), (), tuple(tensors[1]))

    apart = [layer("a", ["x"], ["p"]), layer("b", ["p"], ["q"], datatype="Half"), layer("c", ["q"], ["r"])]
    apart += [layer("d", ["s"], ["t"]), layer("e", ["t"], ["y"])]
    found = kernels.count(apart)
    assert (found.kernels, found.float32_tensors, found.islands, found.float32_bytes) == (5, 2, 2, 128)
    joined = kernels.count([*apart, layer("f", ["p", "t"], ["z"])])
    assert (joined.kernels, joined.float32_tensors, joined.islands) == (6, 2, 1)
    assert kernels.count([layer("g", [], ["n"], datatype="Int64"), layer("h", ["n"], ["m"], "reshape")]).kernels == 0


def test_the_inspector_of_each_version_and_the_log_tell_the_same():
    log = "Layers:\nName: conv_myl0_1, LayerType: correlation, Inputs: [ { Name: x, Dimensions: [-1,4,16,16], Strides: [1024,1,64,4], StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }], Constants: [ { Name: w, Dimensions: [8,4,3,3], Strides: [36,9,3,1], StrideOrder: [3,2,1,0], Datatype: Half, Format: (Linear) Row major linear format }], Outputs: [], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: node_a][ONNX Layer: node_b]__gemm_from_conv1x1"  # noqa: E501
    tensor = {"Name": "x", "Dimensions": [-1, 4, 16, 16]}
    ten = {"Name": "conv", "LayerType": "CaskConvolution", "Metadata": "[ONNX Layer: node_a]\x1e[ONNX Layer: node_b]"}
    ten |= {"Inputs": [tensor | {"Format/Datatype": "Half"}], "Outputs": [], "TacticName": "t"}
    eleven = ten | {"Inputs": [tensor | {"Datatype": "Half", "Format": "(Linear) Row major linear format"}]}
    told = [*layers.from_log(["something", log]), *layers.from_inspector(json.dumps({"Layers": [ten, eleven]}))]
    assert {layer.inputs for layer in told} == {(layers.Tensor("Half", (-1, 4, 16, 16), "x"),)}
    assert {layer.nodes for layer in told} == {("node_a", "node_b")}
    assert told[0].constants == (layers.Tensor("Half", (8, 4, 3, 3), "w"),) and told[0].tactic == "t"
    assert audit.audit(told)["heavy"] == {"fp16": 3}


def test_logs_and_answers_without_layers_give_none():
    assert layers.from_log(["Layers", "nothing"]) == [] and layers.from_log([]) == []
    assert layers.from_inspector("no JSON") == [] and layers.from_inspector('{"Layers": ["a", "b"]}') == []
    assert layers.activation_memory(["Total Activation Memory: 17 bytes"]) == 17
    assert layers.activation_memory(["Activation"]) is None
