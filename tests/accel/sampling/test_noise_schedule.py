"""The forward process against diffusers' schedulers, and every field of their configs accounted for."""

import json
import re

import diffusers
import numpy as np
import pytest

from accel.errors import UserError
from accel.sampling.noise_schedule import NoiseSchedule, add_noise
from accel.sampling.samplers import own_sampler, table

SD15 = dict(
    _class_name="PNDMScheduler",
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


def test_published_values_of_alpha_bar():
    a = NoiseSchedule.from_config(SD15).alphas_cumprod
    np.testing.assert_allclose(
        a[[999, 749, 499, 399, 249]], [0.0046601, 0.0566234, 0.2776694, 0.4260861, 0.6754321], rtol=2e-5
    )


@pytest.mark.parametrize(
    "config",
    [
        dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
        dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        dict(beta_schedule="squaredcos_cap_v2"),
        dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True),
        dict(trained_betas=list(np.linspace(0.001, 0.3, 50)), num_train_timesteps=50),
        {},
    ],
)
def test_alpha_bar_equals_diffusers(config):
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(NoiseSchedule.from_config(config).alphas_cumprod, theirs, atol=2e-6)


def test_absent_fields_mean_what_they_mean_to_the_scheduler_class():
    lcm = NoiseSchedule.from_config({"_class_name": "LCMScheduler"})
    np.testing.assert_allclose(lcm.alphas_cumprod, diffusers.LCMScheduler().alphas_cumprod.numpy(), atol=2e-6)
    assert NoiseSchedule.from_config({"_class_name": "PNDMScheduler"}).set_alpha_to_one is False
    assert NoiseSchedule.from_scheduler({"_class_name": "DDIMScheduler"}).set_alpha_to_one is True


@pytest.mark.parametrize("name", ["PNDM", "DPMSolverMultistep", "EulerDiscrete", "LCM", "DDIM", "UniPCMultistep"])
def test_reads_what_diffusers_saves(tmp_path, name):
    kept = {k: v for k, v in SD15.items() if not k.startswith("_")}
    getattr(diffusers, f"{name}Scheduler").from_config(kept).save_pretrained(tmp_path)
    schedule = NoiseSchedule.from_folder(tmp_path)
    assert schedule.T == 1000 and schedule.steps_offset == 1


@pytest.mark.parametrize("change", [{}, {"clip_sample": True}, {"thresholding": True}])
def test_a_schedule_alone_does_not_ignore_that_predictions_are_clipped(change):
    """Left out, clip_sample is true to DDIMScheduler; a sampler honours it, alpha_bar cannot."""
    config = {"_class_name": "DDIMScheduler"} | change
    assert diffusers.DDIMScheduler.from_config(config).config.clip_sample
    with pytest.raises(UserError, match="clip_sample|thresholding") as error:
        NoiseSchedule.from_config(config)
    field = error.value.fix.split('"')[1]
    NoiseSchedule.from_config(config | {"clip_sample": False, field: False})
    assert NoiseSchedule.from_scheduler(config).alphas_cumprod.shape == (1000,)


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_train_timesteps", 0),
        ("num_train_timesteps", "1000"),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", ["0.1"]),
        ("beta_start", "0.00085"),
        ("beta_schedule", ["linear"]),
        ("beta_schedule", "karras"),
        ("prediction_type", "velocity"),
        ("prediction_type", 1),
        ("timestep_spacing", "karras"),
        ("steps_offset", 1.5),
        ("use_karras_sigmas", "yes"),
        ("clip_sample", 1),
        ("solver_order", 2.0),
        ("disable_corrector", 3),
        ("sigma_min", "0.03"),
        ("shift", 3.0),
        ("of_a_later_diffusers", True),
    ],
)
def test_a_field_that_nobody_knows_or_of_a_wrong_type_is_one_sentence(field, value):
    with pytest.raises(UserError, match=field):
        NoiseSchedule.from_scheduler({"_class_name": "EulerDiscreteScheduler", field: value})


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver"),
        ("DPMSolverMultistepScheduler", "solver_order", 4),
        ("DPMSolverMultistepScheduler", "variance_type", "learned"),
        ("UniPCMultistepScheduler", "predict_x0", False),
        ("UniPCMultistepScheduler", "use_dynamic_shifting", True),
        ("EulerDiscreteScheduler", "prediction_type", "flow_prediction"),
        ("EulerAncestralDiscreteScheduler", "prediction_type", "sample"),
        ("DDPMScheduler", "variance_type", "fixed_large_log"),
    ],
)
def test_what_a_sampler_cannot_honour_is_named_and_the_advice_works(name, field, value):
    config = SD15 | {"_class_name": name, field: value}
    with pytest.raises(UserError, match=field) as error:
        own_sampler(config)
    assert repr(value) in error.value.message
    advised = re.search(r"use (\S+?)(,| |$)|set it to (true)", error.value.fix)
    wanted = {"true": True, "2": 2, "False": False}.get(advised[1] or advised[3], (advised[1] or "").strip("'"))
    if field != "prediction_type" or name != "EulerDiscreteScheduler":
        assert own_sampler(config | {field: wanted})
    # Another sampler that does not read the field draws with the config as it is.
    other = "dmd2" if field == "prediction_type" else "ddim"
    if value not in ("flow_prediction", "sample"):
        table(other, NoiseSchedule.from_scheduler(config), 4)


