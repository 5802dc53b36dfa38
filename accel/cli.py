"""The command line: verbs only. Each verb lives in `accel/commands/` and is imported when it is used."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from . import interrupt
from ._version import __version__
from .command_line.parser import Parser, WrongUse
from .commands.verbs import VERBS, verb
from .errors import Notice, UserError, printable, unknown
from .progress import QUIET


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done, 1 failed, 2 wrong use, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    verbose, quiet = (not set(flags).isdisjoint(argv) for flags in (("-v", "--verbose"), ("-q", "--quiet")))
    return _guarded(lambda: _run(argv, verbose, quiet), verbose)


def _run(argv: list[str], verbose: bool, quiet: bool) -> int:
    if not argv or argv[0].startswith("-"):
        parser = top_parser()
        parser.parse_args(argv)
        parser.print_help()
        return 0
    if argv[0] not in VERBS:
        error = unknown("verb", argv[0], VERBS)
        raise WrongUse(error.message, error.fix)
    module, parser = verb(argv[0])
    _messages(verbose, quiet)
    interrupt.install()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file may have a name that is not UTF-8
    code = module.run(parser.parse_args(argv[1:], argparse.Namespace(typed=argv)))
    if sys.stdout is not None:  # it is, where the shell has closed it
        sys.stdout.flush()  # here, where a reader that has gone away can still be told from a failure
    return code


def _guarded(run: Callable[[], int], verbose: bool) -> int:
    """Turn every way of ending into an exit code and a sentence."""
    try:
        return run()
    except UserError as error:
        if verbose:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, WrongUse) else 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (such as `| head`) has gone: not an error, but nothing more can be printed either.
        _abandon_stdout()
        return 1
    except OSError as error:
        # The disk, a permission, a full output: nothing that a traceback would explain.
        if verbose:
            traceback.print_exc()
        what = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror or str(error)
        print(printable(f"error: {what}\n  fix: check that path, its permissions and free space"), file=sys.stderr)
        _abandon_stdout()
        return 1
    except ImportError as error:
        if verbose:
            traceback.print_exc()
        print(printable(f"error: {error}\n  fix: accel doctor says what is missing here"), file=sys.stderr)
        return 1
    except MemoryError:
        print("error: out of memory\n  fix: use a smaller size or batch, or more memory", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        print("error: this is a bug in accel; please report it with the lines above", file=sys.stderr)
        return 1


def _abandon_stdout() -> None:
    """What is still in the buffer cannot be printed; without this Python would try again at its end, and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def top_parser() -> Parser:
    """The parser of `accel` without a verb."""
    width = max(map(len, VERBS))
    lines = "\n".join(f"  {name:<{width}} {text}" for name, text in VERBS.items())
    parser = Parser(
        prog="accel",
        description="Distil, export, compile and measure Stable Diffusion pipelines.\n\n"
        "`accel export` writes a bundle, a folder of ONNX graphs and weights; run, bench and inspect read it.",
        epilog=f"verbs:\n{lines}\n\n`accel VERB --help` shows the options of one of them, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"accel {__version__}")
    parser.add_argument("verb", nargs="?", metavar="VERB", help="what to do")
    return parser


def _messages(verbose: bool, quiet: bool) -> None:
    """Let people read our lines: silence the libraries' progress bars and messages, print our notes as such."""
    if quiet:
        os.environ |= {QUIET: "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        for name, value in {
            "TRANSFORMERS_VERBOSITY": "error",
            "DIFFUSERS_VERBOSITY": "error",
            "TQDM_DISABLE": "1",
        }.items():
            os.environ.setdefault(name, value)
        warnings.simplefilter("ignore")
    warnings.simplefilter("ignore" if quiet else "always", Notice)
    shown, said = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category is Notice:
            if str(message) not in said:
                print(printable(f"note: {message}"), file=sys.stderr)
            said.add(str(message))
        else:
            shown(message, category, *where, **more)

    warnings.showwarning = show


if __name__ == "__main__":
    sys.exit(main())
