"""Samplers against diffusers' schedulers on a toy nonlinear model, and against an exact solution."""

import math
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

from accel.errors import UserError
from accel.sampling.samplers import SAMPLERS, NoiseSchedule, add_noise, dmd2_timesteps, grid, needs_noise, sample, table

SD15 = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    num_train_timesteps=1000,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
    trained_betas=None,
)
SHAPE = (2, 4, 8, 8)


def toy(x, t):
    """A nonlinear stand-in for a UNet, in numpy or torch; t is rounded as a float32 network would see it."""
    tanh = torch.tanh if isinstance(x, torch.Tensor) else np.tanh
    return tanh(x * 0.7 + float(t) / 1000)


def start_noise(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def noises(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def theirs(scheduler, x, *, start=0, **kwargs):
    """A diffusers sampling loop as its pipelines write it."""
    for i, t in enumerate(scheduler.timesteps[start:]):
        step = {k: v(start + i) if callable(v) else v for k, v in kwargs.items()}
        x = scheduler.step(toy(scheduler.scale_model_input(x, t), t), t, x, **step).prev_sample
    return x


def assert_equal(ours, reference, tolerance=1e-5):
    assert ours.dtype == reference.dtype == torch.float32
    difference = (ours - reference).abs().max() / reference.abs().max()
    assert difference < tolerance, f"relative difference {difference:.2e}"


def test_dmd2_timesteps():
    assert dmd2_timesteps(1) == [399] and dmd2_timesteps(1, one_step=999) == [999]
    assert dmd2_timesteps(2) == [999, 499]
    assert dmd2_timesteps(4) == [999, 749, 499, 249]
    assert dmd2_timesteps(8) == [999, 874, 749, 624, 499, 374, 249, 124]
    for n in range(1, 1001):
        ts = dmd2_timesteps(n)
        assert len(ts) == n and ts[-1] >= 0 and all(a > b for a, b in zip(ts, ts[1:], strict=False))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_dmd2_equals_lcm_scheduler(steps, prediction):
    config = SD15 | dict(prediction_type=prediction)
    scheduler = diffusers.LCMScheduler.from_config(config)
    scheduler.set_timesteps(timesteps=dmd2_timesteps(steps))
    reference = theirs(scheduler, start_noise(), generator=torch.Generator().manual_seed(1))
    drawn = noises(steps)
    ours = sample("dmd2", toy, start_noise(), NoiseSchedule.from_config(config), steps, noise=drawn.__getitem__)
    assert_equal(ours, reference)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 25, 50])
def test_dpmpp_2m_equals_diffusers(steps, spacing, prediction):
    config = SD15 | dict(timestep_spacing=spacing, prediction_type=prediction)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    ours = sample("dpmpp_2m", toy, start_noise(), NoiseSchedule.from_config(config), steps)
    assert_equal(ours, theirs(scheduler, start_noise()))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing, last", [("leading", False), ("leading", True), ("trailing", True)])
@pytest.mark.parametrize("steps", [1, 5, 20, 50])
def test_ddim_equals_diffusers(steps, spacing, last, prediction):
    config = SD15 | dict(timestep_spacing=spacing, set_alpha_to_one=last, prediction_type=prediction)
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    ours = sample("ddim", toy, start_noise(), NoiseSchedule.from_config(config), steps)
    assert_equal(ours, theirs(scheduler, start_noise()))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_ddim_equals_diffusers(eta):
    scheduler = diffusers.DDIMScheduler.from_config(SD15)
    scheduler.set_timesteps(20)
    drawn = noises(20)
    reference = theirs(scheduler, start_noise(), eta=eta, variance_noise=drawn.__getitem__)
    schedule = NoiseSchedule.from_config(SD15)
    assert_equal(sample("ddim", toy, start_noise(), schedule, 20, noise=drawn.__getitem__, eta=eta), reference)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_euler_equals_diffusers(steps, spacing, prediction):
    config = SD15 | dict(timestep_spacing=spacing, prediction_type=prediction)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    ours = sample("euler", toy, start_noise(), NoiseSchedule.from_config(config), steps)
    # One linspace step is t = 0 alone, and the result is proportional to sigma there, which is 1.3e-5 off in their
    # float32 alpha_bar; with that alpha_bar the two agree to 1e-7.
    tolerance = 2e-5 if (steps, spacing) == (1, "linspace") else 1e-5
    assert_equal(ours, theirs(scheduler, start_noise() * scheduler.init_noise_sigma), tolerance)


