"""What holds an engine's memory: closed once, never used afterwards, neither copied nor pickled."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

from ..errors import UserError

Self = TypeVar("Self", bound="Resource")


class Resource:
    """A context manager that gives its memory back at the end of `with`, or by `close()`.

    Attributes:
        closed: whether that has happened.
        what: what it is called in errors; "" for the name of its class.
        again: how to get another one, as the fix of errors says it.
    """

    closed = False
    what = ""
    again = "load it again"

    def close(self) -> None:
        """Give the memory back; it cannot be used afterwards. A second call does nothing."""
        if not self.closed:
            self.closed = True
            self.release()

    def release(self) -> None:
        """What `close` does, once."""

    def check_open(self) -> None:
        """Refuse to be used when closed.

        Raises:
            UserError: with what to do instead.
        """
        if self.closed:
            raise UserError(f"this {self.what or type(self).__name__} is closed and cannot be used", self.again)

    def __enter__(self: Self) -> Self:
        self.check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        """Python asks this of an object that is to be copied or pickled."""
        raise UserError(
            f"this {self.what or type(self).__name__} cannot be copied or pickled: it holds an engine's memory",
            f"pass the bundle's path along, and there {self.again}",
        )

    def __reduce_ex__(self, _: Any) -> NoReturn:
        self.__reduce__()
