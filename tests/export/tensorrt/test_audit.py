"""Which precision an engine computes in, and what is refused."""

from __future__ import annotations

import json

import pytest

from accel.bundle import Bundle
from accel.errors import UserError
from accel.export.tensorrt import audit
from accel.export.tensorrt.build import BuildOptions, build
from accel.trt import engine_files

VAE = ("vae_decoder",)
# For what calls nothing of TensorRT that the other tests do not call: one version shows it.
NEWEST = pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)


def layer(kind, name, dtype, tactic=""):
    tensor = {"Name": "x", "Dimensions": [1], "Format/Datatype": dtype}
    return {"Name": name, "LayerType": kind, "Inputs": [tensor], "Outputs": [tensor], "TacticName": tactic}


def test_the_audit_counts_the_layers_that_do_the_work():
    layers = [
        layer("CaskConvolution", "conv", "Thirty-two wide channel vectorized row major Int8 format."),
        layer("gemm", "matmul_myl0_7", "Half"),
        layer("kgen", "__myl_FcMulAdd_myl0_8", "Half"),
        layer("kgen", "__myl_AddCastMean_myl0_8", "Float"),  # no matrix product in it
        layer("Reformat", "Reformatting CopyNode for conv", "Float"),
        layer("CaskGemmConvolution", "wide", "Float"),
        layer("CaskConvolution", "bf", "BFloat16"),
        layer("gemm", "known by its tactic", "N/A due to dynamic shapes", "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n"),
        layer("gemm", "unknown", "N/A due to dynamic shapes"),
        "a name only",
    ]
    found = audit.audit(json.dumps({"Layers": layers}))
    assert found["heavy"] == {"bf16": 1, "fp16": 3, "fp32": 1, "int8": 1, "unknown": 1} and found["layers"] == 10
    assert found["float32_layers"] == ["wide"]
    line = audit.check("unet", "fp16", found)
    assert line.startswith("6 convolutions") and line.endswith("; 1 more of unknown precision")


@pytest.mark.parametrize(
    "wanted, heavy, ok",
    [
        ("fp16", {"fp16": 5, "fp32": 5}, True),
        ("fp16", {"fp16": 4, "fp32": 5}, False),
        ("fp32", {"fp32": 5}, True),
        ("int8", {"fp16": 5}, False),
        ("int8", {"int8": 1, "fp16": 5}, True),
        ("int8", {"int8": 2, "fp32": 5}, False),
        ("fp16", {"unknown": 5}, True),
        ("fp16", {}, True),
    ],
)
def test_an_engine_that_is_mostly_float32_is_refused(wanted, heavy, ok):
    found = {"layers": 9, "heavy": heavy, "float32_layers": []}
    if ok:
        audit.check("unet", wanted, found)
    else:
        with pytest.raises(UserError, match="was to run in"):
            audit.check("unet", wanted, found)


@NEWEST
def test_the_build_of_an_fp16_graph_that_ran_in_float32_keeps_nothing(bundle_copy, edit_manifest, tensorrt):
    edit_manifest(bundle_copy, lambda data: data["components"]["vae_decoder"].update(dtype="float16"))
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(UserError, match="was to run in fp16.*in fp32"):
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


def test_the_audit_is_part_of_the_record(bundle, tensorrt):
    (file,) = build(bundle, VAE)
    record = json.loads(file.path.with_suffix(".json").read_text())
    assert record["audit"]["wanted"] == "fp32" and record["audit"]["heavy"]["fp32"] > 10
