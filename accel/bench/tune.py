"""Find the fastest engine, with its options, for each network of a bundle on this machine.

Every candidate of a network takes turns with the others. After one call those that took more than half as long again as
the best are left out; the others share what is left of the time. At last the whole image is made by the best of each
network and by the best single engine: the mixture is kept only where it is faster, because engines that share a
processor also share its caches. bfloat16 is a candidate where an engine has it, and is taken only if the image stays
the same within `SAME` dB; otherwise the best without it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import psutil

from ..bundle import Bundle
from ..bundle.tuned import Choice
from ..engines import ENGINES, Engine, facts, fitting_engine_file, load_engine, status
from ..engines.base import noise_for
from ..errors import UserError
from ..machine import machine
from ..parity import psnr as psnr_of
from ..pipeline import Pipeline, component_names
from . import timing

SECONDS = 60.0
SAME = 40.0  # least PSNR in dB of the image with bfloat16 against the one without
_ROUNDS = 30
_WORTH_IT = 1.5  # a candidate slower than that after one call is left out
_SINGLE = 0.97  # a mixture has to take less than this share of the best single engine's time: more is noise
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        choices: component -> the fastest way of running it.
        measured: component -> {candidate: median seconds, or why it was left out}.
        image: seconds of an image, `tuned` and by the best `single` engine.
        single: that engine.
        psnr: in dB, of the image in bfloat16 against the single engine's; None where bfloat16 was fastest nowhere.
    """

    choices: dict[str, Choice]
    measured: dict[str, dict[str, float | str]]
    image: dict[str, float]
    single: str
    psnr: float | None = None


def tune(bundle: Bundle, seconds: float = SECONDS, progress: Progress = lambda stage, done: None) -> Result:
    """Measure every network of a bundle.

    Args:
        seconds: about how long, loading not counted.

    Raises:
        UserError: where no engine can run here.
    """
    names = component_names(bundle)
    ways: dict[str, dict[str, Choice]] = {}
    measured: dict[str, dict[str, float | str]] = {}
    for place, name in enumerate(names):
        progress(name, 0.8 * place / len(names))
        ways[name], measured[name] = _of_component(bundle, name, 0.7 * seconds / len(names))
    single = _best_single(measured)
    plain = {name: _best_of(measured[name], single) for name in names}
    choices = {name: _fastest(ways[name]) or plain[name] for name in names}
    psnr = None
    progress("the whole image", 0.8)
    image, pictures = _images(bundle, {"tuned": choices, "single": plain}, 0.3 * seconds)
    if any("dtype" in choice.options for choice in choices.values()):
        # Equal images have an infinite PSNR, which JSON cannot hold.
        psnr = min(float(psnr_of(pictures["tuned"], pictures["single"], 1.0)), 100.0)
        if not psnr >= SAME:
            choices = {name: _fastest(ways[name], exact=True) or plain[name] for name in names}
            image, _ = _images(bundle, {"tuned": choices, "single": plain}, 0.3 * seconds)
    if choices == plain or image["tuned"] > _SINGLE * image["single"]:
        choices, image["tuned"] = plain, image["single"]
    return Result(choices, measured, image, single, psnr)


def _fastest(ways: Mapping[str, Choice], *, exact: bool = False) -> Choice | None:
    """The fastest that ran to the end, if any.

    Args:
        exact: none that rounds more than the bundle asks for.
    """
    able = [choice for choice in ways.values() if not (exact and "dtype" in choice.options)]
    return min(able, key=lambda choice: choice.seconds, default=None)


def candidates(bundle: Bundle, component: str) -> Iterator[Choice]:
    """Ways of running a network that could be the fastest here: engines that `auto` may take, threads, folds."""
    record = bundle.component(component)
    cores = psutil.cpu_count(logical=False) or 0
    fewer = {"threads": cores} if 0 < cores < (machine().threads or 0) else {}
    for engine in reversed(tuple(ENGINES)):
        known = facts(engine)
        able = fitting_engine_file(bundle, component, "cpu", [engine]) if known.engine_files else "cpu" in known.auto
        if not able or not status(engine).ok:
            continue
        if record.int8 and record.format not in known.formats:
            continue
        yield Choice(engine)
        if not component.startswith("text_encoder"):  # nothing to fold
            yield from (Choice(engine, {option: False}) for option in known.tunes)
        if fewer and "threads" in known.options:
            yield Choice(engine, fewer)
        if "bf16" in known.variants and record.precision != "float16":
            yield Choice(engine, {"dtype": "bf16"})


