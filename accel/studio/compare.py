"""Two engines draw the same question; how long each took, and how their images differ."""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..bench.page.difference import Difference, coloured, difference, in_words
from ..bench.report import seconds
from ..bench.variants import parse
from ..errors import Notice
from ..loading import load
from ..parity import psnr
from .question import Question

_KEPT = 4  # pipelines in memory at a time


@dataclass(frozen=True)
class Drawn:
    """What one engine made.

    Attributes:
        image: uint8 [H, W, 3].
        seconds: wall time of the call.
        first: whether it was the first call of a pipeline, with what that compiles.
        notes: what accel had to say.
    """

    image: np.ndarray
    seconds: float
    first: bool = False
    notes: tuple[str, ...] = ()

    @property
    def caption(self) -> str:
        return seconds(self.seconds) + (", the first call of this engine" if self.first else "")


@dataclass(frozen=True)
class Pair:
    """A question and what is known of the answers so far."""

    question: Question
    a: Drawn | None = None
    b: Drawn | None = None

    @property
    def difference(self) -> Difference | None:
        return difference(self.b.image, self.a.image) if self.a and self.b else None

    @property
    def map(self) -> np.ndarray | None:
        """Where they differ, in colours; None where they are equal."""
        found = self.difference
        return coloured(found) if found and found.most else None

    @property
    def verdict(self) -> str:
        """Both halves of it in one sentence: how much faster, and whether the image is the same."""
        found = self.difference
        if not found or not self.a or not self.b:
            return ""
        name_a, name_b = self.question.engines
        if self.a.first or self.b.first:
            faster = "First calls, which also compile and warm up, are not compared: draw again"
        else:
            (fast, quick), (slow, long) = sorted(((self.a.seconds, name_a), (self.b.seconds, name_b)))
            faster = f"{quick} was {slow / fast:.2f} times as fast as {long}"
        if not found.most:
            return f"{faster}; the images are {in_words(found)}."
        decibels = psnr(self.b.image.astype(float), self.a.image.astype(float), 255)
        return f"{faster}; {in_words(found)} ({decibels:.1f} dB PSNR, the map is ×{found.factor})."


class Engines:
    """Loaded pipelines by model and variant; the ones that were not used for the longest time are closed."""

    def __init__(self, load: Callable[..., Any] = load):
        self._load, self._lock = load, threading.Lock()
        self._loaded: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._called: set[tuple[str, str]] = set()

    def draw(self, question: Question, variant: str) -> Drawn:
        """One image; one at a time, whoever asks.

        Raises:
            UserError: for what the model or the engine cannot do.
        """
        with self._lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", Notice)
            key = question.model, variant
            pipe = self._pipeline(key)
            pipe.set_loras([f"{file}={scale:g}" for file, scale in question.loras] or None)
            started = time.perf_counter()
            images = pipe(output_type="np", **question.call()).images
            took = time.perf_counter() - started
            first = key not in self._called
            self._called.add(key)
            notes = tuple(dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, Notice)))
        return Drawn((np.clip(images[0], 0, 1) * 255).round().astype(np.uint8), took, first, notes)

    def close(self) -> None:
        """Give all memory back."""
        with self._lock:
            while self._loaded:
                self._drop()

    def _pipeline(self, key: tuple[str, str]) -> Any:
        if key not in self._loaded:
            while len(self._loaded) >= _KEPT:
                self._drop()
            variant = parse(key[1])
            self._loaded[key] = self._load(key[0], engine=variant.engine, **variant.options)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _drop(self) -> None:
        key, pipe = self._loaded.popitem(last=False)
        self._called.discard(key)
        pipe.close()


def compare(engines: Engines, question: Question) -> Iterator[Pair]:
    """The pair as it grows: empty, with A's image, with both."""
    pair = Pair(question)
    yield pair
    pair = replace(pair, a=engines.draw(question, question.engines[0]))
    yield pair
    yield replace(pair, b=engines.draw(question, question.engines[1]))
