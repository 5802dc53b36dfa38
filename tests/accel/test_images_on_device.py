"""Pixels become bytes where the decoder left them, and leave a GPU in one copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import accel
from accel import images
from accel.arrays import all_finite, to_host


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_makes_the_very_bytes_that_numpy_makes(dtype):
    torch.manual_seed(0)
    pixels = (torch.randn(2, 3, 24, 40) * 0.8).to(dtype)
    theirs = images.unit_range(pixels.float().numpy())
    ours = images.unit_range(pixels)
    assert np.array_equal(to_host(ours), theirs)
    for a, b in zip(images.to_pil(ours), images.to_pil(theirs), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found(value):
    x = np.zeros((2, 3), np.float32)
    assert all_finite(x) and all_finite(torch.tensor(x))
    x[1, 1] = value
    assert not all_finite(x) and not all_finite(torch.tensor(x))


def test_an_image_of_a_torch_engine_leaves_its_device_as_bytes(smallest_bundle, monkeypatch):
    left = []

    def counted(x):
        left.append((type(x).__name__, str(x.dtype), tuple(x.shape)))
        return to_host(x)

    for place in ("accel.images", "accel.pipeline.output"):
        monkeypatch.setattr(f"{place}.to_host", counted)
    pipe = accel.load(smallest_bundle, "eager", device="cpu")
    picture = pipe("the cat", seed=1, steps=1).images[0]
    height, width = picture.size[::-1]
    assert left == [("Tensor", "torch.uint8", (1, height, width, 3))]
    exact = pipe("the cat", seed=1, steps=1, output_type="np").images[0]
    assert np.array_equal(np.asarray(picture), (exact * 255).round().astype(np.uint8))
    assert np.array_equal(pipe("the cat", seed=1, steps=1, output_type="pt").images[0].permute(1, 2, 0).numpy(), exact)


class Cuda:
    """A tensor that says it lies on a GPU."""

    is_cuda, shape, dtype, device = True, (2,), torch.float32, "cuda:0"

    def detach(self):
        return self


def test_a_copy_from_a_gpu_is_one_into_page_locked_memory_and_waits_for_it(monkeypatch):
    did = []

    class Pinned:
        def copy_(self, x, non_blocking):
            did.append(("copy", non_blocking))

        def numpy(self):
            did.append("numpy")
            return np.zeros(2)

    class Stream:
        def synchronize(self):
            did.append("synchronize")

    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: did.append(pin_memory) or Pinned())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    to_host(Cuda())
    assert did == [True, ("copy", True), "synchronize", "numpy"]


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_timesteps_are_uploaded_once_before_the_first_step(engine, smallest_bundle, monkeypatch):
    """From pageable memory an upload waits for the device: one for each step was a wait for each step."""
    pipe = accel.load(smallest_bundle, engine, **({"device": "cpu"} if engine == "eager" else {}))
    unet, events = pipe.engines["unet"], []
    array, run = unet.array, unet.run
    monkeypatch.setattr(unet, "array", lambda value: (events.append(type(value).__name__), array(value))[1])
    monkeypatch.setattr(unet, "run", lambda feeds: (events.append("run"), run(feeds))[1])
    pipe("the cat", seed=1, steps=3)
    first = events.index("run")
    steps = [event for event in events[first:] if event == "run"]
    assert len(steps) == 3
    if engine == "eager":
        assert "ndarray" not in events[first:], "what a step needs is on the device already"
