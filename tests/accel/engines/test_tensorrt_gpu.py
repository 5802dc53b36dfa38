"""TensorRT and TensorRT-RTX themselves on a real GPU: `python -m pytest -m "gpu and tensorrt" -rs`. Skipped with the
reason where they cannot be; `-m "gpu and tensorrt and not slow"` leaves out the network of real size.

Never run so far: the machines this was built on have no GPU. What RTX alone has is in `test_tensorrt_rtx_gpu.py`.
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

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def engine(request) -> str:
    from accel.engines import status

    state = status(request.param)
    if not state.ok:
        pytest.skip(f"{request.param} cannot run here: {state.detail}")
    return request.param


@pytest.fixture(scope="module", params=["digits", pytest.param("sd15-tiny", marks=pytest.mark.slow)])
def bundle(request, engine, tmp_path_factory) -> Bundle:
    """The shipped model, and SD-Tiny at real size with random weights: in fp16, refittable, for two sizes."""
    from accel.export.pipeline import export_pipeline
    from accel.export.tensorrt.build import BuildOptions, build

    folder, source, small, sizes = tmp_path_factory.mktemp("gpu"), "digits", 64, "64-128"
    if request.param != "digits":
        source, small, sizes = folder / "source", 512, "512-768"
        make = [sys.executable, ROOT / "benchmarks/random_pipeline.py", request.param, source]
        subprocess.run(make, check=True)
    made = export_pipeline(source, folder / "bundle", precision="fp16", profile=f"batch=1-4,size={sizes}")
    profiles = [f"batch=1,size={small}", f"batch=1-4,size={sizes}"]
    build(made, engine=engine, profiles=profiles, options=BuildOptions(refittable=True))
    return made


def inputs(engine, batch=2, side="min", seed=0):
    """Inputs of the UNet; `side` is "min" or "max", the smallest or largest latents."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: getattr(limits, side) for name, limits in engine.component.dims.items()} | {"batch": batch}
    made = {
        s.name: torch.randn(s.concrete(sizes), generator=generator).to(getattr(torch, s.dtype))
        for s in engine.component.inputs
    }
    return made | {"timestep": torch.tensor(500, dtype=made["timestep"].dtype)}


def pair(bundle, engine, **options):
    ours = accel.load_engine(bundle, "unet", engine, **options)
    return ours, accel.load_engine(bundle, "unet", "eager", device="cuda")


def test_parity_with_torch_at_every_shape(bundle, engine):
    ours, torchs = pair(bundle, engine)
    for batch, side in ((2, "min"), (1, "min"), (8, "max")):
        feeds = inputs(ours, batch, side)
        found, wanted = (e(**feeds)["out_sample"].float().cpu().numpy() for e in (ours, torchs))
        assert relative_l2(found, wanted) < 0.02


def test_the_engines_are_fp16(bundle):
    from accel.trt import engine_files

    for file in engine_files.find(bundle):
        heavy = file.record["audit"]["heavy"]
        assert heavy.get("fp16", 0) > heavy.get("fp32", 0), file.component


@pytest.mark.parametrize("graph", ["step", "loop"])
def test_cuda_graphs_change_nothing_when_shapes_change(bundle, engine, graph):
    if graph == "loop" and engine == "tensorrt-rtx":
        pytest.skip("TensorRT-RTX captures each shape by itself: it has no loop")
    plain, captured = (accel.load(bundle, engine, cuda_graph=g) for g in ("off", graph))
    heights = bundle.manifest.profile.height
    for seed, height in ((0, heights.min), (1, heights.min), (2, heights.max), (0, heights.min)):
        a, b = (
            p("a handwritten seven", seed=seed, height=height, steps=4, output_type="latent").latents
            for p in (plain, captured)
        )
        assert relative_l2(b, a) < 1e-3


def test_a_cuda_array_is_used_where_it_is(bundle, engine, monkeypatch):
    """An array of another library: nothing but `__cuda_array_interface__`."""
    ours, _ = pair(bundle, engine)
    feeds = {name: value.cuda() for name, value in inputs(ours).items()}

    class Foreign:
        def __init__(self, tensor):
            self.shape, self.dtype = tensor.shape, tensor.dtype
            self.__cuda_array_interface__ = tensor.__cuda_array_interface__

    seen, prepare = {}, ours.prepare
    monkeypatch.setattr(ours, "prepare", lambda c, p, held, *rest: seen.update(held) or prepare(c, p, held, *rest))
    found = ours(**feeds | {"sample": Foreign(feeds["sample"])})["out_sample"]
    assert seen["sample"].data_ptr() == feeds["sample"].data_ptr()
    assert torch.equal(found, ours(**feeds)["out_sample"])


def test_threads(bundle, engine):
    ours, _ = pair(bundle, engine)
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


def test_refit_there_and_back(bundle, engine, tmp_path):
    from safetensors.torch import load_file, save_file

    from accel.engines.refit import Refit

    weights = load_file(bundle.path / "unet" / "model.safetensors")
    state = {}
    for key, value in weights.items():
        if key.endswith("attn1.to_q.weight"):
            out, into = value.shape
            state[f"unet.{key.removesuffix('.weight')}.lora_A.weight"] = 0.5 * torch.randn(2, into)
            state[f"unet.{key.removesuffix('.weight')}.lora_B.weight"] = 0.5 * torch.randn(out, 2)
    save_file(state, tmp_path / "lora.safetensors")
    unet, _ = pair(bundle, engine)
    feeds, refit = inputs(unet), Refit(unet)
    before, own = unet(**feeds)["out_sample"].clone(), refit.digest
    refit.loras([tmp_path / "lora.safetensors"])
    assert not torch.equal(unet(**feeds)["out_sample"], before)
    assert refit.loras([]) == own and torch.equal(unet(**feeds)["out_sample"], before)
