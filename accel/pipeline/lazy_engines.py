"""The engines of a pipeline by name, loaded when they are first used and, if asked, gone after their phase."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping

from ..engines import Engine


class Components(Mapping[str, Engine]):
    """Engines by name.

    Args:
        loaders: what loads each of them.
        passing: whether `release` gives memory back, so that an image needs only the largest component at a time.

    Attributes:
        descriptions: the engines' own words, of every component that was loaded at any time.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], Engine]], *, passing: bool = False):
        self._loaders, self._loaded, self.passing = dict(loaders), {}, passing
        self.descriptions: dict[str, str] = {}

    def __getitem__(self, name: str) -> Engine:
        if name not in self._loaded:
            self._loaded[name] = self._loaders[name]()
            self.descriptions[name] = getattr(self._loaded[name], "description", "")
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def take(self, name: str) -> Engine:
        """A component that is the caller's from now on; asked for again, it is loaded again."""
        engine = self[name]
        del self._loaded[name]
        return engine

    def release(self, names: Iterable[str]) -> None:
        """Their phase is over: with `passing` their memory goes, else nothing happens."""
        if not self.passing:
            return
        for name in names:
            if name in self._loaded:
                self._loaded.pop(name).close()
        gc.collect()
