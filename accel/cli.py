"""The command line: verbs only. Each verb lives in `accel/commands/` and is imported when it is used."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module

from . import interrupt
from ._version import __version__
from .errors import Notice, UserError, printable

VERBS = {
    "doctor": "check which engines run on this machine, and how to fix the others",
    "demo": "export, run and compare the small models in this package: end to end, offline, about a minute",
    "export": "export a diffusers pipeline to a bundle of checked ONNX graphs that every engine and app can load",
    "build": "build TensorRT engine files of a bundle for this GPU",
    "trust": "trust TensorRT engine files that somebody else built",
    "distill": "train a small or few-step student of a pipeline, fine-tune one, or train a LoRA",
    "run": "make images from prompts with a bundle, on any engine",
    "bench": "measure speed, memory and image differences of the engines, eager against compiled, in one table",
    "evaluate": "measure the image quality of a model by a named protocol (FID, CLIP score, prompt accuracy)",
    "inspect": "show what a bundle contains, whether it is intact and whether it runs here",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done, 1 failed, 2 wrong use, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _top_parser()
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv)
        parser.print_help()
        return 0
    verb = argv[0]
    if verb not in VERBS:
        parser.parse_args(argv)  # prints the list of verbs and exits with 2
    interrupt.install()
    _quiet_libraries()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file may have a name that is not UTF-8
    return _guarded(lambda: _run(verb, argv[1:]))


def _run(verb: str, argv: list[str]) -> int:
    module = import_module(f"accel.commands.{verb}")
    verb_parser = argparse.ArgumentParser(
        prog=f"accel {verb}",
        description=VERBS[verb],
        epilog=f"example: {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(verb_parser)
    code = module.run(verb_parser.parse_args(argv))
    if sys.stdout is not None:  # it is, where the shell has closed it
        sys.stdout.flush()  # here, where a reader that has gone away can still be told from a failure
    return code


def _guarded(run: Callable[[], int]) -> int:
    """Turn every way of ending into an exit code and a sentence."""
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (such as `| head`) has gone: not an error, but nothing more can be printed either.
        _abandon_stdout()
        return 1
    except OSError as error:
        # The disk, a permission, a full output: nothing that a traceback would explain.
        what = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror or str(error)
        print(printable(f"error: {what}\n  fix: check that path, its permissions and free space"), file=sys.stderr)
        _abandon_stdout()
        return 1
    except ImportError as error:
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


def _top_parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {verb:<9} {text}" for verb, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="accel",
        description="Distil, export, compile and measure Stable Diffusion pipelines.\n\n"
        "`accel export` writes a bundle, a folder of ONNX graphs and weights; run, bench and inspect read it.",
        epilog=f"verbs:\n{lines}\n\n`accel VERB --help` shows the options of one of them, with an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"accel {__version__}")
    parser.add_argument("verb", nargs="?", choices=VERBS, metavar="VERB", help="what to do")
    return parser


def _quiet_libraries() -> None:
    """Let people read our lines: silence the libraries' progress bars and notices, keep our own notices."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", Notice)
    warnings.showwarning = lambda message, *_, **__: print(printable(f"note: {message}"), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
