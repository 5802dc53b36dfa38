"""Every sampler against its class of diffusers, field by field: `docs/samplers.md`'s table and its JSON.

    python benchmarks/sampler_sweep.py            # measures, writes benchmarks/sampler-sweep.json and the docs' table
    python benchmarks/sampler_sweep.py --page     # writes the table anew from the JSON

For each scheduler class, each field of its `__init__` is set to each of its `VALUES`, the others staying at a Stable
Diffusion's; both sides draw from the same noise with a closed-form model in float64, for each of `STEPS`. A cell is the
largest difference over steps and values, relative to the largest number of the image, or a refusal's reason. A field
that a later diffusers adds has no values here, and the test that walks this sweep fails.

diffusers computes in float64 here, on the float32 noise levels that it makes itself.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from accel.errors import UserError
from accel.models.few_step import FAMILIES
from accel.sampling import scheduler_config
from accel.sampling.samplers import SAMPLERS, NoiseSchedule, own_sampler, sample

STEPS = (1, 2, 4, 8, 13, 20, 25, 30, 50)
TOLERANCE = 1e-5
ROOT = Path(__file__).parents[1]
RECORD, PAGE = ROOT / "benchmarks" / "sampler-sweep.json", ROOT / "docs" / "samplers.md"
MODEL = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, skip_prk_steps=True)
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
KARRAS = dict(use_karras_sigmas=True)
# Field -> what is tried: values, or dicts where a value needs company.
VALUES: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 500],
    "beta_start": [0.00085, 0.0001],
    "beta_end": [0.012, 0.02],
    "beta_schedule": ["scaled_linear", "linear", "squaredcos_cap_v2"],
    "trained_betas": [None, dict(trained_betas=np.linspace(0.001, 0.02, 400).tolist(), num_train_timesteps=400)],
    "prediction_type": ["epsilon", "v_prediction", "sample", FLOW],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [0, 1],
    "clip_sample": [False, True, dict(clip_sample=True, prediction_type="v_prediction")],
    "clip_sample_range": [dict(clip_sample=True, clip_sample_range=value) for value in (0.5, 2.0)],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [dict(thresholding=True, dynamic_thresholding_ratio=0.8, sample_max_value=3.0)],
    "sample_max_value": [dict(thresholding=True, sample_max_value=value) for value in (1.0, 2.0)],
    "rescale_betas_zero_snr": [
        False,
        *(
            dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing=spacing)
            for spacing in ("trailing", "leading")
        ),
    ],
    "set_alpha_to_one": [True, False],
    "skip_prk_steps": [True, False],
    "variance_type": [None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"],
    "interpolation_type": ["linear", "log_linear", dict(interpolation_type="log_linear", **KARRAS)],
    "use_karras_sigmas": [False, True, dict(use_karras_sigmas=True, beta_schedule="squaredcos_cap_v2")],
    "use_exponential_sigmas": [False, True],
    "use_beta_sigmas": [False, True],
    "use_lu_lambdas": [False, True],
    "sigma_min": [None, dict(sigma_min=0.1, **KARRAS)],
    "sigma_max": [None, dict(sigma_max=10.0, use_exponential_sigmas=True)],
    "timestep_type": ["discrete", dict(timestep_type="continuous", prediction_type="v_prediction")],
    "final_sigmas_type": ["zero", "sigma_min", dict(final_sigmas_type="sigma_min", **KARRAS)],
    "solver_order": [1, 2, 3, dict(solver_order=3, **KARRAS)],
    "algorithm_type": [
        "dpmsolver++",
        "sde-dpmsolver++",
        dict(algorithm_type="sde-dpmsolver++", solver_order=3, **KARRAS),
        dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
        dict(algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"),
        "deis",
    ],
    "solver_type": [
        *("midpoint", "heun", "logrho", "bh1", "bh2"),
        dict(solver_type="heun", algorithm_type="sde-dpmsolver++"),
        dict(solver_type="heun", solver_order=3),
        dict(solver_type="bh1", solver_order=3),
        dict(solver_type="bh1", solver_order=3, final_sigmas_type="sigma_min"),
    ],
    "lower_order_final": [True, False, dict(lower_order_final=False, solver_order=3, final_sigmas_type="sigma_min")],
    "euler_at_final": [True, False, dict(euler_at_final=True, final_sigmas_type="sigma_min")],
    "use_flow_sigmas": [False, FLOW],
    "flow_shift": [FLOW | dict(flow_shift=3.0)],
    "lambda_min_clipped": [-math.inf, -5.1, dict(lambda_min_clipped=-3.0, beta_schedule="squaredcos_cap_v2")],
    "use_dynamic_shifting": [False, FLOW | dict(use_dynamic_shifting=True)],
    "time_shift_type": ["exponential"],
    "shift_terminal": [None, FLOW | dict(shift_terminal=0.1)],
    "predict_x0": [True, dict(predict_x0=False, final_sigmas_type="sigma_min"), False],
    "disable_corrector": [[], [0, 1]],
    "solver_p": [None],
    "original_inference_steps": [50, 100, 1000],
    "timestep_scaling": [10.0, 0.01],
}


def classes() -> dict[str, type]:
    return {name: getattr(diffusers, name) for name in scheduler_config.CLASSES}


def fields(cls: type) -> list[str]:
    """The fields of a class's config, as its signature has them."""
    return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]


def cases(cls: type, field: str) -> Iterator[dict[str, Any]]:
    """The configs that try one field: what is changed from `MODEL`."""
    known = fields(cls)
    for value in VALUES[field]:
        change = value if isinstance(value, dict) else {field: value}
        if set(change) <= set(known):
            yield change


