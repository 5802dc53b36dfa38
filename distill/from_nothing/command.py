"""The command line of a model that is trained from nothing: an option for each field of its dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from accel.errors import UserError

from .fit import CONSOLE

T = TypeVar("T")


def parser(module: str, title: str, name: str, checkpoint_every: int, *kinds: type) -> argparse.ArgumentParser:
    """Where everything goes, and one option per field, with its default and `help` and `choices` of its metadata.

    Args:
        module: that is run, for the usage line.
        name: of the model: its folders are out/NAME and runs/NAME.
        kinds: dataclasses of numbers, words and tuples of numbers, every field with a default.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m {module}", description=title, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--out", type=Path, default=Path("out", name), help="where teacher/ and its judge go")
    made.add_argument("--run", type=Path, default=Path("runs", name), help="checkpoints; kept to resume")
    made.add_argument("--checkpoint-every", type=int, default=checkpoint_every, help="steps between checkpoints")
    made.add_argument("--threads", type=int, default=2, help="CPU threads")
    for field in (field for kind in kinds for field in dataclasses.fields(kind)):
        several = isinstance(field.default, tuple)
        made.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default[0] if several else field.default),
            nargs="+" if several else None,
            default=field.default,
            choices=field.metadata.get("choices"),
            help=field.metadata.get("help", " "),
        )
    return made


def read(kind: type[T], options: argparse.Namespace) -> T:
    """The dataclass that the options say."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def carried_out(options: argparse.Namespace, work: Callable[[], Any]) -> int:
    """Exit status of the training; an error is printed."""
    torch.set_num_threads(options.threads)
    try:
        work()
    except UserError as error:
        CONSOLE.print(f"[red]error:[/red] {error}")
        return 1
    return 0
