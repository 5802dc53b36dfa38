"""TensorRT itself on a real GPU: `python -m pytest -m "gpu and tensorrt"`. Skipped with the reason where it cannot be.

Never run so far: the machines this was built on have no GPU.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.parity import relative_l2

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]


@pytest.fixture(scope="module", autouse=True)
def _real():
    from accel.engines import status

    state = status("tensorrt")
    if not state.ok:
        pytest.skip(f"TensorRT cannot run here: {state.detail}")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Bundle:
    """The shipped model in fp16, with refittable plans for two sizes."""
    from accel.export.pipeline import export_pipeline
    from accel.export.tensorrt import BuildOptions, build

    bundle = export_pipeline("digits", tmp_path_factory.mktemp("gpu") / "digits", precision="fp16",
                             profile="batch=1-4,size=64-128")  # fmt: skip
    build(bundle, profiles=["batch=1,size=64", "batch=1-4,size=64-128"], options=BuildOptions(refittable=True))
    return bundle


def inputs(engine, batch=2, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: limits.min for name, limits in engine.component.dims.items()}
    sizes |= {"batch": batch, "latent_height": size, "latent_width": size}
    made = {s.name: torch.randn(s.concrete(sizes), generator=generator).to(getattr(torch, s.dtype))
            for s in engine.component.inputs}  # fmt: skip
    return made | {"timestep": torch.tensor(500, dtype=made["timestep"].dtype)}


def pair(bundle, **options):
    ours = accel.load_engine(bundle, "unet", "tensorrt", **options)
    return ours, accel.load_engine(bundle, "unet", "eager", device="cuda")


def test_parity_with_torch(digits):
    ours, torchs = pair(digits)
    for batch, size in ((2, 16), (1, 16), (8, 32)):
        feeds = inputs(ours, batch, size)
        found, wanted = (e(**feeds)["out_sample"].float().cpu().numpy() for e in (ours, torchs))
        assert relative_l2(found, wanted) < 0.02


def test_the_plan_is_fp16(digits):
    from accel import plans

    for plan in plans.find(digits):
        heavy = plan.record["audit"]["heavy"]
        assert heavy.get("fp16", 0) > heavy.get("fp32", 0), plan.component


@pytest.mark.parametrize("graph", ["step", "loop"])
def test_cuda_graphs_change_nothing(digits, graph):
    plain, captured = (accel.load(digits, "tensorrt", cuda_graph=g) for g in ("off", graph))
    for seed, height in ((0, 64), (1, 64), (2, 128), (0, 64)):
        a, b = (p("a handwritten seven", seed=seed, height=height, output_type="latent").latents
                for p in (plain, captured))  # fmt: skip
        assert relative_l2(b, a) < 1e-3


def test_threads(digits):
    ours, _ = pair(digits)
    cases = [inputs(ours, 2, seed=i) for i in range(4)]
    wanted, found = [ours(**feeds)["out_sample"].clone() for feeds in cases], [None] * 4

    def run(i):
        for _ in range(20):
            found[i] = ours(**cases[i])["out_sample"]
        torch.cuda.synchronize()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_refit_there_and_back(digits, tmp_path):
    from safetensors.torch import load_file, save_file

    from accel.engines.refit import Refit

    weights = load_file(digits.path / "unet" / "model.safetensors")
    state = {}
    for key, value in weights.items():
        if key.endswith("attn1.to_q.weight"):
            out, into = value.shape
            state[f"unet.{key.removesuffix('.weight')}.lora_A.weight"] = 0.5 * torch.randn(2, into)
            state[f"unet.{key.removesuffix('.weight')}.lora_B.weight"] = 0.5 * torch.randn(out, 2)
    save_file(state, tmp_path / "lora.safetensors")
    unet, _ = pair(digits)
    feeds, refit = inputs(unet), Refit(unet)
    before, own = unet(**feeds)["out_sample"].clone(), refit.digest
    refit.loras([tmp_path / "lora.safetensors"])
    assert not torch.equal(unet(**feeds)["out_sample"], before)
    assert refit.loras([]) == own and torch.equal(unet(**feeds)["out_sample"], before)


@pytest.mark.slow
def test_sd_tiny_at_real_size(tmp_path):
    from accel.export.pipeline import export_pipeline
    from accel.export.tensorrt import build

    make = [sys.executable, ROOT / "benchmarks/random_pipeline.py", "sd15-tiny", tmp_path / "source"]
    subprocess.run(make, check=True)
    bundle = export_pipeline(tmp_path / "source", tmp_path / "bundle", precision="fp16", profile="sd-512")
    build(bundle)
    ours, torchs = pair(bundle, cuda_graph="step")
    feeds = inputs(ours, 2, 64)
    found, wanted = (e(**feeds)["out_sample"].float().cpu().numpy() for e in (ours, torchs))
    assert relative_l2(found, wanted) < 0.02
    assert accel.load(bundle, "tensorrt")("a fox in the snow", steps=2).images[0].size == (512, 512)