def label(choice: Choice) -> str:
    """`openvino, folds=False`."""
    return ", ".join([choice.engine, *(f"{key}={value}" for key, value in choice.options.items())])


def _of_component(bundle: Bundle, name: str, seconds: float) -> tuple[dict[str, Choice], dict[str, float | str]]:
    """What ran, with its seconds; and {candidate: median seconds, or why it was left out}."""
    with ExitStack() as open_engines:
        found: dict[str, float | str] = {}
        calls: dict[str, Callable[[], Any]] = {}
        ways = {label(choice): choice for choice in candidates(bundle, name)}
        for title, choice in ways.items():
            try:
                engine = load_engine(bundle, name, choice.engine, verify=False, **choice.options)
                open_engines.callback(engine.close)
                calls[title] = partial(_call, engine, _feeds(engine))
                calls[title]()  # and whatever is compiled on the first call
            except UserError as error:
                found[title] = error.message
                calls.pop(title, None)
        if not calls:
            raise UserError(f"no engine can run {name} here", "accel doctor says why")
        once = {title: timing.timed(call) for title, call in calls.items()}
        best = min(once.values())
        left = {title: call for title, call in calls.items() if once[title] <= _WORTH_IT * best}
        samples: dict[str, list[float]] = {title: [] for title in left}
        broken: list[str] = []
        timing.interleave(
            {name: left},
            {name: samples},
            rounds=_ROUNDS,
            seconds=seconds,
            lead_in={name: best < timing.LEAD_IN_BELOW},
            failed=lambda title, error: broken.append(title),
        )
        found |= {title: once[title] for title in calls}
        found |= {title: float(np.median(taken)) for title, taken in samples.items() if taken and title not in broken}
        ran = {title for title in left if title not in broken} or set(left)
        return {title: replace(ways[title], seconds=float(found[title])) for title in ran}, found


def _feeds(engine: Engine) -> dict[str, np.ndarray]:
    """Inputs of the profile's usual sizes."""
    return noise_for(engine.component, {dim: limits.opt for dim, limits in engine.component.dims.items()})


def _call(engine: Engine, feeds: Mapping[str, np.ndarray]) -> None:
    engine(**feeds)


def _plain(found: Mapping[str, float | str]) -> dict[str, float]:
    """Engine -> seconds with its default options, of those that ran."""
    return {title: value for title, value in found.items() if "," not in title and isinstance(value, float)}


def _best_single(measured: Mapping[str, Mapping[str, float | str]]) -> str:
    """The engine with the least sum over all networks, with its default options."""
    sums = [_plain(found) for found in measured.values()]
    common = set.intersection(*(set(found) for found in sums))
    return min(common or sums[0], key=lambda engine: sum(found.get(engine, 0.0) for found in sums))


def _best_of(found: Mapping[str, float | str], engine: str) -> Choice:
    return Choice(engine, {}, float(_plain(found)[engine]))


def _images(
    bundle: Bundle, ways: Mapping[str, Mapping[str, Choice]], seconds: float
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Median seconds of an image, and the image, for each way of loading a bundle."""
    with ExitStack() as loaded:
        pipelines = {}
        for way, choices in ways.items():
            engines = {
                name: load_engine(bundle, name, choice.engine, verify=False, **choice.options)
                for name, choice in choices.items()
            }
            pipelines[way] = loaded.enter_context(Pipeline(bundle, engines, text_cache=0))
        calls = {way: partial(pipe, "a photo", seed=0, output_type="np") for way, pipe in pipelines.items()}
        made = {way: np.asarray(call().images[0]) for way, call in calls.items()}
        return timing.medians(calls, rounds=9, seconds=seconds), made