@pytest.mark.parametrize(
    "name, scheduler",
    [
        ("ddim", diffusers.DDIMScheduler),
        ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler),
        ("euler", diffusers.EulerDiscreteScheduler),
    ],
)
@pytest.mark.parametrize("start", [1, 7, 19])
def test_image_to_image_equals_diffusers(name, scheduler, start):
    config = SD15 | dict(timestep_spacing="leading")
    scheduler, schedule = scheduler.from_config(config), NoiseSchedule.from_config(config)
    scheduler.set_timesteps(20)
    x0, eps = start_noise(3) * 0.5, start_noise(4)
    if name != "ddim":  # stateless in diffusers
        scheduler.set_begin_index(start)
    reference = theirs(scheduler, scheduler.add_noise(x0, eps, scheduler.timesteps[start : start + 1]), start=start)
    x = add_noise(schedule, x0, eps, grid(name, schedule, 20)[start])
    assert_equal(sample(name, toy, x, schedule, 20, start=start), reference)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "euler"])
def test_zero_terminal_snr_with_v_prediction(name):
    config = SD15 | dict(
        timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True, set_alpha_to_one=True
    )
    cls = {"ddim": "DDIM", "dpmpp_2m": "DPMSolverMultistep", "euler": "EulerDiscrete"}[name]
    scheduler = getattr(diffusers, f"{cls}Scheduler").from_config(config)
    scheduler.set_timesteps(10)
    x = start_noise()
    reference = theirs(scheduler, x * scheduler.init_noise_sigma)
    # Their Euler state is x0 + sigma eps, with sigma = 4096 here: x0 loses digits in float32. Ours has unit variance.
    tolerance = 1e-4 if name == "euler" else 1e-5
    assert_equal(sample(name, toy, x, NoiseSchedule.from_config(config), 10), reference, tolerance)


def test_zero_terminal_snr_has_no_x0_from_eps():
    schedule = NoiseSchedule.from_config(SD15 | dict(rescale_betas_zero_snr=True))
    with pytest.raises(UserError, match="no signal"):
        sample("dmd2", toy, start_noise(), schedule, 4, noise=lambda i: start_noise())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "name, scheduler",
    [
        ("ddim", diffusers.DDIMScheduler),
        ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler),
        ("euler", diffusers.EulerDiscreteScheduler),
    ],
)
def test_grids_equal_diffusers_for_every_step_count(name, scheduler, spacing):
    config = SD15 | dict(timestep_spacing=spacing)
    scheduler, schedule = scheduler.from_config(config), NoiseSchedule.from_config(config)
    for steps in range(1, 1001):
        ours = grid(name, schedule, steps)
        assert len(ours) == steps
        scheduler.set_timesteps(steps)
        np.testing.assert_allclose(ours, scheduler.timesteps.numpy()[:steps], atol=1e-3, err_msg=str(steps))


def test_no_spacing_means_each_samplers_own_default():
    schedule = NoiseSchedule.from_config(SD15)
    assert grid("ddim", schedule, 4) == [751, 501, 251, 1]
    assert grid("euler", schedule, 4) == [999, 666, 333, 0]
    assert grid("dpmpp_2m", schedule, 4) == [999, 749, 500, 250]


def test_convergence_to_the_exact_solution_for_gaussian_data():
    """For x0 ~ N(0, c^2) the optimal eps is linear in x, and the flow maps x_T to c x_T / std(x_T)."""
    schedule = NoiseSchedule.from_config(SD15 | dict(timestep_spacing="linspace", set_alpha_to_one=True))
    c, x, a = 2.0, np.array([-1.5, 0.1, 2.0]), schedule.alpha_bar(999)
    exact = c * x / math.sqrt(a * c**2 + 1 - a)

    def optimal(x, t):
        a = schedule.alpha_bar(t)
        return x * (math.sqrt(1 - a) / (a * c**2 + 1 - a))

    def error(name, steps):
        # From timestep to timestep: on a grid of its own DDIM goes down by T // steps, as diffusers' does.
        timesteps = grid(name, schedule, steps)
        return np.abs(sample(name, optimal, x, schedule, timesteps=timesteps) / exact - 1).max()

    assert error("ddim", 160) < 0.008 and error("ddim", 160) == pytest.approx(error("ddim", 40) / 4, rel=0.1)
    # Euler's own start at sigma_max N(0, 1) instead of sqrt(1 + sigma_max^2) N(0, 1) is 0.23 % off, whatever the steps.
    assert error("euler", 160) - 0.0023 == pytest.approx(error("ddim", 160), rel=0.05)
    # What second order is for: a fifth of the error at the same number of model calls.
    assert error("dpmpp_2m", 20) < 0.2 * error("ddim", 20)
    assert error("dpmpp_2m", 160) < 0.001


def all_runs():
    return [(name, {"noise": noises(20).__getitem__ if needs_noise(name) else None}) for name in SAMPLERS]


