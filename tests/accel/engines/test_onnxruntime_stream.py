"""ONNX Runtime on CUDA, on the fake device: runs are queued on a stream of the engine's, and nobody waits for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch

import accel
from accel.engines import onnxruntime as engine
from accel.providers.built_in import PROVIDERS
from accel.providers.route import Route


class OnFake(Route):
    """A route to "cuda:0" whose sessions run on the CPU."""

    def open(self, file, session_options, **more):
        OPENED.append(self.chain)
        return ort.InferenceSession(file, session_options, providers=["CPUExecutionProvider"], **more)


OPENED: list[tuple] = []


@pytest.fixture
def cuda(monkeypatch, fakes):
    """The fake device, on which ONNX Runtime's engine runs as on a GPU."""
    module = fakes("cuda")
    OPENED.clear()
    chain = ((PROVIDERS["cuda"], {"device_id": 0}), PROVIDERS["cpu"])
    route = OnFake("cuda", PROVIDERS["cpu"], "cuda:0", chain)
    monkeypatch.setattr(engine, "find", lambda *_: route)
    monkeypatch.setattr(engine, "Cuda", module.Cuda)
    monkeypatch.setattr(module.Cuda, "waits", 0)
    return module.Cuda


def feeds(batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(batch, 77, 32, generator=generator),
    }


def test_sessions_compute_on_the_engines_own_stream(smallest_bundle, cuda):
    unet = accel.load_engine(smallest_bundle, "unet", "onnxruntime")
    (gpu, options), cpu = OPENED[0]
    assert gpu == PROVIDERS["cuda"] and options["user_compute_stream"] == str(unet.stream.number)
    assert cpu == PROVIDERS["cpu"] and unet.runs_on == "cuda" and unet.native == "torch"


def test_a_stream_that_the_user_named_stays(smallest_bundle):
    route = Route("cuda", PROVIDERS["cuda"], "cuda:0", ((PROVIDERS["cuda"], {"user_compute_stream": "7"}),))
    assert route.on_stream(9).chain == route.chain
    assert replace(route, chain=(PROVIDERS["cpu"],)).on_stream(9).chain == (PROVIDERS["cpu"],)


def test_a_call_waits_for_nothing_and_binds_once_for_each_shape(smallest_bundle, cuda, monkeypatch):
    unet = accel.load_engine(smallest_bundle, "unet", "onnxruntime")
    plain = accel.load_engine(smallest_bundle, "unet", "eager", device="cpu")
    made, ran = [], []
    session = unet.session
    binding, run = session.io_binding, session.run_with_iobinding
    monkeypatch.setattr(session, "io_binding", lambda: made.append(1) or binding())

    def watched(bound, options):
        ran.append((cuda.current[-1], options.get_run_config_entry("disable_synchronize_execution_providers")))
        run(bound, options)

    monkeypatch.setattr(session, "run_with_iobinding", watched)
    kept = []
    for seed, batch in ((0, 1), (1, 2), (2, 1), (3, 2), (4, 1)):
        given = feeds(batch, seed)
        kept.append((given, unet(**given)["out_sample"]))
    for given, out in kept:  # every output is still its own
        assert torch.allclose(out, plain(**given)["out_sample"], atol=1e-4)
    assert len(made) == 2 and ran == [(unet.stream, "1")] * 5
    assert cuda.waits == 0


def test_threads_share_the_stream_one_after_another(smallest_bundle, cuda):
    unet = accel.load_engine(smallest_bundle, "unet", "onnxruntime")
    wanted = [unet(**feeds(1 + seed % 2, seed))["out_sample"] for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: unet(**feeds(1 + seed % 2, seed))["out_sample"], range(8)))
    assert all(map(torch.equal, found, wanted))


def test_other_weights_are_in_the_next_call(smallest_bundle, cuda):
    unet = accel.load_engine(smallest_bundle, "unet", "onnxruntime")
    before = unet(**feeds())["out_sample"]
    unet.set_weights({"conv_out.bias": np.full(4, 3, np.float32)})
    assert not torch.allclose(unet(**feeds())["out_sample"], before) and unet.epoch == 2
    unet.set_weights({})
    assert torch.equal(unet(**feeds())["out_sample"], before)


def test_an_image_uploads_its_timesteps_once(smallest_bundle, cuda, monkeypatch):
    pipe = accel.load(smallest_bundle, "onnxruntime")
    unet, uploaded = pipe.engines["unet"], []
    array = unet.array
    monkeypatch.setattr(
        unet, "array", lambda value: (isinstance(value, np.ndarray) and uploaded.append(value.shape), array(value))[1]
    )

    def uploads(steps: int) -> int:
        before = len(uploaded)
        pipe("the cat", seed=0, height=32, width=32, steps=steps, output_type="np")
        return len(uploaded) - before

    assert uploads(6) == uploads(2)
