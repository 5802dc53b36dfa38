"""The models of a server, by name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from .limits import UnknownModel
from .worker import Worker


class Models(Mapping[str, Worker]):
    """Workers by name; the first is the one that is meant where none is named.

    Attributes:
        since: when they were loaded, seconds since 1970.
    """

    def __init__(self, workers: Sequence[Worker]):
        self._workers = {worker.name: worker for worker in workers}
        self.since = int(time.time())

    def __getitem__(self, name: str) -> Worker:
        return self._workers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._workers)

    def __len__(self) -> int:
        return len(self._workers)

    def named(self, name: str | None) -> Worker:
        """A worker by its model's name; None for the first.

        Raises:
            UnknownModel: naming those there are.
        """
        if name is None:
            return next(iter(self._workers.values()))
        if name not in self._workers:
            raise UnknownModel(f"unknown model {name!r}; this server has: {', '.join(self._workers)}")
        return self._workers[name]
