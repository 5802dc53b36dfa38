"""What text encoders made of token ids, kept: a prompt that comes again does not run them again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

SIZE = 16


class TextCache:
    """The results of the latest calls, by all that they depend on; the one that was not used for longest goes first.

    A result is that of the very same call before, so its bits are those of computing it again. Nobody may change it.

    Args:
        size: how many results to keep; 0 for none, which computes every one.

    Attributes:
        made: how many results were computed.
    """

    def __init__(self, size: int = SIZE):
        self.size, self.made = size, 0
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of a key, made where it is not there. Threads that ask for it at once may each make it."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            self.made += 1
        result = make()
        with self._lock:
            self._kept[key] = result
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        return result

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
