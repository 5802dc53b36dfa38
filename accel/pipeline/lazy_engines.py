"""The engines of a pipeline by name: loaded on first use and, with `offload`, closed after their phase."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from ..bundle import Bundle
from ..bundle.kinds import KINDS
from ..engines import Engine
from ..engines.resource import Resource


class LazyEngines(Mapping[str, Engine], Resource):
    """Engines by name.

    Args:
        loaders: the function that loads each of them; it takes `weights` (`Engine.set_weights`) where there are any.
        weights: component -> tensors that it runs with in place of the bundle's own.
        offload: whether `release` gives memory back, so that an image needs only the largest component at a time.

    Attributes:
        descriptions: how each engine describes itself, for every component that was loaded at any time.
    """

    what, again = "pipeline", "accel.load(BUNDLE) loads one"

    def __init__(
        self,
        loaders: Mapping[str, Callable[..., Engine]],
        *,
        offload: bool = False,
        weights: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self._loaders, self.offload, self._weights = dict(loaders), offload, dict(weights or {})
        self._loaded: dict[str, Engine] = {}
        self._changes, self._epochs = 0, dict[str, int]()
        self.descriptions: dict[str, str] = {}
        self._loading, self._image = threading.RLock(), threading.RLock()

    @classmethod
    def of(cls, loaded: Mapping[str, Engine]) -> LazyEngines:
        """Engines that are loaded already."""
        made = cls({name: partial(_given, engine) for name, engine in loaded.items()})
        made.descriptions = {name: getattr(engine, "description", "") for name, engine in loaded.items()}
        return made

    def __getitem__(self, name: str) -> Engine:
        with self._loading:
            self.check_open()
            if name not in self._loaded:
                more = {"weights": self._weights[name]} if self._weights.get(name) else {}
                self._loaded[name] = self._loaders[name](**more)
                self.descriptions[name] = getattr(self._loaded[name], "description", "")
                self._epochs[name] = self._epoch(name)
            return self._loaded[name]

    def set_weights(self, weights: Mapping[str, Mapping[str, Any]]) -> None:
        """Let the engines run with other weights, those that are loaded and those that will be (`Engine.set_weights`).

        Raises:
            UserError: where one of them cannot; all then run with what they had.
        """
        with self._loading:
            before, done = self._weights, []
            concerned = [name for name in self._loaded if before.get(name) or weights.get(name)]
            try:
                for name in concerned:
                    if weights.get(name) is not before.get(name):
                        self._loaded[name].set_weights(weights.get(name, {}))
                        done.append(name)
            except BaseException:
                for name in done:
                    self._loaded[name].set_weights(before.get(name, {}))
                raise
            self._weights = dict(weights)
            self._changes += 1
            self._epochs = {name: self._epoch(name) for name in self._loaded}

    def state(self, names: Iterable[str]) -> Hashable:
        """What the weights of these engines are: it changes with them, and not when an engine is loaded again."""
        with self._loading:
            changed = tuple(self._epoch(name) - self._epochs[name] if name in self._loaded else 0 for name in names)
            return self._changes, changed

    def _epoch(self, name: str) -> int:
        return getattr(self._loaded[name], "epoch", 0)

    def turn(self) -> AbstractContextManager:
        """A context for one image: with `offload` one thread at a time, because its end closes engines."""
        return self._image if self.offload else nullcontext()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def take(self, name: str) -> Engine:
        """A component that the caller owns from now on; the next use loads it again."""
        with self._loading:
            engine = self[name]
            del self._loaded[name]
            return engine

    def phase_over(self, names: Iterable[str]) -> None:
        """With `offload` these engines rest, or are closed where they cannot; else nothing happens."""
        if self.offload:
            self._drop([name for name in names if name in self._loaded and not self._loaded[name].rest()])

    def release(self) -> None:
        self._drop(list(self._loaded))

    def _drop(self, names: Iterable[str]) -> None:
        with self._loading:
            for name in names:
                if name in self._loaded:
                    self._loaded.pop(name).close()
        gc.collect()


def _given(engine: Engine, weights: Mapping[str, Any] | None = None) -> Engine:
    """An engine that somebody else loaded."""
    if weights:
        engine.set_weights(weights)
    return engine


def component_names(bundle: Bundle) -> list[str]:
    """The components that make an image, in the order in which it needs them.

    Raises:
        UserError: where the bundle lacks one of them.
    """
    if bundle.manifest.by_class:
        return present(bundle, "alone")
    for name, kind in KINDS.items():
        if kind.use == "always" and not any(one in bundle.manifest.components for one in kind.names):
            bundle.component(name)  # says what is missing
    return present(bundle, "always", "if present")


def present(bundle: Bundle, *uses: str) -> list[str]:
    """The components of a bundle that are used so, see `accel.bundle.kinds.Kind.use`."""
    names = [name for kind in KINDS.values() if kind.use in uses for name in kind.names]
    return [name for name in names if name in bundle.manifest.components]
