"""Find the fastest engine, with its options, for each network of a bundle on this machine.

Every candidate of a network takes turns with the others. After one call those that took more than half as long again as
the best are left out; the others share what is left of the time. At last the whole image is made by the best of each
network and by the best single engine: the mixture is kept only where it is faster, because engines that share a
processor also share its caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil

from ..bundle import Bundle
from ..bundle.tuned import Choice
from ..engines import ENGINES, Engine, facts, load_engine, status
from ..engines.base import noise_for
from ..errors import UserError
from ..machine import machine
from ..pipeline import Pipeline, component_names
from . import timing

SECONDS = 60.0
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
    """

    choices: dict[str, Choice]
    measured: dict[str, dict[str, float | str]]
    image: dict[str, float]
    single: str


def tune(bundle: Bundle, seconds: float = SECONDS, progress: Progress = lambda stage, done: None) -> Result:
    """Measure every network of a bundle.

    Args:
        seconds: about how long, loading not counted.

    Raises:
        UserError: where no engine can run here.
    """
    names = component_names(bundle)
    choices: dict[str, Choice] = {}
    measured: dict[str, dict[str, float | str]] = {}
    for place, name in enumerate(names):
        progress(name, 0.8 * place / len(names))
        choices[name], measured[name] = _of_component(bundle, name, 0.7 * seconds / len(names))
    single = _best_single(measured)
    progress("the whole image", 0.8)
    image = _images(bundle, {"tuned": choices, "single": dict.fromkeys(names, Choice(single))}, 0.3 * seconds)
    plain = {name: _best_of(measured[name], single) for name in names}
    if choices == plain or image["tuned"] > _SINGLE * image["single"]:
        choices, image["tuned"] = plain, image["single"]
    return Result(choices, measured, image, single)


def candidates(bundle: Bundle, component: str) -> Iterator[Choice]:
    """Ways of running a network that could be the fastest here: engines that `auto` may take, threads, folds."""
    record = bundle.component(component)
    cores = psutil.cpu_count(logical=False) or 0
    fewer = {"threads": cores} if 0 < cores < (machine().threads or 0) else {}
    for engine in reversed(tuple(ENGINES)):
        known = facts(engine)
        if "cpu" not in known.auto or known.engine_files or not status(engine).ok:
            continue
        if record.int8 and not known.int8:
            continue
        yield Choice(engine)
        if not component.startswith("text_encoder"):  # nothing to fold
            yield from (Choice(engine, {option: False}) for option in known.tunes)
        if fewer and "threads" in known.options:
            yield Choice(engine, fewer)


def label(choice: Choice) -> str:
    """`openvino, folds=False`."""
    return ", ".join([choice.engine, *(f"{key}={value}" for key, value in choice.options.items())])


def _of_component(bundle: Bundle, name: str, seconds: float) -> tuple[Choice, dict[str, float | str]]:
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
        winner = min(left.keys() - set(broken) or left, key=lambda title: float(found[title]))
        return Choice(ways[winner].engine, ways[winner].options, float(found[winner])), found


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


def _images(bundle: Bundle, ways: Mapping[str, Mapping[str, Choice]], seconds: float) -> dict[str, float]:
    """Median seconds of an image for each way of loading a bundle."""
    with ExitStack() as loaded:
        pipelines = {}
        for way, choices in ways.items():
            engines = {
                name: load_engine(bundle, name, choice.engine, verify=False, **choice.options)
                for name, choice in choices.items()
            }
            pipelines[way] = loaded.enter_context(Pipeline(bundle, engines))
        calls = {way: partial(pipe, "a photo", output_type="np") for way, pipe in pipelines.items()}
        for call in calls.values():
            call()
        samples: dict[str, list[float]] = {way: [] for way in ways}

        def failed(way: str, error: Exception) -> None:
            raise error

        timing.interleave({"": calls}, {"": samples}, rounds=9, seconds=seconds, lead_in={"": False}, failed=failed)
        return {way: float(np.median(taken)) for way, taken in samples.items()}
