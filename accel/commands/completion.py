"""`accel completion`: a script that completes verbs, options and names in a shell."""

from __future__ import annotations

import argparse
from typing import Any

from ..command_line.parser import Parser

EXAMPLE = "accel completion bash > ~/.local/share/bash-completion/completions/accel"
SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: Any) -> None:
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"{', '.join(SHELLS)}")


def run(args: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(_everything(), shell=args.shell))
    return 0


def _everything() -> Parser:
    """One parser of all verbs, as they are only needed together here."""
    from .verbs import VERBS, verb

    parser = Parser(prog="accel")
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(metavar="VERB", parser_class=Parser)
    for name, text in VERBS.items():
        _, own = verb(name)
        for method in _methods(own):
            method.add_options()
            _describe(method)
        _describe(own)
        verbs.add_parser(name, help=text)
        verbs.choices[name] = own
    return parser


def _methods(parser: Parser) -> list[Any]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [method for action in found for method in action.choices.values()]


def _describe(parser: Parser) -> None:
    """Tell shtab what it cannot read off the options: names out of many, files and folders."""
    import shtab

    places = {"FILE": shtab.FILE, "PATH": shtab.FILE, "MODEL": shtab.DIRECTORY, "BUNDLE": shtab.DIRECTORY}
    places |= {"DIR": shtab.DIRECTORY, "FOLDER": shtab.DIRECTORY, "OUT": shtab.DIRECTORY}
    for action in parser._actions:
        if names := getattr(action.type, "names", None):
            action.choices = names
        elif action.choices is None and (place := places.get(str(action.metavar))):
            action.complete = place  # type: ignore[attr-defined]
