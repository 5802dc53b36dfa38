"""Every scheduler class against diffusers, over its own fields, as `benchmarks/sampler_sweep.py` walks them."""

import importlib.util
import inspect
import json
import logging
import math
import warnings
from pathlib import Path

import diffusers
import pytest
import torch

from accel.sampling import scheduler_config
from accel.sampling.linear import run
from accel.sampling.samplers import SAMPLERS, NoiseSchedule, needs_noise, own_sampler, sample, table

ROOT = Path(__file__).parents[3]
spec = importlib.util.spec_from_file_location("sampler_sweep", ROOT / "benchmarks" / "sampler_sweep.py")
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)
# Field -> a text of the reason for which some of its values are refused, or diffusers itself gives NaN.
REFUSED = {
    "prediction_type": "use 'epsilon'",
    "variance_type": "not supported",
    "algorithm_type": "not supported",
    "skip_prk_steps": "at least 4 steps",
    "use_dynamic_shifting": "use False",
    "shift_terminal": "at least 2 steps",
    "predict_x0": "sigma_min",
    "lower_order_final": "sigma_min",
    "solver_type": "",
}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", scheduler_config.CLASSES)
def test_the_fields_and_their_defaults_are_diffusers(name):
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters
    theirs = {field: value.default for field, value in signature.items() if field != "self"}
    assert scheduler_config.CLASSES[name] == theirs
    assert set(theirs) <= set(sweep.VALUES), "a new field: say in the sweep what is to be tried"


@pytest.mark.parametrize("name", scheduler_config.CLASSES)
def test_every_value_of_every_field_draws_as_diffusers_does_or_is_refused(name):
    cls, tried = getattr(diffusers, name), 0
    for field in sweep.fields(cls):
        for k, change in enumerate(sweep.cases(cls, field)):
            # All step counts for the plain config, and two of them in turn for each change.
            few = [sweep.STEPS[(tried + j) % len(sweep.STEPS)] for j in (k, k + 4)]
            for steps in few if tried else sweep.STEPS:
                result = sweep.difference(cls, change, steps)
                if isinstance(result, str):
                    assert field in REFUSED and (REFUSED[field] in result or "NaN" in result), (field, change, result)
                else:
                    assert result < sweep.TOLERANCE, (field, change, steps, result)
            tried += 1


