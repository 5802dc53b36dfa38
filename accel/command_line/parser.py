"""argparse with our errors: what is wrong, what to type, and the nearest name for a misspelt one."""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from ..errors import Notice, UserError, unknown

_KINDS: dict[Any, tuple[str, str]] = {int: ("a whole number", "4"), float: ("a number", "0.5")}


class WrongUse(UserError):
    """A command line that cannot be understood; `accel` ends with 2."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `WrongUse`.

    Attributes:
        example: a command that works as it stands; the help and the error for a missing argument show it.
        add_options: adds the options when the parser is chosen, so that a sub-verb costs nothing before.
    """

    add_options: Callable[[], None] | None = None

    def __init__(self, *args: Any, example: str = "", **options: Any):
        self.example = example
        options.setdefault("epilog", f"example: {example}" if example else None)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        if self.add_options:
            self.add_options()
        if not self._subparsers:  # before argparse asks for what is missing: that may be what was misspelt
            for word in itertools.takewhile(lambda word: word != "--", sys.argv[1:] if args is None else args):
                if word.startswith("--") and word.split("=")[0] not in self._option_string_actions:
                    self._refuse(word)
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self._refuse(rest[0])
        return found, rest

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            raise WrongUse(f"{self.prog} takes no further argument {word!r}", self._fix())
        known = [flag for action in self._actions if action.help != argparse.SUPPRESS for flag in action.option_strings]
        error = unknown("option", word.split("=")[0], [flag for flag in known if flag.startswith("--")])
        raise WrongUse(f"{self.prog}: {error.message}", error.fix)

    def error(self, message: str) -> NoReturn:
        missing = "the following arguments are required: "
        if message.startswith(missing):
            message = f"not given: {message.removeprefix(missing)}"
        raise WrongUse(f"{self.prog}: {message.removeprefix('argument ')}", self._fix())

    def _fix(self) -> str:
        help = f"{self.prog} --help shows the options"
        return f"for example {self.example}; {help}" if self.example else help

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        kind = self._registry_get("type", action.type, action.type)
        try:
            return kind(text)
        except UserError as error:
            raise WrongUse(f"{_flag(action)}: {error.message}", error.fix) from None
        except argparse.ArgumentTypeError as error:
            raise WrongUse(f"{_flag(action)}: {error}", self._fix()) from None
        except (TypeError, ValueError):
            what, such = _KINDS.get(kind, ("such a value", ""))
            raise WrongUse(f"{_flag(action)} {text!r} is not {what}", f"such as {_flag(action)} {such}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            error = unknown(_flag(action), value, action.choices)
            raise WrongUse(error.message.removeprefix("unknown ") + " is not known", error.fix)


def _flag(action: argparse.Action) -> str:
    long = [flag for flag in action.option_strings if flag.startswith("--")]
    return (long or action.option_strings or [str(action.metavar or action.dest)])[0]


def one_of(what: str, names: Iterable[str], spelled: Callable[[str], str] = str) -> Callable[[str], str]:
    """A type of argparse: one name out of many, too many for a help line. Lists them, and suggests the nearest.

    Args:
        spelled: the name as it is listed, of a spelling that is taken too.
    """
    known = tuple(names)

    def check(text: str) -> str:
        text = spelled(text)
        if text not in known:
            raise unknown(what, text, known)
        return text

    check.names = known  # type: ignore[attr-defined]  # for shell completion
    return check


def several(what: str, names: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A type of argparse: names with commas between them, each as in `one_of`."""
    check = one_of(what, names)

    def split(text: str) -> tuple[str, ...]:
        found = tuple(check(part.strip()) for part in text.split(",") if part.strip())
        if not found:
            raise UserError(f"no {what} is named", f"one of: {', '.join(names)}")
        return found

    return split


def renamed(parser: Any, old: str, new: str, given: Callable[[Any], Any] | None = None) -> None:
    """Accept an option's old name as well: absent from the help, and answered with a note.

    Args:
        new: its name now, such as "--engine-file"; an option that the parser has already and that may be left out.
        given: what the new option gets for the old one's value, where that was written in another way.
    """
    option = parser._option_string_actions[new]

    class Renamed(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            warnings.warn(f"{old} is now {new}", Notice, stacklevel=2)
            option(parser, namespace, given(values) if given else values, new)

    same = {name: getattr(option, name) for name in ("dest", "nargs", "type", "choices", "metavar")}
    same |= {"type": None, "choices": None} if given else {}
    parser.add_argument(old, action=Renamed, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **same)