def model(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.7 * x + float(t) / 1000)


def theirs(cls: type, config: dict[str, Any], steps: int, x: torch.Tensor, noise: list[torch.Tensor]) -> torch.Tensor:
    """diffusers' loop, in float64."""
    scheduler = cls(**config)
    scheduler.set_timesteps(steps)
    for name in ("alphas_cumprod", "sigmas", "final_alpha_cumprod", "one"):
        if isinstance(getattr(scheduler, name, None), torch.Tensor):
            setattr(scheduler, name, getattr(scheduler, name).double())
    module = sys.modules[cls.__module__]
    drawn = {"i": 0}
    original = getattr(module, "randn_tensor", None)
    if original is not None:
        module.randn_tensor = lambda *_, **__: noise[drawn["i"]]
    try:
        if hasattr(scheduler, "set_begin_index"):  # else it looks its first timestep up, which may be there twice
            scheduler.set_begin_index(0)
        x = x * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            drawn["i"] = i
            given = scheduler.scale_model_input(x, t).double()
            more = {"eta": ETA[cls.__name__]} if cls.__name__ in ETA else {}
            x = scheduler.step(model(given, t), t, x, **more, return_dict=False)[0]
        return x
    finally:
        if original is not None:
            module.randn_tensor = original


ETA = {"DDIMScheduler": 0.4, "TCDScheduler": 0.3}


def difference(cls: type, change: dict[str, Any], steps: int) -> float | str:
    """The largest relative difference between the two for one config; a text where one of them refuses it."""
    config = {name: value for name, value in MODEL.items() if name in fields(cls)} | change
    generator = torch.Generator().manual_seed(0)
    x, *noise = (torch.randn(2, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2 * steps + 16))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = theirs(cls, config, steps, x, noise)
        reason = "" if torch.isfinite(reference).all() else "NaN in diffusers"
    except Exception as error:  # whatever diffusers makes of a config that it does not take
        said = " ".join(str(error).split())[:60] or type(error).__name__
        reason = f"refused by diffusers: {said}"
    try:
        stored = json.loads(json.dumps(config)) | {"_class_name": cls.__name__}
        name = own_sampler(stored)
        assert name is not None
        options = {"eta": ETA[cls.__name__]} if cls.__name__ in ETA else {}
        schedule = NoiseSchedule.from_scheduler(stored)
        ours = sample(name, model, x, schedule, steps, noise=noise.__getitem__, **options)
    except UserError as error:
        return f"{error.message}; {error.fix}"
    if reason:
        return reason
    return float((ours - reference).abs().max() / reference.abs().max())


def measure(steps: tuple[int, ...] = STEPS) -> dict[str, dict[str, Any]]:
    """class -> field -> {"largest": ..., "refused": {change: reason}}."""
    logging.disable(logging.WARNING)
    found: dict[str, dict[str, Any]] = {}
    for name, cls in classes().items():
        found[name] = {}
        for field in fields(cls):
            cell: dict[str, Any] = {"largest": None, "refused": {}}
            for change in cases(cls, field):
                for count in steps:
                    result = difference(cls, change, count)
                    if isinstance(result, str):
                        said = {k: v for k, v in change.items() if k != "trained_betas"}
                        cell["refused"].setdefault(f"{json.dumps(said)}", result)
                    else:
                        cell["largest"] = max(cell["largest"] or 0.0, result)
            found[name][field] = cell
    return found


def page(record: dict[str, dict[str, Any]]) -> str:
    """The table of the docs: scheduler classes across, fields down."""
    names = list(record)
    short = [name.removesuffix("Scheduler") for name in names]
    rows = [f"| field | {' | '.join(short)} |", "|---|" + "---|" * len(names)]
    notes: dict[str, str] = {}
    for field in dict.fromkeys(field for cells in record.values() for field in cells):
        shown = []
        for name in names:
            cell = record[name].get(field)
            text = "." if cell is None else f"{cell['largest']:.0e}" if cell["largest"] is not None else "refused"
            for change, reason in (cell or {"refused": {}})["refused"].items():
                note = f"{name.removesuffix('Scheduler')}, `{change}`: {reason}"
                text += f" [{list(notes).index(note) + 1 if note in notes else len(notes) + 1}]"
                notes.setdefault(note, "")
            shown.append(text)
        rows.append(f"| `{field}` | {' | '.join(shown)} |")
    return "\n".join([*rows, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def names_table() -> str:
    return "\n".join(
        f"| `{name}`, {entry.steps} | `{entry.scheduler}` | {entry.description} |" for name, entry in SAMPLERS.items()
    )


def few_step_table() -> str:
    """The families of few-step models, for the docs."""
    rows = [
        "| `--few-step` | published as | sampler | steps | guidance | options | from |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        options = dict(family.options) | dict(family.fields)
        options |= {"timesteps": list(family.timesteps)} if family.timesteps else {}
        guidance = "usual" if family.guidance is None else f"{family.guidance:g}"
        shown = ", ".join(f"{key} {value}" for key, value in options.items())
        sampler = f"`{family.sampler}`" if family.sampler else "the folder's own"
        rows.append(
            f"| `{family.name}` | {family.published} | {sampler} | {family.steps} | {guidance} | {shown} | "
            f"{family.source} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    from pages import put

    if sys.argv[1:] != ["--page"]:
        found = {"diffusers": diffusers.__version__, "steps": STEPS, "tolerance": TOLERANCE, "classes": measure()}
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
    put(PAGE, "sampler-sweep", page(json.loads(RECORD.read_text())["classes"]))
    put(PAGE, "sampler-names", names_table())
    put(PAGE, "few-step", few_step_table())