@pytest.mark.parametrize("name, options", all_runs())
def test_numpy_equals_torch(name, options):
    schedule = NoiseSchedule.from_config(SD15 | dict(timestep_spacing="leading"))
    as_torch = sample(name, toy, start_noise(), schedule, 8, **options)
    if options["noise"]:
        options = {"noise": lambda i: noises(20)[i].numpy()}
    as_numpy = sample(name, toy, start_noise().numpy(), schedule, 8, **options)
    assert isinstance(as_numpy, np.ndarray) and as_numpy.dtype == np.float32
    assert_equal(torch.from_numpy(as_numpy), as_torch, 1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", SAMPLERS)
def test_dtype_is_kept_and_the_input_left_alone(name, dtype):
    x = start_noise().numpy().astype(dtype)
    before = x.copy()
    seen = []

    def model(x, t):
        assert isinstance(t, (int, float)) and x.dtype == dtype
        return toy(x, t)

    result = sample(
        name,
        model,
        x,
        NoiseSchedule.from_config(SD15),
        3,
        noise=lambda i: before,
        callback=lambda i, t, x: seen.append((i, t, x)),
    )
    assert result.dtype == dtype and (x == before).all() and np.isfinite(result).all()
    assert [s[0] for s in seen] == list(range(len(seen))) and seen[-1][2] is result
    assert [s[1] for s in seen] == grid(name, NoiseSchedule.from_config(SD15), 3)


@pytest.mark.parametrize("name", ["dmd2", "ddim", "euler"])
def test_restarting_from_a_step_continues_the_same_run(name):
    """Not 2M, whose second order needs the step before: its first restarted step is first order."""
    schedule, drawn, states = NoiseSchedule.from_config(SD15), noises(6), []
    full = sample(
        name, toy, start_noise(), schedule, 6, noise=drawn.__getitem__, callback=lambda i, t, x: states.append(x)
    )
    again = sample(name, toy, states[2], schedule, 6, noise=drawn.__getitem__, start=3)
    assert_equal(again, full, 1e-6)


def test_a_callback_may_stop_the_run():
    class Stop(Exception):
        pass

    calls = []

    def callback(i, t, x):
        calls.append(i)
        if i == 1:
            raise Stop

    with pytest.raises(Stop):
        sample("ddim", toy, start_noise(), NoiseSchedule.from_config(SD15), 5, callback=callback)
    assert calls == [0, 1]


def test_noise_is_asked_for_only_where_it_is_needed():
    schedule = NoiseSchedule.from_config(SD15)
    asked = []

    def noise(i):
        asked.append(i)
        return start_noise(i)

    for name in SAMPLERS:
        asked.clear()
        sample(name, toy, start_noise(), schedule, 4, noise=noise)
        assert (
            asked
            == table(name, schedule, 4).draws
            == (
                list(range(3 + (name == "ddpm"))) if needs_noise(name) else []  # DDPM's at t = 1 is of 1e-10
            )
        ), name
    assert {name for name in SAMPLERS if needs_noise(name)} == {
        *("dmd2", "lcm", "ddpm", "euler_ancestral"),
        *(name for name in SAMPLERS if name.endswith("_sde")),
    }
    assert needs_noise("ddim", eta=0.5)
    with pytest.raises(UserError, match="noise"):
        sample("dmd2", toy, start_noise(), schedule, 4)
    sample("dmd2", toy, start_noise(), schedule, 1)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, "4"])
def test_impossible_step_counts(name, steps):
    with pytest.raises(UserError, match="steps"):
        sample(name, toy, start_noise(), NoiseSchedule.from_config(SD15), steps)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(timesteps=[]), "fall strictly"),
        (dict(timesteps=[499, 499]), "fall strictly"),
        (dict(timesteps=[249, 499]), "fall strictly"),
        (dict(timesteps=[1000, 499]), "leave the schedule"),
        (dict(timesteps=[499, -1]), "leave the schedule"),
        (dict(timesteps=[999, 499], steps=4), "2 timesteps"),
        (dict(steps=4, start=4), "start"),
        (dict(steps=4, start=-1), "start"),
        (dict(steps=4, eta=0.5), "no option eta"),
    ],
)
def test_wrong_use(options, message):
    with pytest.raises(UserError, match=message):
        sample("euler", toy, start_noise(), NoiseSchedule.from_config(SD15), **options)


def test_a_grid_too_fine_for_its_solver_is_an_error_not_a_nan():
    schedule = NoiseSchedule.from_config(SD15 | dict(timestep_spacing="leading"))
    with pytest.raises(UserError, match="fall strictly"):
        sample("dpmpp_2m", toy, start_noise(), schedule, 1000)


def test_unknown_sampler_lists_the_known_ones():
    with pytest.raises(UserError, match="dpmpp_2m"):
        sample("plms", toy, start_noise(), NoiseSchedule.from_config(SD15), 4)
    with pytest.raises(UserError, match="eta"):
        sample("ddim", toy, start_noise(), NoiseSchedule.from_config(SD15), 4, eta=1.5)


def test_default_steps_and_descriptions():
    schedule = NoiseSchedule.from_config(SD15)
    for name, entry in SAMPLERS.items():
        calls = entry.steps * entry.order - (entry.order - 1) + (name == "pndm")  # Heun's last step is of one call
        assert len(grid(name, schedule)) == calls and entry.description


def test_imports_no_torch():
    code = "import sys, accel.sampling.samplers; assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
