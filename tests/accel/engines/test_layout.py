"""Engines of torch on torch.channels_last: the same image within rounding, and weights that stay in that format."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import accel
from accel.errors import UserError
from accel.parity import relative_l2


def feeds(unet):
    torch.manual_seed(0)
    text = next(s for s in unet.component.inputs if s.name == "encoder_hidden_states")
    made = dict(sample=torch.randn(2, 4, 8, 8), timestep=torch.tensor(500))
    made["encoder_hidden_states"] = torch.randn(2, *(77 if isinstance(d, str) else d for d in text.shape[1:]))
    return {s.name: made[s.name].to(getattr(torch, s.dtype)) for s in unet.component.inputs if s.name in made}


def kernels(engine):
    """The weights of convolutions with more than one tap, which alone tell the formats apart."""
    weights = {name: p for name, p in engine.module.model.named_parameters() if p.dim() == 4 and p.shape[-1] > 1}
    assert len(weights) > 5
    return weights


def are_last(weights):
    return {value.is_contiguous(memory_format=torch.channels_last) for value in weights.values()}


def test_it_computes_the_same_in_the_other_format(smallest_bundle):
    plain, other = (
        accel.load_engine(smallest_bundle, "unet", "eager", device="cpu", layout=name) for name in ("nchw", "nhwc")
    )
    assert are_last(kernels(other)) == {True} and are_last(kernels(plain)) == {False}
    made = [engine(**feeds(engine))["out_sample"] for engine in (plain, other)]
    assert made[0].shape == made[1].shape and relative_l2(made[1].numpy(), made[0].numpy()) < 1e-5
    assert ", nhwc" in other.description and "nhwc" not in plain.description


def test_new_weights_take_the_format_and_old_ones_come_back(smallest_bundle):
    unet = accel.load_engine(smallest_bundle, "unet", "eager", device="cpu", layout="nhwc")
    before = unet(**feeds(unet))["out_sample"].clone()
    shape = unet.module.model.conv_in.weight.shape
    unet.set_weights({"conv_in.weight": np.zeros(shape, np.float32)})
    assert are_last(kernels(unet)) == {True}
    assert not torch.equal(unet(**feeds(unet))["out_sample"], before)
    unet.set_weights({})
    assert torch.equal(unet(**feeds(unet))["out_sample"], before)


def test_weights_that_wait_in_host_memory_keep_it(fakes, monkeypatch, smallest_bundle):
    from accel.engines import eager

    monkeypatch.setattr(eager, "Cuda", fakes("cuda").Cuda)
    unet = accel.load_engine(smallest_bundle, "unet", "eager", device="cuda", layout="nhwc", offload="model")
    assert are_last(kernels(unet)) == {True}


def test_the_command_line_has_it(smallest_bundle, sd15_bundle, tmp_path, capsys):
    with pytest.raises(UserError, match="unknown layout 'nwhc'"):
        accel.load_engine(smallest_bundle, "unet", "eager", device="cpu", layout="nwhc")
    from accel.cli import main

    kept = tmp_path / "bench.json"
    command = ["bench", str(sd15_bundle), "--engine", "eager", "--engine", "eager:nhwc", "--rounds", "1"]
    command += ["--steps", "1", "--prompt", "cat", "--threads", "1", "--out", str(kept)]
    assert main(command) == 0, capsys.readouterr().err
    assert "eager:nhwc" in json.dumps(json.loads(kept.read_text()))
    run = ["run", str(sd15_bundle), "--engine", "eager", "--layout", "nhwc", "--steps", "1", "--prompt", "cat"]
    assert main([*run, "--out", str(tmp_path / "one.png")]) == 0, capsys.readouterr().err
    assert main([*run, "--out", str(tmp_path / "two.png"), "--engine", "onnxruntime"]) == 1
    assert "layout" in capsys.readouterr().err
