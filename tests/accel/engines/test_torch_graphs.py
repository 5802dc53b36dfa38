"""CUDA graphs of eager and compile, on the fake CUDA: a replay computes on the same memory what the capture did."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import accel
from accel.engines import eager
from accel.errors import UserError


@pytest.fixture
def cuda(fakes, monkeypatch):
    """The fake device in the place of the real one."""
    fake = fakes("cuda").Cuda
    monkeypatch.setattr(eager, "Cuda", fake)
    return fake


def inputs(unet, seed=0, batch=2):
    torch.manual_seed(seed)
    spec = next(s for s in unet.component.inputs if s.name == "encoder_hidden_states")
    text = torch.randn(batch, *(77 if isinstance(d, str) else d for d in spec.shape[1:]))
    return dict(sample=torch.randn(batch, 4, 8, 8), timestep=torch.tensor(500 - seed), encoder_hidden_states=text)


def feeds(unet, **changed):
    made = inputs(unet, **changed)
    dtypes = {s.name: getattr(torch, s.dtype) for s in unet.component.inputs}
    return {name: value.to(dtypes[name]) for name, value in made.items()}


def test_a_step_is_captured_once_for_each_shape(cuda, smallest_bundle, monkeypatch):
    plain = accel.load_engine(smallest_bundle, "unet", "eager", device="cpu")
    unet = accel.load_engine(smallest_bundle, "unet", "eager", cuda_graph="step")
    assert "CUDA graph of the step" in unet.description
    captures, capture = [], cuda.capture
    monkeypatch.setattr(cuda, "capture", lambda self, *a: captures.append(1) or capture(self, *a))
    kept = []
    for seed in range(3):
        given = feeds(unet, seed=seed)
        kept.append((unet(**given)["out_sample"], plain(**given)["out_sample"]))
    for ours, theirs in kept:  # outputs of earlier calls are not overwritten by later ones
        assert torch.equal(ours, theirs)
    assert len(captures) == 1
    given = feeds(unet, batch=1)
    assert torch.equal(unet(**given)["out_sample"], plain(**given)["out_sample"]) and len(captures) == 2


def test_other_weights_are_captured_anew(cuda, smallest_bundle):
    plain = accel.load_engine(smallest_bundle, "unet", "eager", device="cpu")
    unet = accel.load_engine(smallest_bundle, "unet", "eager", cuda_graph="step")
    given = feeds(unet)
    first = unet(**given)["out_sample"]
    weights = {"conv_out.bias": np.ones(4, np.float32)}
    for engine in (plain, unet):
        engine.set_weights(weights)
    changed = unet(**given)["out_sample"]
    assert torch.equal(changed, plain(**given)["out_sample"]) and not torch.equal(changed, first)


@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_the_whole_image_is_the_same_and_its_loop_one_launch(cuda, smallest_bundle, engine, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)  # its code cannot be recorded on a CPU
    captures, capture = [], cuda.capture
    monkeypatch.setattr(cuda, "capture", lambda self, *a: captures.append(1) or capture(self, *a))
    theirs = accel.load(smallest_bundle, "eager", device="cpu")(["the cat"], seed=1, steps=3, output_type="np")
    pipe = accel.load(smallest_bundle, engine, cuda_graph="loop")
    for _ in range(2):
        ours = pipe(["the cat"], seed=1, steps=3, output_type="np")
        assert np.array_equal(ours.latents, theirs.latents) and np.array_equal(ours.images, theirs.images)
    assert len(captures) == 2  # one of the loop, one of the decoder; text encoders look at values on the host
    assert "CUDA graph" not in pipe.engines["text_encoder"].description


def test_wrong_uses_are_refused(cuda, smallest_bundle):
    with pytest.raises(UserError, match="not captured on 'cpu'"):
        accel.load_engine(smallest_bundle, "unet", "eager", device="cpu", cuda_graph="loop")
    with pytest.raises(UserError, match="no cuda_graph 'often'"):
        accel.load_engine(smallest_bundle, "unet", "eager", cuda_graph="often")
    with pytest.raises(UserError, match="reduce-overhead captures CUDA graphs itself"):
        accel.load_engine(smallest_bundle, "unet", "compile", mode="reduce-overhead", cuda_graph="loop")


def test_the_current_device_of_the_caller_stays(cuda, smallest_bundle, monkeypatch):
    monkeypatch.setattr(cuda, "names", ("Fake GPU", "Fake GPU 2"))
    unet, seen = accel.load_engine(smallest_bundle, "unet", "eager", device="cuda:1", cuda_graph="step"), []
    unet.module.register_forward_pre_hook(lambda *_: seen.append(cuda.active_index))
    unet(**feeds(unet))
    assert seen and set(seen) == {1} and cuda.active_index == 0
