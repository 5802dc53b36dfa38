"""The fields of diffusers' scheduler configs: which class reads which, with its default, and what each may be.

A class that is not here has no sampler of ours. A field that no class here reads is refused, since nobody could say
what it does to the image; a field that only another class reads has no effect, in diffusers as here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

_BETAS = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None)
_COMMON = _BETAS | dict(prediction_type="epsilon", timestep_spacing="linspace", steps_offset=0)
_SIGMAS = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
_CLIP = dict(clip_sample=True, clip_sample_range=1.0)
_THRESHOLD = dict(thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
_ZERO_SNR = dict(rescale_betas_zero_snr=False)
_FLOW = dict(use_flow_sigmas=False, flow_shift=1.0, use_dynamic_shifting=False, time_shift_type="exponential")
_DISCRETE = _COMMON | _CLIP | _THRESHOLD | _ZERO_SNR | dict(timestep_spacing="leading")
_SOLVER = _COMMON | _SIGMAS | _THRESHOLD | _FLOW | dict(solver_order=2, lower_order_final=True)
_DPM: dict[str, Any] = dict(algorithm_type="dpmsolver++", solver_type="midpoint", final_sigmas_type="zero")
_DPM |= dict(lambda_min_clipped=-math.inf, variance_type=None)
_DISTILLED = _DISCRETE | dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=True,
    original_inference_steps=50,
    timestep_scaling=10.0,
)

FORWARD = (*_BETAS, "rescale_betas_zero_snr", "prediction_type", "_class_name")  # what training reads of a config

# Scheduler class -> the fields that it reads, with the values that absent ones have.
CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _DISCRETE | dict(set_alpha_to_one=True),
    "DDPMScheduler": _DISCRETE | dict(variance_type="fixed_small"),
    "PNDMScheduler": _COMMON | dict(timestep_spacing="leading", set_alpha_to_one=False, skip_prk_steps=False),
    "EulerDiscreteScheduler": _COMMON
    | _SIGMAS
    | _ZERO_SNR
    | dict(
        interpolation_type="linear", timestep_type="discrete", final_sigmas_type="zero", sigma_min=None, sigma_max=None
    ),
    "EulerAncestralDiscreteScheduler": _COMMON | _ZERO_SNR,
    "HeunDiscreteScheduler": _COMMON
    | _SIGMAS
    | dict(beta_start=0.00085, beta_end=0.012, clip_sample=False, clip_sample_range=1.0),
    "LMSDiscreteScheduler": _COMMON | _SIGMAS,
    "DPMSolverMultistepScheduler": _SOLVER | _DPM | _ZERO_SNR | dict(euler_at_final=False, use_lu_lambdas=False),
    "DPMSolverSinglestepScheduler": {
        field: value
        for field, value in (_SOLVER | _DPM | dict(lower_order_final=False)).items()
        if field not in ("timestep_spacing", "steps_offset")
    },
    "DEISMultistepScheduler": _SOLVER | dict(algorithm_type="deis", solver_type="logrho"),
    "UniPCMultistepScheduler": _SOLVER
    | _ZERO_SNR
    | dict(
        final_sigmas_type="zero",
        predict_x0=True,
        solver_type="bh2",
        disable_corrector=[],
        solver_p=None,
        sigma_min=None,
        sigma_max=None,
        shift_terminal=None,
    ),
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
}


@dataclass(frozen=True)
class _Kind:
    """What a field may be: in words, and as a test."""

    words: str
    admits: Callable[[Any], bool]


def _number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max or abs(value) == math.inf  # an integer may be larger, and NaN is neither


def _list_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        (isinstance(value, (list, tuple)) or hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1)
        and all(test(entry) for entry in (value.tolist() if hasattr(value, "tolist") else value))
    )


def _whole(least: int, most: int = 100_000) -> _Kind:
    return _Kind(
        f"a whole number of at least {least}, and at most {most}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
    )


_BOOL = _Kind("true or false", lambda value: isinstance(value, bool))
_NUMBER = _Kind("a number", _number)
_POSITIVE = _Kind("a number above 0", lambda value: _number(value) and value > 0)
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_FIELDS: dict[str, _Kind] = {
    **dict.fromkeys(("num_train_timesteps", "solver_order", "original_inference_steps"), _whole(1)),
    "steps_offset": _whole(0),
    **dict.fromkeys(("beta_start", "beta_end", "clip_sample_range", "sample_max_value", "flow_shift"), _POSITIVE),
    **dict.fromkeys(("sigma_min", "sigma_max", "shift_terminal"), _POSITIVE),
    "timestep_scaling": _Kind("a number above 0, at most 1e9", lambda value: _number(value) and 0 < value <= 1e9),
    "dynamic_thresholding_ratio": _Kind("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1),
    "lambda_min_clipped": _Kind("a number or -inf", lambda value: _number(value) or value in ("-Infinity", "-inf")),
    "trained_betas": _Kind("a list of numbers", _list_of(_number)),
    "disable_corrector": _Kind("a list of whole numbers", _list_of(lambda entry: isinstance(entry, int))),
    "solver_p": _Kind("null", lambda value: value is None),
}
for _fields in CLASSES.values():
    for _field, _value in _fields.items():
        _FIELDS.setdefault(_field, _BOOL if isinstance(_value, bool) else _TEXT)

# Values that a sampler can honour, where a class of diffusers knows more; the first is what the advice names.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "time_shift_type": ("exponential", "linear"),
    "use_dynamic_shifting": (False,),
}
# The same, by class.
_ALLOWED_BY_CLASS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DPMSolverMultistepScheduler": dict(
        algorithm_type=("dpmsolver++", "sde-dpmsolver++"),
        solver_type=("midpoint", "heun"),
        solver_order=(2, 1, 3),
        variance_type=(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    ),
    "DEISMultistepScheduler": dict(algorithm_type=("deis",), solver_type=("logrho",), solver_order=(2, 1, 3)),
    "UniPCMultistepScheduler": dict(solver_type=("bh2", "bh1"), solver_order=(2, 1, 3, 4, 5, 6)),
    "DDPMScheduler": dict(variance_type=("fixed_small", "fixed_small_log", "fixed_large")),
    "PNDMScheduler": dict(prediction_type=("epsilon", "v_prediction")),
    "EulerAncestralDiscreteScheduler": dict(prediction_type=("epsilon", "v_prediction")),
}
_ALLOWED_BY_CLASS["DPMSolverSinglestepScheduler"] = _ALLOWED_BY_CLASS["DPMSolverMultistepScheduler"]
# What diffusers makes of a value that belongs to another solver.
_TRANSLATED: dict[str, dict[str, str]] = {
    "DPMSolverMultistepScheduler": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint") | {"deis": "dpmsolver++"},
    "DEISMultistepScheduler": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho")
    | dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
    "UniPCMultistepScheduler": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"),
}
_TRANSLATED["DPMSolverSinglestepScheduler"] = _TRANSLATED["DPMSolverMultistepScheduler"]
# Fields that a class has and does not use.
_IGNORED = {"TCDScheduler": dict(clip_sample=False, thresholding=False)}
# Fields that change the image when they have any other value than these: worth a word where they are not read.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((*_SIGMAS, "use_lu_lambdas", "use_flow_sigmas", "clip_sample", "thresholding"), (False, None)),
    "final_sigmas_type": ("zero", None),
    "interpolation_type": ("linear", None),
    "timestep_type": ("discrete", None),
}


def check(config: Mapping[str, Any]) -> None:
    """Refuse a config with a field that nothing here knows, or a value of the wrong type, by name.

    Raises:
        UserError: for the first of them.
    """
    for field, value in config.items():
        if field.startswith("_"):
            continue
        if field not in _FIELDS:
            raise refused(field, value, "remove the field if the image does not depend on it")
        if value is not None and not _FIELDS[field].admits(value):
            raise refused(field, value, f"it has to be {_FIELDS[field].words}")
    name = str(config.get("_class_name", ""))
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in CLASSES.get(name, _ZERO_SNR):
        raise UserError(
            f"scheduler config: rescale_betas_zero_snr = True is not read by {name}",
            'set it to false, or "_class_name" to a scheduler that reads it, such as "DDIMScheduler"',
        )


def settings(scheduler: str, config: Mapping[str, Any], pinned: Mapping[str, Any]) -> dict[str, Any]:
    """Every field that a scheduler class reads, as it reads them from a config of whatever class.

    Args:
        scheduler: one of `CLASSES`.
        config: a scheduler config that `check` admits.
        pinned: fields that the sampler's name decides.

    Raises:
        UserError: naming the field, for a value that no sampler here can honour.
    """
    defaults, translated = CLASSES[scheduler], _TRANSLATED.get(scheduler, {})
    found = {field: config[field] for field in defaults if config.get(field) is not None} | dict(pinned)
    if config.get("_class_name") != scheduler and "clip_sample" in defaults:
        found.setdefault("clip_sample", False)  # another scheduler's model is not clipped for want of a field
    # diffusers reads these two of any class that can respace its sigmas.
    found |= {field: config[field] for field in ("sigma_min", "sigma_max") if config.get(field) is not None}
    for field in ("solver_type", "algorithm_type"):
        if field in found:
            found[field] = translated.get(found[field], found[field])
    allowed = _ALLOWED | _ALLOWED_BY_CLASS.get(scheduler, {})
    for field, value in found.items():
        if field in allowed and value not in allowed[field] and field in defaults:
            choices = " or ".join(repr(choice) for choice in allowed[field] if choice is not None)
            raise refused(field, value, f"use {choices}, or another --sampler")
    made = defaults | found | _IGNORED.get(scheduler, {})
    if made.get("lambda_min_clipped") in ("-Infinity", "-inf"):
        made["lambda_min_clipped"] = -math.inf
    if (made["prediction_type"] == "flow_prediction") > bool(made.get("use_flow_sigmas")):
        raise refused(
            "prediction_type", "flow_prediction", "use it with use_flow_sigmas = true and a sampler that reads that"
        )
    if made.get("shift_terminal") and not made.get("use_flow_sigmas"):
        raise refused("shift_terminal", made["shift_terminal"], "it needs use_flow_sigmas = true; set it to null")
    if "predict_x0" in made and made["final_sigmas_type"] == "zero":  # NaN at the last step, in diffusers too
        for field, needed in (("predict_x0", True), ("lower_order_final", made["solver_order"] > 1)):
            if needed and not made[field]:
                raise refused(field, False, 'it needs final_sigmas_type = "sigma_min"; set it to true')
    return made


def unread(scheduler: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that would change the image, but that a scheduler class does not read."""
    read = CLASSES.get(scheduler, {})
    return {
        field: config[field]
        for field, neutral in _NEUTRAL.items()
        if field in config and field not in read and config[field] not in neutral
    }


def clips(config: Mapping[str, Any]) -> str | None:
    """The field by which a config's own class clips predictions, if it does."""
    name = str(config.get("_class_name", ""))
    made = CLASSES.get(name, {}) | dict(config) | _IGNORED.get(name, {})
    return next((field for field in ("thresholding", "clip_sample") if made.get(field)), None)


def refused(field: str, value: Any, fix: str) -> UserError:
    return UserError(f"scheduler config: {field} = {value!r} is not supported", fix)
