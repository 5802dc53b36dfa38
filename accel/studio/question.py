"""What is asked of the engines: the values of the page's fields as one record, checked, and as a command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, unknown

MOST_PROMPTS = 64
_INTEGERS = {"steps": (1, 1000), "height": (8, 8192), "width": (8, 8192), "seed": (0, 2**63 - 1)}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the page offers; nothing else is taken, whatever a browser sends.

    Attributes:
        models: what the command line named, in its order.
        engines: variants that run here, such as `eager` or `openvino:bf16`.
        loras: LoRA files that the command line named.
    """

    models: tuple[str, ...]
    engines: tuple[str, ...]
    loras: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Question:
    """One image that is asked for, by two engines.

    Attributes:
        model: a bundle or pipeline.
        engines: the two variants, A and B.
        prompt, negative: text.
        seed: of the noise, the same on both.
        steps, guidance, height, width: None for the model's own.
        loras: file and strength of each.
        image: file to start from; "" for noise alone.
        strength: share of the steps that is run from `image`.
    """

    model: str
    engines: tuple[str, str]
    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    loras: tuple[tuple[str, float], ...] = ()
    image: str = ""
    strength: float | None = None

    def call(self) -> dict[str, Any]:
        """Keyword arguments of `Pipeline.__call__`."""
        call: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed, "steps": self.steps}
        call |= {"guidance_scale": self.guidance, "height": self.height, "width": self.width}
        if self.negative:
            call["negative_prompt"] = self.negative
        return call | ({"image": self.image, "strength": self.strength} if self.image else {})

    def command(self, engine: str) -> str:
        """What to type to draw the same image; of files the names alone."""
        words = ["accel", "run", self.model, "--engine", engine, "--prompt", self.prompt, "--seed", str(self.seed)]
        for name in ("negative", "steps", "guidance", "height", "width"):
            if (value := getattr(self, name)) not in (None, ""):
                words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
        for file, scale in self.loras:
            words += ["--lora", f"{file}={scale:g}"]
        if self.image:
            words += ["--image", Path(self.image).name]
            words += ["--strength", f"{self.strength:g}"] if self.strength is not None else []
        return shlex.join(words)


def asked(choices: Choices, values: Mapping[str, Any]) -> list[Question]:
    """One question per line of `prompts`, from what stands in the fields; an empty field is the model's own value.

    Args:
        values: model, engine_a, engine_b, prompts, negative, seed, steps, guidance, height, width, loras, scale,
            image, strength; any may be missing, None or nonsense.

    Raises:
        UserError: with the field, its value, and what it takes.
    """
    prompts = [line.strip() for line in str(values.get("prompts") or "").splitlines() if line.strip()]
    if not prompts:
        raise UserError("the prompt is empty", "describe the image, such as: a handwritten seven")
    if len(prompts) > MOST_PROMPTS:
        raise UserError(f"{len(prompts)} prompts are too many", f"give at most {MOST_PROMPTS} lines")
    model = _one_of("model", values.get("model"), choices.models)
    engines = tuple(_one_of("engine", values.get(f"engine_{side}"), choices.engines) for side in "ab")
    scale = _number("LoRA strength", values.get("scale"), -10, 10)
    files = values.get("loras") or []
    loras = [_one_of("LoRA", file, choices.loras) for file in (files if isinstance(files, list) else [files])]
    image = str(values.get("image") or "")
    strength = _number("strength", values.get("strength"), 0, 1)
    common = dict(
        model=model,
        engines=engines,
        negative=str(values.get("negative") or "").strip(),
        seed=_integer("seed", values.get("seed")) or 0,
        guidance=_number("guidance", values.get("guidance"), 0, 100),
        loras=tuple((file, 1.0 if scale is None else scale) for file in loras),
        image=image,
        strength=(0.8 if strength is None else strength) if image else None,
        **{name: _integer(name, values.get(name)) for name in ("steps", "height", "width")},
    )
    return [Question(prompt=prompt, **common) for prompt in prompts]


def _one_of(what: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise unknown(what, value, known)
    return value


def _number(what: str, value: Any, low: float, high: float) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not low <= number <= high:
        raise UserError(
            f"{what} {value!r} is not a number from {low:g} to {high:g}", f"such as {max(low, 1):g}, or empty"
        )
    return number


def _integer(what: str, value: Any) -> int | None:
    low, high = _INTEGERS[what]
    if value is None or value == "":
        return None
    try:
        whole = int(value) if not isinstance(value, float) or value.is_integer() else None
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or not low <= whole <= high:
        raise UserError(
            f"{what} {value!r} is not a whole number from {low} to {high}", f"such as {max(low, 4)}, or empty"
        )
    return whole
