"""What OpenVINO GenAI does not run, said before anything is written.

What its schedulers read was looked up in src/cpp/src/image_generation/schedulers of openvino.genai 2026.4: a field that
they refuse when they draw, or read without heeding it, is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accel.bundle import Bundle
from accel.bundle.kinds import control_components
from accel.errors import UserError
from accel.files import read_json

_NONE = (None, False)
# Scheduler -> field -> values with which GenAI draws what diffusers draws.
SCHEDULERS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "LCMScheduler": {"clip_sample": _NONE, "thresholding": _NONE, "rescale_betas_zero_snr": _NONE},
    "DDIMScheduler": {"clip_sample": _NONE, "thresholding": _NONE, "rescale_betas_zero_snr": _NONE},
    "EulerDiscreteScheduler": dict.fromkeys(
        ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "rescale_betas_zero_snr"), _NONE
    ),
    "EulerAncestralDiscreteScheduler": {"rescale_betas_zero_snr": _NONE},
    "PNDMScheduler": {"skip_prk_steps": (True,)},
}
_SCHEDULES = (None, "linear", "scaled_linear")
_PREDICTIONS = ("epsilon", "v_prediction")
# What a class of diffusers takes where a config does not have the field, and it is none of the values above.
_ABSENT = {("DDIMScheduler", "clip_sample"): True}


def check(bundle: Bundle) -> dict[str, Any]:
    """Refuse a bundle that GenAI would draw otherwise, or not at all.

    Returns:
        The scheduler config.

    Raises:
        UserError: naming the part or field, and what to do.
    """
    manifest = bundle.manifest
    name, parts = manifest.source["name"], manifest.components
    if missing := [part for part in ("text_encoder", "unet", "vae_decoder") if part not in parts]:
        raise UserError(f"{name} has no {missing[0]}, which OpenVINO GenAI needs", "export it whole, and no refiner")
    inputs = {spec.name for spec in parts["unet"].inputs}
    shown = [part for part in control_components() if part in parts] + ["IP-Adapter"] * ("image_embeds" in inputs)
    if shown:
        fix = "export it without --adapter, --controlnet and --ip-adapter"
        raise UserError(f"{name} has a part that is shown an image ({shown[0]}), which GenAI knows nothing of", fix)
    if manifest.edits or manifest.refines:
        raise UserError(f"{name} starts from an image in a way that GenAI does not know", "use a text-to-image model")
    if manifest.profile.tokens != 77:
        raise UserError(f"a context of {manifest.profile.tokens} tokens: GenAI takes 77", "export it with tokens=77")
    images = parts["text_encoder"].dims.get("images")
    if float(manifest.sampler["guidance"]) > 1 and images is not None and images.max < 2:
        fix = "export it with a batch of two at least, such as --profile batch=1-2,size=512"
        raise UserError(
            f"{name} is guided, and GenAI encodes prompt and negative prompt together: {images} at once", fix
        )
    return _scheduler(bundle)


def _scheduler(bundle: Bundle) -> dict[str, Any]:
    config = read_json(bundle.file("scheduler/scheduler_config.json"), "the scheduler config")
    kind = config.get("_class_name")
    fix = f"export the model with the scheduler of one of these in its folder: {', '.join(SCHEDULERS)}"
    if kind not in SCHEDULERS:
        raise UserError(f"OpenVINO GenAI has no {kind}", fix)
    allowed = {**SCHEDULERS[kind], "beta_schedule": _SCHEDULES, "trained_betas": (None,)}
    for field, values in allowed.items():
        value = config.get(field, _ABSENT.get((kind, field), values[0]))
        if value not in values and not (field == "trained_betas" and kind == "LCMScheduler"):
            raise UserError(f"OpenVINO GenAI does not heed {field} = {value!r} of a {kind}", fix)
    if config.get("prediction_type", "epsilon") not in _PREDICTIONS:
        raise UserError(f"OpenVINO GenAI does not know prediction_type {config['prediction_type']!r}", fix)
    return dict(config)
