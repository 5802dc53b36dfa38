"""float32 is float32 on a GPU: torch's settings hold within the block, and are the process's own after it."""

from __future__ import annotations

import threading

import pytest
import torch

import accel
from accel.engines import eager
from accel.trt.tf32 import float32_in_tf32

PLACES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def now():
    """The old switches, which torch.compile reads, and the new values."""
    switches = [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    return switches, [place.fp32_precision for place in PLACES], torch.get_float32_matmul_precision()


def allowed():
    """Whether TF32 is allowed, by all that can be asked."""
    switches, values, products = now()
    (found,) = {*switches, *("tf32" == value for value in values), products != "highest"}
    return found


@pytest.mark.parametrize("allow", [False, True])
def test_settings_hold_inside_and_are_restored(allow):
    before = now()
    assert before[0] == [False, True], "torch's default: cuDNN in TF32"
    with float32_in_tf32(allow), float32_in_tf32(allow):
        assert allowed() is allow
    assert now() == before
    with pytest.raises(ZeroDivisionError), float32_in_tf32(allow):
        1 / 0  # noqa: B018
    assert now() == before


def test_what_the_caller_set_by_the_new_names_is_restored():
    """torch refuses to read the old switches then."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    try:
        with float32_in_tf32(True):
            assert allowed()
        assert [place.fp32_precision for place in PLACES[1:]] == ["ieee", "tf32"]
    finally:
        conv.fp32_precision = before


def test_threads_that_want_something_else_wait():
    before, entered, seen = now(), threading.Event(), []

    def other():
        entered.set()
        with float32_in_tf32(True):
            seen.append(allowed())

    with float32_in_tf32(False):
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait()
        thread.join(0.05)
        assert not seen and not allowed()
    thread.join()
    assert seen == [True] and now() == before


@pytest.mark.parametrize("tf32", [False, True])
def test_the_reference_is_float32_on_cuda(tf32, smallest_bundle, monkeypatch):
    """A device that calls itself cuda, on the CPU: cuDNN's convolutions are in TF32 by default."""
    monkeypatch.setattr(eager, "check_device", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    vae = accel.load_engine(smallest_bundle, "vae_decoder", "eager", device="cuda", tf32=tf32)
    vae.device, seen = "cpu", []
    vae.module.register_forward_pre_hook(lambda *_: seen.append(allowed()))
    vae(latent_sample=torch.zeros(1, 4, 8, 8))
    assert seen == [tf32] and ("tf32" in vae.description) is tf32
