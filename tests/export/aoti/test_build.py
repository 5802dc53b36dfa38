"""Building with AOTInductor: the command, what it refuses before it compiles, and that nothing is left of it."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import tempfile
import time

import psutil
import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.cli import main
from accel.errors import UserError
from accel.export.aoti import build as module
from accel.export.aoti.build import build
from accel.export.graph.trace import example
from accel.parity import relative_l2
from accel.trt import engine_files

ENGINES = ("aoti", "eager")


def test_what_is_built_already_is_not_built_again(aoti_bundle, monkeypatch):
    monkeypatch.setattr(module, "run_apart", lambda *_: pytest.fail("it was built again"))
    told = []
    (file,) = build(Bundle.open(aoti_bundle), ("unet",), device="cpu", announce=told.append)
    assert told == [f"unet: {file.key[:8]} is already built"] and file.path.name == "unet.pt2"
    parity = file.record["audit"]["parity"]
    assert parity["relative_l2"] < parity["limit"] == 1e-4 and file.record["measured"]["cpu_seconds"] > 1


@pytest.mark.slow
def test_a_profile_of_one_size_takes_that_size_alone(smallest_bundle, bundle_of, capsys):
    bundle = bundle_of(smallest_bundle)
    words = ["build", str(bundle.path), "--engine", "aoti", "--device", "cpu", "--components", "vae_decoder"]
    assert main([*words, "--profile", "batch=2,size=32"]) == 0
    assert "an image needs an engine file of text_encoder, unet too" in capsys.readouterr().out
    ours = accel.load_engine(bundle, "vae_decoder", "aoti", device="cpu")
    theirs = accel.load_engine(bundle, "vae_decoder", "eager", device="cpu")
    sizes = {name: limits.min for name, limits in ours.component.dims.items()}
    assert sizes["images"] == 2 and all(limits.fixed for limits in ours.component.dims.values())
    feeds = example(ours.component.inputs, sizes)
    assert relative_l2(ours(**feeds)["sample"].numpy(), theirs(**feeds)["sample"].numpy()) < 1e-4
    with pytest.raises(UserError, match="images 1 is outside profile 'batch=2,size=32'"):
        ours(latent_sample=feeds["latent_sample"][:1])


def test_what_it_cannot_do_is_refused_before_it_compiles(smallest_bundle, bundle_of, monkeypatch, capsys):
    monkeypatch.setattr(module, "run_apart", lambda *_: pytest.fail("it compiles"))
    bundle = bundle_of(smallest_bundle)
    with pytest.raises(UserError, match="one range of shapes, and 2 profiles were given"):
        build(bundle, profiles=("batch=1,size=32", "batch=2,size=32"), device="cpu")
    with pytest.raises(UserError, match="does not build for 'npu'"):
        build(bundle, device="npu")
    with pytest.raises(UserError, match="AOTInductor runs float networks alone, and text_encoder is int8"):
        build(Bundle.open(str(accel.assets.DIGITS / "tiny-1step-int8")), device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="'cuda' is not usable: torch sees no CUDA device"):
            build(bundle, device="cuda")
    monkeypatch.setattr("accel.engines.compile.shutil.which", lambda name: None)
    with pytest.raises(UserError, match="cannot build here: torch.compile needs a C.. compiler") as caught:
        build(bundle, device="cpu")
    assert caught.value.fix == "apt-get install g++"
    words = ["build", str(bundle.path), "--engine", "aoti", "--device", "cpu"]
    for more in (["--refittable"], ["--optimization-level", "5"], ["--no-timing-cache"], ["--targets", "sm89"]):
        assert main([*words, *more]) == 1
        assert f"AOTInductor does not take {more[0]}: " in capsys.readouterr().err


def test_a_gpu_needs_triton_and_cudas_headers(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="triton is not installed"):
        module._check_cuda()
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(UserError, match="CUDA's headers are missing"):
        module._check_cuda()


def test_ctrl_c_ends_the_compilers_and_leaves_no_file(smallest_bundle, bundle_of, monkeypatch, tmp_path):
    bundle = bundle_of(smallest_bundle)
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    reached, started = [], []

    def compiling() -> list[psutil.Process]:
        return [p for p in psutil.Process().children(recursive=True) if "c++" in p.name() or "cc1" in p.name()]

    def progress(stage, fraction):
        if "compiling" in stage and (found := compiling()):
            reached.append(time.monotonic())
            started.extend(found)
            _thread.interrupt_main()

    try:
        with pytest.raises(KeyboardInterrupt):
            build(bundle, ("text_encoder",), device="cpu", progress=progress)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - reached[0] < 5
    psutil.wait_procs(started, timeout=5)
    assert started and not any(process.is_running() for process in started)
    assert os.listdir(scratch) == [] and not (bundle.path / engine_files.FOLDER).exists()


def test_a_network_that_torch_computes_otherwise_is_not_kept(smallest_bundle, bundle_of, monkeypatch):
    """The limit is set to nothing in the child, so that every difference is too much."""
    bundle = bundle_of(smallest_bundle)
    code = (
        "from accel.export.graph import check; check.FP32_GATE = 0.0\n"
        "from accel.export.aoti.compiler import compile_network, serve; serve(compile_network)"
    )
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", code))
    with pytest.raises(UserError, match="text_encoder of AOTInductor differs from torch by .*limit 0.00e"):
        build(bundle, ("text_encoder",), device="cpu")
    assert engine_files.find(bundle) == []


def test_half_precision_is_no_further_from_float32_than_torch_itself(smallest, tmp_path):
    from accel.export import export_pipeline

    bundle = export_pipeline(
        smallest, tmp_path / "half", profile="batch=1-2,size=32", precision="fp16", components=("vae_decoder",)
    )
    (file,) = build(bundle, ("vae_decoder",), device="cpu")
    parity = file.record["audit"]["parity"]
    assert 0 < parity["relative_l2"] <= parity["limit"] == 2 * parity["torch_relative_l2"]
    ours = accel.load_engine(bundle, "vae_decoder", "aoti", device="cpu")
    sizes = {name: limits.min for name, limits in ours.component.dims.items()}
    assert ours(**example(ours.component.inputs, sizes))["sample"].dtype == torch.float16


@pytest.mark.slow
def test_bfloat16_is_a_file_beside_the_bundles_own(smallest_bundle, bundle_of, capsys):
    bundle = bundle_of(smallest_bundle)
    words = ["build", str(bundle.path), "--engine", "aoti", "--device", "cpu", "--components", "vae_decoder"]
    assert main([*words, "--profile", "batch=1,size=32", "--precision", "bf16"]) == 0
    (file,) = engine_files.find(bundle)
    parity = file.record["audit"]["parity"]
    assert 1e-4 < parity["relative_l2"] <= parity["limit"] == 2 * parity["torch_relative_l2"]
    assert file.built_for.endswith("CPU, bf16") and main(["inspect", str(bundle.path), "--no-verify"]) == 0
    assert "CPU, bf16" in capsys.readouterr().out
    ours, eager = (accel.load_engine(bundle, "vae_decoder", name, device="cpu", dtype="bf16") for name in ENGINES)
    feeds = example(ours.component.inputs, {name: limits.min for name, limits in ours.component.dims.items()})
    own, theirs = ours(**feeds)["sample"], eager(**feeds)["sample"]
    assert own.dtype == torch.float32 and "bfloat16" in ours.description
    assert relative_l2(own.numpy(), theirs.numpy()) < 2 * parity["limit"]
    with pytest.raises(UserError, match="in bf16 takes no other weights"):
        ours.set_weights({"decoder.conv_out.bias": torch.ones(3)})
    with pytest.raises(UserError, match="it computes in bf16, and the bundle's precision is asked for") as caught:
        accel.load_engine(bundle, "vae_decoder", "aoti", device="cpu")
    assert "--precision" not in caught.value.fix


def test_precisions_that_no_file_has_are_refused_before_it_compiles(smallest_bundle, bundle_of, monkeypatch, capsys):
    monkeypatch.setattr(module, "run_apart", lambda *_: pytest.fail("it compiles"))
    bundle = bundle_of(smallest_bundle)
    with pytest.raises(UserError, match="compute in float32, not in fp16") as caught:
        build(bundle, device="cpu", dtype="fp16")
    assert "accel export MODEL BUNDLE --precision fp16" in caught.value.fix
    assert main(["build", str(bundle.path), "--precision", "bf16"]) == 1
    assert "--precision bf16 is for aoti" in capsys.readouterr().err
