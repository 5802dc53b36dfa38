"""float32 is float32 on a GPU: torch's settings hold within the block, and are the process's own after it."""

from __future__ import annotations

import threading

import pytest
import torch

import accel
from accel.engines import eager
from accel.tf32 import float32_as

PLACES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)


def now():
    return [place.fp32_precision for place in PLACES]


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_settings_hold_inside_and_are_restored(precision):
    before = now()
    with float32_as(precision), float32_as(precision):
        assert now() == [precision] * 2
    assert now() == before
    with pytest.raises(ZeroDivisionError), float32_as(precision):
        1 / 0  # noqa: B018
    assert now() == before


def test_threads_that_want_something_else_wait():
    before, entered, seen = now(), threading.Event(), []

    def other():
        entered.set()
        with float32_as("tf32"):
            seen.append(now())

    with float32_as("ieee"):
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
        thread.join(0.05)
        assert not seen and now() == ["ieee"] * 2
    thread.join()
    assert seen == [["tf32"] * 2] and now() == before


@pytest.mark.parametrize(("tf32", "precision"), [(False, "ieee"), (True, "tf32")])
def test_the_reference_is_float32_on_cuda(tf32, precision, smallest_bundle, monkeypatch):
    """A device that calls itself cuda, on the CPU: cuDNN's convolutions are in TF32 by default."""
    monkeypatch.setattr(eager, "check_device", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    vae = accel.load_engine(smallest_bundle, "vae_decoder", "eager", device="cuda", tf32=tf32)
    vae.device, seen = "cpu", []
    vae.module.register_forward_pre_hook(lambda *_: seen.append(now()))
    vae(latent_sample=torch.zeros(1, 4, 8, 8))
    assert seen == [[precision] * 2] and ("tf32" in vae.description) is tf32