def test_a_zero_terminal_snr_that_its_class_does_not_read_is_refused():
    with pytest.raises(UserError, match="rescale_betas_zero_snr.*PNDMScheduler"):
        NoiseSchedule.from_scheduler(SD15 | {"rescale_betas_zero_snr": True})


def test_solver_fields_bind_only_a_config_of_that_solver():
    config = {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "solver_order": 3}
    assert own_sampler(config) == "unipc"
    three = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}
    assert (
        own_sampler(three) == "dpmpp_3m"
        and own_sampler(three | {"algorithm_type": "sde-dpmsolver++"}) == "dpmpp_3m_sde"
    )
    assert own_sampler({"_class_name": "KDPM2DiscreteScheduler"}) is None


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_missing_or_damaged_file_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "scheduler_config.json").write_text(text)
    with pytest.raises(UserError, match="scheduler_config.json"):
        NoiseSchedule.from_folder(tmp_path)


def test_from_folder_equals_from_config(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SD15))
    a, b = NoiseSchedule.from_folder(tmp_path), NoiseSchedule.from_config(SD15)
    assert (a.alphas_cumprod == b.alphas_cumprod).all() and a.prediction_type == "epsilon"


@pytest.mark.parametrize(
    "bad", [[], [0.9, 0.9], [0.5, 0.6], [1.1, 0.5], [1.0, 0.5], [0.5, -0.1], [float("nan"), 0.1], [[0.9, 0.5]]]
)
def test_alpha_bar_that_is_none_is_refused(bad):
    with pytest.raises(UserError, match="alphas_cumprod"):
        NoiseSchedule(alphas_cumprod=np.array(bad))


def test_the_schedule_cannot_be_changed_and_does_not_hold_on_to_the_callers_array():
    mine = np.array([0.9, 0.5])
    schedule = NoiseSchedule(alphas_cumprod=mine)
    mine[0] = 0.0
    assert schedule.alpha_bar(0) == 0.9
    with pytest.raises(ValueError):
        schedule.alphas_cumprod[0] = 0.1


def test_between_timesteps_sigma_is_linear():
    schedule = NoiseSchedule.from_config(SD15)
    assert schedule.sigma(10.25) == pytest.approx(0.75 * schedule.sigma(10) + 0.25 * schedule.sigma(11), rel=1e-12)
    for t in (-1, 999.5, 1000):
        with pytest.raises(UserError, match="timestep"):
            schedule.alpha_bar(t)


def test_add_noise_equals_diffusers():
    import torch

    x0, eps = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    kept = {k: v for k, v in SD15.items() if not k.startswith("_")}
    theirs = diffusers.DDIMScheduler.from_config(kept).add_noise(x0, eps, torch.tensor([749, 749]))
    ours = add_noise(NoiseSchedule.from_config(SD15), x0, eps, 749)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert add_noise(NoiseSchedule.from_config(SD15), x0.numpy(), eps.numpy(), 749).dtype == np.float32
