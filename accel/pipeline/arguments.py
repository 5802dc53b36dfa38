"""The arguments of a pipeline call: what each of them may be, and what diffusers calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, unknown
from ..sampling.samplers import SAMPLERS
from .output import OUTPUT_TYPES


@dataclass(frozen=True)
class Argument:
    """What an argument may be.

    Attributes:
        fits: whether a value is of the right type.
        expected: that type in words.
        example: a value as it is typed.
        optional: whether it may be None.
    """

    fits: Callable[[Any], bool]
    expected: str
    example: str
    optional: bool = True


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_))


def _flag(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


def _list_of(fits: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        listed = isinstance(value, (list, tuple, range)) or isinstance(value, np.ndarray) and value.ndim == 1
        return listed and length in (None, len(value)) and all(map(fits, value))

    return check


def _or_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    several = _list_of(fits)
    return lambda value: fits(value) or several(value)


def _array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _image(value: Any) -> bool:
    return isinstance(value, (str, Path)) or _array(value) or hasattr(value, "getpixel")


def _generator(value: Any) -> bool:
    return hasattr(value, "initial_seed")


def _output_type(value: Any) -> bool:
    return isinstance(value, str) and value in OUTPUT_TYPES


_TEXTS = "a text, or a list of texts"
_IMAGE = Argument(
    _or_list_of(_image), "a PIL image, a file name, an array [height, width, 3], or a list of them", "'photo.png'"
)
_IMAGE_PROMPT = Argument(
    _or_list_of(_or_list_of(_image)),
    "an image, a list with one for each image to make, or a list of lists for several together",
    "'style.png'",
)
_SIDE = Argument(_whole, "a whole number of pixels", "512")
_SWITCH = Argument(_flag, "True or False", "True", optional=False)
_PAIR = Argument(_list_of(_whole, 2), "two whole numbers", "(512, 768)")
_FUNCTION = "a function of {}"
ARGUMENTS: Mapping[str, Argument] = {
    "prompt": Argument(_or_list_of(_text), _TEXTS, "'a fox in the snow'", optional=False),
    "negative_prompt": Argument(_or_list_of(_text), _TEXTS, "'blurry'"),
    "height": _SIDE,
    "width": _SIDE,
    "sampler": Argument(_text, "the name of a sampler", f"'{next(iter(SAMPLERS))}'"),
    "steps": Argument(_whole, "a whole number of steps", "25"),
    "timesteps": Argument(_list_of(_number), "a list of numbers, highest first", "[999, 749, 499, 249]"),
    "guidance_scale": Argument(_number, "a number", "7.5"),
    "num_images_per_prompt": Argument(_whole, "a whole number", "1", optional=False),
    "seed": Argument(_or_list_of(_whole), "a whole number, or one for each image", "0"),
    "image": _IMAGE,
    "mask_image": _IMAGE,
    "strength": Argument(_number, "a number above 0, at most 1", "0.8"),
    "image_guidance_scale": Argument(_number, "a number", "1.5"),
    "control_image": replace(_IMAGE, fits=_or_list_of(_or_list_of(_image))),
    "control_scale": Argument(_or_list_of(_number), "a number, or one for each ControlNet", "0.8", optional=False),
    "control_end": Argument(_or_list_of(_number), "a number from 0 to 1, or one for each", "0.5", optional=False),
    "ip_adapter_image": _IMAGE_PROMPT,
    "ip_adapter_scale": Argument(_number, "a number", "0.6", optional=False),
    "original_size": _PAIR,
    "crop": Argument(_list_of(_whole, 2), "two whole numbers", "(0, 0)", optional=False),
    "target_size": _PAIR,
    "aesthetic_score": Argument(_number, "a number from 1 to 10", "6.0", optional=False),
    "negative_aesthetic_score": Argument(_number, "a number from 1 to 10", "2.5", optional=False),
    "denoising_start": Argument(_number, "a number above 0 and below 1", "0.8"),
    "denoising_end": Argument(_number, "a number above 0 and below 1", "0.8"),
    "prompt_weights": _SWITCH,
    "clip_skip": Argument(_whole, "a whole number", "1"),
    "latents": Argument(_array, "an array or tensor [images, channels, height, width]", "None"),
    "renoise": Argument(callable, _FUNCTION.format("the step"), "None"),
    "output_type": Argument(_output_type, f"one of: {', '.join(OUTPUT_TYPES)}", "'pil'", optional=False),
    "callback": Argument(callable, _FUNCTION.format("(i, t, latents)"), "print"),
    "preview_every": Argument(_whole, "a whole number of steps", "2"),
    "preview_callback": Argument(callable, _FUNCTION.format("(i, images)"), "print"),
    "progress": _SWITCH,
    # Only diffusers' pipelines have these names, and here they mean the same.
    "generator": Argument(_or_list_of(_generator), "a torch.Generator, or one for each image", "torch.Generator()"),
    "callback_on_step_end": Argument(callable, _FUNCTION.format("(pipeline, i, t, tensors)"), "None"),
    "callback_on_step_end_tensor_inputs": Argument(_list_of(_text), "a list of names", "['latents']"),
    "return_dict": _SWITCH,
    # Options of samplers (`accel.sampling.constants.OPTIONS`).
    "eta": Argument(_number, "a number from 0 to 1", "0.0"),
    "sigmas": Argument(_text, "the name of a spacing", "'karras'"),
    "timestep_spacing": Argument(_text, "the name of a spacing", "'trailing'"),
    "shift": Argument(_number, "a number", "3.0"),
}
# diffusers' name -> ours.
RENAMED = {
    "num_inference_steps": "steps",
    "crops_coords_top_left": "crop",
    "controlnet_conditioning_scale": "control_scale",
    "adapter_conditioning_scale": "control_scale",
    "control_guidance_end": "control_end",
    "adapter_conditioning_factor": "control_end",
}
# What only diffusers' pipelines do: the value that asks for nothing.
_OF_DIFFUSERS: Mapping[str, Any] = {
    **dict.fromkeys(("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds")),
    **dict.fromkeys(("negative_pooled_prompt_embeds", "prompt_2", "negative_prompt_2")),
    **dict.fromkeys(("ip_adapter_image_embeds", "padding_mask_crop", "negative_target_size")),
    "negative_original_size": None,
    "negative_crops_coords_top_left": (0, 0),
    "guidance_rescale": 0.0,
    "control_guidance_start": 0.0,
    "callback_steps": 1,
}
# What no compiled network has an input for, so that `accel.attach` is no way out either.
_OF_NETWORKS: Mapping[str, Any] = {"cross_attention_kwargs": None, "guess_mode": False}


def read(given: Mapping[str, Any], defaults: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by our names, each of the right type.

    Args:
        given: our arguments, as they were passed or by default.
        defaults: their defaults.
        others: what was passed beside them: diffusers' names.

    Raises:
        UserError: for an unknown name, two spellings of one argument, a value of another type, or something that only
            diffusers' pipelines do.
    """
    call = dict(given)
    passed = {name for name, value in given.items() if value is not defaults.get(name)}
    for name, value in others.items():
        if name not in ARGUMENTS and name not in RENAMED:
            _refuse_unless_neutral(name, value)
            continue
        ours = RENAMED.get(name, name)
        if ours in passed:
            raise UserError(
                f"{name} and {ours} are two names of one argument, and both are given", f"give {ours} alone"
            )
        if value is not None:
            passed.add(ours)
            call[ours] = value
    if call["seed"] is not None and call.get("generator") is not None:
        raise UserError("seed and generator are both given, and each of them makes the noise", "give one of the two")
    check(call)
    return call


