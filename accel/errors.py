"""The one error type that is for people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def printable(text: str) -> str:
    r"""Text out of a file, as a terminal may show it: a character that moves the cursor or turns the writing direction
    (Unicode categories Other and Separator, but for space, tab and newline) becomes its escape, such as `\x1b`."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def markdown(text: str) -> str:
    r"""Text out of a file as plain words in a Markdown page: no markup, no HTML, no line of its own."""
    plain = printable(text).replace("\n", " ").replace("\t", " ")
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#|!~&$" else c for c in plain)


class UserError(Exception):
    """Something the user can put right: shown as a message and a fix, without a traceback.

    Args:
        message: what is wrong, with the offending value.
        fix: what to type or change next.
    """

    def __init__(self, message: str, fix: str = ""):
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return printable(f"{self.message}\n  fix: {self.fix}" if self.fix else self.message)


class MissingPackage(UserError):
    """An optional package that the requested feature needs is not installed."""

    def __init__(self, package: str, feature: str, extra: str | None = None):
        what = f'pip install "accel-diffusion[{extra}]"' if extra else f"pip install {package}"
        super().__init__(f"{feature} needs the package {package}, which is not installed", what)


def unknown(what: str, value: object, known: Iterable[str], of: str = "") -> UserError:
    """The error for a name that is none of those known; the nearest of them is suggested.

    Args:
        what: what is named, such as "engine".
        value: the name that was given.
        known: the names there are, in the order in which they are to be listed.
        of: whose names these are; "" says nothing.
    """
    names = [str(name) for name in known if name != ""]  # an option that is left out has no name
    near = difflib.get_close_matches(str(value), names, 1)
    suggestion = f"did you mean {near[0]}? " if near else ""
    return UserError(f"unknown {what} {value!r}" + f" of {of}" * bool(of), f"{suggestion}one of: {', '.join(names)}")


class Stopped(Exception):
    """A callback returned False, which ends the making of an image: nothing is returned.

    Args:
        done, steps: how many of the steps had been made.
    """

    def __init__(self, done: int, steps: int):
        super().__init__(f"stopped by the callback after step {done} of {steps}")
        self.done, self.steps = done, steps


class Notice(UserWarning):
    """Something the user should know that does not stop the work."""
