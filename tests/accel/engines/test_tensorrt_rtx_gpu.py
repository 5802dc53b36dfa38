"""What TensorRT-RTX alone has, on an RTX card: `python -m pytest -m "gpu and tensorrt" -rs`.

Never run so far: the machines this was built on have no GPU. Parity, threads and refit are in `test_tensorrt_gpu.py`.
"""

from __future__ import annotations

import time

import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.parity import relative_l2
from accel.trt import engine_files, library, runtime_cache
from accel.trt.flavours import target_of

RTX = "tensorrt-rtx"
pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """The shipped model in float16, built for this card alone, as `--targets` on a machine without one does."""
    from accel.engines import status
    from accel.export.pipeline import export_pipeline
    from accel.export.tensorrt.build import BuildOptions, build
    from accel.trt.cuda import Cuda

    state = status(RTX)
    if not state.ok:
        pytest.skip(f"TensorRT-RTX cannot run here: {state.detail}")
    made = export_pipeline("digits", tmp_path_factory.mktemp("rtx") / "bundle", precision="fp16", profile="digits")
    card = target_of(Cuda().gpu.compute_capability)
    build(made, engine=RTX, targets=[card], options=BuildOptions(weight_streaming=True))
    return made


def feeds(engine, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: limits.opt for name, limits in engine.component.dims.items()} | {"batch": batch}
    made = {
        s.name: torch.randn(s.concrete(sizes), generator=generator).to(getattr(torch, s.dtype))
        for s in engine.component.inputs
    }
    return made | {"timestep": torch.tensor(500, dtype=made["timestep"].dtype)}


def test_the_kernels_of_the_first_start_are_kept(bundle, monkeypatch, tmp_path):
    """The second start reads them, and takes no longer."""
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    (file,) = engine_files.find(bundle, "unet", RTX)
    file.path.with_suffix(".sig").unlink(missing_ok=True)
    from accel.trt import trust

    file.path.with_suffix(".sig").write_text(trust.sign(file.text))  # with this cache's key
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        with accel.load_engine(bundle, "unet", RTX, specialization="eager") as unet:
            unet(**feeds(unet, 2))
            path = runtime_cache.path_for(file.key, library.load(RTX).version, unet.cuda.gpu)
        seconds.append(time.perf_counter() - started)
        assert path.is_file() and path.stat().st_size > 1000
    assert seconds[1] <= seconds[0] * 1.1, seconds


@pytest.mark.parametrize("specialization", ["lazy", "eager", "none"])
@pytest.mark.parametrize("graph", ["off", "step"])
def test_specialisation_and_captures_change_nothing(bundle, specialization, graph):
    torchs = accel.load_engine(bundle, "unet", "eager", device="cuda")
    with accel.load_engine(bundle, "unet", RTX, specialization=specialization, cuda_graph=graph) as unet:
        for batch in (1, 2, 4, 2, 1):
            given = feeds(unet, batch, seed=batch)
            found, wanted = (e(**given)["out_sample"].float().cpu().numpy() for e in (unet, torchs))
            assert relative_l2(found, wanted) < 0.02


def test_streamed_weights_change_nothing(bundle):
    with accel.load_engine(bundle, "unet", RTX) as unet:
        given = feeds(unet, 2)
        whole = unet(**given)["out_sample"].clone()
        size = unet.engine.streamable_weights_size
    with accel.load_engine(bundle, "unet", RTX, streaming_budget=size // 2) as unet:
        assert torch.equal(unet(**given)["out_sample"], whole)


def test_the_library_takes_the_file_and_refuses_another_card(bundle):
    (file,) = engine_files.find(bundle, "unet", RTX)
    module = library.load(RTX).module
    runtime = module.Runtime(library.logger(module))
    validity, _ = runtime.get_engine_validity(file.path.read_bytes())
    assert validity != module.EngineValidity.INVALID
