"""A sampler is added by its function and its entry in `SAMPLERS`; everything else follows from the entry."""

import json
import math

import numpy as np
import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.cli import main
from accel.pipeline import conditioning
from accel.sampling import noise
from accel.sampling.samplers import SAMPLERS, NoiseSchedule, Sampler, grid, sample
from accel.sampling.solvers import conversions


def sample_midpoint(model, x, schedule, timesteps, *, noise=None, callback=None, constrain=None, start=0):
    """The explicit midpoint rule on dx/dsigma = eps: second order, two calls of the model a step."""
    levels = np.array([schedule.sigma(t) for t in range(schedule.T)])
    sigmas = [schedule.sigma(t) for t in timesteps] + [0.0]

    def slope(y, s, t):
        x = y * (1 / math.sqrt(1 + s**2))
        _, (ex, ep) = conversions(schedule.prediction_type, 1 / math.sqrt(1 + s**2), s / math.sqrt(1 + s**2), t)
        return ex * x + ep * model(x, t)

    for i in range(start, len(timesteps)):
        s, s_next = sigmas[i], sigmas[i + 1]
        s_mid = (s + s_next) / 2
        y = x * math.sqrt(1 + s**2)
        middle = y + (s_mid - s) * slope(y, s, timesteps[i])
        y = y + (s_next - s) * slope(middle, s_mid, float(np.interp(s_mid, levels, np.arange(schedule.T))))
        x = y * (1 / math.sqrt(1 + s_next**2))
        if constrain:
            x = constrain(i, x)
        if callback:
            callback(i, timesteps[i], x)
    return x


@pytest.fixture(autouse=True)
def midpoint(monkeypatch):
    entry = Sampler(
        function=sample_midpoint,
        grid=lambda schedule, steps: grid("euler", schedule, steps),
        steps=12,
        stochastic=False,
        description="explicit midpoint: second order, two calls of the model a step",
        scheduler="KDPM2DiscreteScheduler",
    )
    monkeypatch.setitem(SAMPLERS, "midpoint", entry)


def test_it_is_of_second_order_and_takes_its_default_steps():
    schedule = NoiseSchedule.from_config(dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()

    def model(x, t):
        return torch.tanh(x * 0.7) * schedule.sigma(t) / math.sqrt(1 + schedule.sigma(t) ** 2)

    exact = sample("midpoint", model, x, schedule, 900)
    error = {n: (sample("midpoint", model, x, schedule, n) - exact).abs().max().item() for n in (20, 40)}
    euler = (sample("euler", model, x, schedule, 80) - exact).abs().max().item()
    assert error[40] < error[20] / 2 and error[40] < euler / 4
    assert torch.equal(sample("midpoint", model, x, schedule), sample("midpoint", model, x, schedule, 12))


def test_a_loaded_bundle_draws_with_it(smallest_bundle):
    pipe = accel.load(smallest_bundle, "onnxruntime", threads=1)
    seen = []
    how = dict(guidance_scale=0.0, seed=3, output_type="latent", callback=lambda i, t, x: seen.append(i))
    drawn = pipe("the cat", sampler="midpoint", steps=4, height=32, width=32, **how).latents
    text = conditioning.encode(
        {"text_encoder": (pipe.tokenizers["text_encoder"], pipe.engines["text_encoder"])}, ["the cat"]
    )

    def model(x, t):
        return pipe.engines["unet"](sample=x, timestep=np.array(t, np.float32), **text)["out_sample"]

    assert seen == [0, 1, 2, 3]
    assert np.array_equal(drawn, sample("midpoint", model, noise.normal([3], 0, (4, 8, 8)), pipe.schedule, 4))


def test_it_can_be_evaluated():
    from accel.distill.evaluation.protocols import PROTOCOLS, overridden, schedulers

    assert schedulers()["midpoint"] == "KDPM2DiscreteScheduler"
    assert overridden(PROTOCOLS["digits"].sampling, sampler="midpoint").sampler == "midpoint"


def test_the_command_line_exports_and_runs_with_it(smallest, tmp_path, capsys):
    out = tmp_path / "bundle"
    components = "text_encoder,unet,vae_decoder"
    command = ["export", str(smallest), str(out), "--profile", "static", "--components", components]
    assert main([*command, "--sampler", "midpoint", "--steps", "2"]) == 0
    assert dict(Bundle.open(out).manifest.sampler) == {"name": "midpoint", "steps": 2, "guidance": 7.5}
    capsys.readouterr()
    command = ["run", str(out), "--prompt", "the cat", "--engine", "onnxruntime", "--json"]
    for more in ([], ["--sampler", "midpoint", "--steps", "3"]):
        assert main([*command, *more, "--out", str(tmp_path / "cat.png"), "--overwrite"]) == 0
        assert json.loads(capsys.readouterr().out)["images"]
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "midpoint" in capsys.readouterr().out