def check(values: Mapping[str, Any]) -> None:
    """Refuse the first value that is not what its argument may be.

    Raises:
        UserError: naming the argument, the value and what to give.
    """
    for name, value in values.items():
        argument = ARGUMENTS[name]
        if not (value is None and argument.optional) and not argument.fits(value):
            raise UserError(
                f"invalid {name}: {short(value)} (expected {argument.expected})",
                "leave it out" if argument.example == "None" else f"such as {name}={argument.example}",
            )


def check_switch(name: str, value: Any) -> None:
    """Refuse what is neither true nor false; None is diffusers' word for off."""
    if not (value is None or _flag(value)):
        raise UserError(f"invalid {name}: {short(value)} (expected True or False)", f"such as {name}=False")


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number from 0 on."""
    if not _whole(value) or value < 0:
        raise UserError(f"invalid {name}: {short(value)} (expected a whole number, 0 for none)", f"such as {name}=16")


def short(value: Any) -> str:
    """A value in few words: never the numbers of an array."""
    if _array(value):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_unless_neutral(name: str, value: Any) -> None:
    for names, fix in (
        (_OF_DIFFUSERS, "leave it out, or accel.attach(PIPELINE, BUNDLE): a diffusers pipeline on compiled networks"),
        (_OF_NETWORKS, "leave it out, or run diffusers' own pipeline"),
    ):
        if name in names:
            if value is None or _equal(value, names[name]):
                return
            raise UserError(f"{name} is something that only diffusers' own pipelines take", fix)
    known = [*ARGUMENTS, *RENAMED]
    raise unknown("argument", name, known)


def _equal(value: Any, neutral: Any) -> bool:
    return not _array(value) and (tuple(value) if isinstance(value, list) else value) == neutral