def test_the_table_of_the_docs_is_the_measured_one_and_has_no_silent_cell():
    record = json.loads(sweep.RECORD.read_text())
    for text in (sweep.page(record["classes"]), sweep.names_table(), sweep.few_step_table()):
        assert text in sweep.PAGE.read_text(), "python benchmarks/sampler_sweep.py --page"
    assert set(record["classes"]) == set(scheduler_config.CLASSES)
    for cells in record["classes"].values():
        for field, cell in cells.items():
            assert cell["largest"] is not None or cell["refused"], field
            assert (cell["largest"] or 0) < record["tolerance"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_what_its_scheduler_says_and_starts_in_the_middle(name):
    """Image to image: begin_index, add_noise and a first step without history, as diffusers' pipelines do it."""
    entry = SAMPLERS[name]
    if name == "dmd2":
        return  # a grid of its own; `test_dmd2_equals_lcm_scheduler`
    cls, steps = getattr(diffusers, entry.scheduler), 12
    config = {key: value for key, value in sweep.MODEL.items() if key in entry.fields} | dict(entry.pinned)
    config |= {"timestep_spacing": "leading"} if "timestep_spacing" in entry.fields else {}
    assert own_sampler(config | {"_class_name": entry.scheduler}) == name
    schedule = NoiseSchedule.from_scheduler(config | {"_class_name": entry.scheduler})
    generator = torch.Generator().manual_seed(1)
    x0, *noise = (torch.randn(2, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(40))
    scheduler = cls(**config)
    scheduler.set_timesteps(steps)
    start = 4 * entry.order
    if name == "lms":
        start = 0  # its coefficients there are of a history that it does not have
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    x = scheduler.add_noise(x0, noise[0], scheduler.timesteps[start : start + 1])
    module = inspect.getmodule(cls)
    original, i = getattr(module, "randn_tensor", None), start
    if original is not None:
        module.randn_tensor = lambda *_, **__: noise[i]
    try:
        for i, t in enumerate(scheduler.timesteps[start:], start):  # noqa: B007 (the noise's)
            x = scheduler.step(sweep.model(scheduler.scale_model_input(x, t).double(), t), t, x, return_dict=False)[0]
    finally:
        if original is not None:
            module.randn_tensor = original
    options = {"eta": 0.3} if name == "tcd" else {}
    made = table(name, schedule, steps, start=start, **options)
    begin = made.noised(x0, noise[0], start)
    ours = run(made, sweep.model, begin, noise=noise.__getitem__, noised=True)
    assert float((ours - x).abs().max() / x.abs().max()) < sweep.TOLERANCE
    again = sample(
        name, sweep.model, begin, schedule, steps, start=start, noised=True, noise=noise.__getitem__, **options
    )
    assert torch.equal(again, ours)


@pytest.mark.parametrize(
    "name, option, value, field",
    [
        *(("euler", "sigmas", kind, f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta")),
        ("dpmpp_2m_sde", "sigmas", "lu", "use_lu_lambdas"),
        ("unipc", "timestep_spacing", "trailing", "timestep_spacing"),
    ],
)
def test_an_option_is_the_field_it_stands_for(name, option, value, field):
    base = sweep.MODEL | {"_class_name": SAMPLERS[name].scheduler}
    stood = NoiseSchedule.from_scheduler(base | {field: value if option == "timestep_spacing" else True})
    plain = NoiseSchedule.from_scheduler(base)
    assert table(name, plain, 7, **{option: value}) == table(name, stood, 7) != table(name, plain, 7)
    if option == "sigmas":
        assert table(name, stood, 7, sigmas="none") == table(name, plain, 7)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("ddim", dict(sigmas="karras"), ["use_karras_sigmas", "euler"]),
        ("heun", dict(sigmas="lu"), ["use_lu_lambdas", "dpmpp_2m"]),
        ("euler", dict(sigmas="square"), ["square", "karras"]),
        ("euler", dict(eta=0.5), ["eta", "ddim"]),
        ("tcd", dict(eta=1.5), ["1.5"]),
        ("dpmpp_2s", dict(timestep_spacing="trailing"), ["timestep_spacing", "dpmpp_2m"]),
        ("euler", dict(timestep_spacing="even"), ["even", "trailing"]),
        ("euler", dict(shift=3.0), ["shift", "unipc"]),
        ("dpmpp_2m", dict(shift="three"), ["three"]),
    ],
)
def test_an_option_that_a_sampler_does_not_have_is_refused_with_those_that_have_it(name, options, words):
    from accel.errors import UserError

    with pytest.raises(UserError) as error:
        table(name, NoiseSchedule.from_scheduler(sweep.MODEL), 4, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_highest_quantile_of_beta_sigmas_needs_no_scipy():
    from scipy.stats import beta

    from accel.sampling.grids import beta_quantile

    for q in (0.0, 1e-6, 0.03, 0.5, 0.77, 1 - 1e-9, 1.0):
        assert math.isclose(beta_quantile(q, 0.6), beta.ppf(q, 0.6, 0.6), rel_tol=1e-9, abs_tol=1e-14)


def test_noise_is_needed_where_a_table_draws_any():
    schedule = NoiseSchedule.from_scheduler(sweep.MODEL)
    for name in SAMPLERS:
        assert bool(table(name, schedule, 5).draws) == needs_noise(name), name
    assert table("tcd", schedule, 5, eta=0.3).draws == [0, 1, 2, 3] and needs_noise("tcd", eta=0.3)
