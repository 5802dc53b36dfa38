"""What is slow to make and always comes out the same is made once: for all tests, all workers and the next run.

It lies in pytest's own cache folder (`pytest --cache-clear` empties it), under a digest of all that it depends on: our
code, the version of Python and of every package. Change a line of them, and it is made again.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[2]
MAKERS = ("accel", "export", "tests/conftest.py", "tests/fakes/made_once.py", "tests/fakes/stored_graphs.py")
A_WEEK = 7 * 24 * 3600


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def digest_of_code(root: Path, makers: Iterable[str]) -> str:
    """Digest of Python files, and of all of them in folders, by name and content."""
    found = []
    for maker in (root / name for name in makers):
        for path in sorted(maker.rglob("*.py")) if maker.is_dir() else [maker]:
            found.append((path.relative_to(root).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()))
    return digest(*found)


@cache
def store(root: Path = ROOT) -> Path:
    """The folder of this code and these packages. Those of other code that nobody used for a week are deleted."""
    packages = sorted({f"{made.name} {made.version}" for made in distributions()})
    everything = root / ".pytest_cache" / "d" / "made"
    own = everything / digest(digest_of_code(root, MAKERS), platform.python_version(), platform.machine(), packages)
    own.mkdir(parents=True, exist_ok=True)
    (own / "used").touch()
    for used in everything.glob("*/used"):
        if time.time() - used.stat().st_mtime > A_WEEK:
            shutil.rmtree(used.parent, ignore_errors=True)
    return own


def made_once(place: Path, key: str, make: Callable[[Path], object]) -> Path:
    """The folder `place / key`, filled by `make(folder)` if it is not there; nobody may change what is in it.

    Of two processes that ask at the same time the second waits for the first. A maker that fails or is killed leaves
    a folder of another name, which the next one deletes before it starts anew.
    """
    done = place / key
    if not done.is_dir():
        with FileLock(place / f"{key}.lock"):
            if not done.is_dir():
                partial = place / f"{key}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                partial.rename(done)
    return done
