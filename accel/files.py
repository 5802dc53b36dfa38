"""Files that are never half-written, never outside their folder, and never silently changed."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .disk import atomic
from .errors import UserError, printable

_CHUNK = 1 << 22
# Limits of a JSON file: parsed it takes up to twenty times its size in memory, and no file of ours is half as deep.
_JSON_BYTES, _JSON_DEPTH = 16 << 20, 32
_PATIENCE = 1.0  # seconds that a writer waits for one that may only be tidying up
_own = threading.local()

SINGLE_GRAPH, OPENVINO_GENAI = "single_graph.json", "openvino_genai.json"
# A folder is ours, and may be replaced when asked, if it holds one of these: a bundle's, a trained pipeline's, that of
# one graph, one for OpenVINO GenAI.
OWN = ("accel.json", "training.json", SINGLE_GRAPH, OPENVINO_GENAI)


def cache_dir() -> Path:
    """This user's cache: `$ACCEL_CACHE`, else the platform's usual place."""
    if "ACCEL_CACHE" in os.environ:
        return Path(os.environ["ACCEL_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "accel"
    try:
        return Path.home() / ".cache" / "accel"
    except RuntimeError:  # no $HOME, and a user whom the system does not know, as in many containers
        return Path(tempfile.gettempdir()) / f"accel-{os.getuid()}"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """sha256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old one or the new one, never a part of either.

    The bytes go to one name beside it, locked: a second writer waits, and what a killed one left there is written over.
    """
    temporary = path.with_name(f".{path.name}.partial")
    handle = atomic.acquire(temporary, wait=True)
    assert handle is not None
    try:
        os.ftruncate(handle, 0)
        with os.fdopen(os.dup(handle), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, and its folder where that is missing; NaN and infinity are refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file of ordinary size and depth; `what` names it in the error."""
    data = read_bytes(path, what, _JSON_BYTES)
    try:
        return parse_json(data)
    except ValueError as error:
        raise UserError(f"{what} is damaged ({error}): {path}", "restore the file or make the folder again") from None


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: for anything that is not JSON in UTF-8, or is nested deeper than any file of ours.
    """
    try:
        value = json.loads(data if isinstance(data, str) else data.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(_JSON_DEPTH):
        level = [item for entry in level for item in _items(entry) if isinstance(item, (dict, list))]
        if not level:
            return value
    raise ValueError(f"it is nested more than {_JSON_DEPTH} deep")


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_bytes(path: Path, what: str, limit: int) -> bytes:
    """The content of an ordinary file (no device, no pipe) of at most `limit` bytes; `what` names it in the error."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{what} is not an ordinary file: {path}", "restore the file or make the folder again")
            if found.st_size > limit:
                raise UserError(
                    f"{what} has {found.st_size:,} bytes, where {limit:,} are the most that it may have: {path}",
                    "restore the file or make the folder again",
                )
            return file.read(limit)
    except FileNotFoundError:
        raise UserError(f"{what} is missing: {path}", "restore the file or make the folder again") from None
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror}): {path}", "check its permissions") from None
    except ValueError:  # a zero byte in the name
        raise UserError(f"{what} cannot be read: {str(path)!r} cannot be a path", "check the path") from None


def inside(root: Path, relative: str, what: str) -> Path:
    """The path of a file that must lie in `root`: every name that comes out of a file becomes a path here.

    Raises:
        UserError: when the entry is absolute, climbs out with `..`, holds characters that cannot be shown, or is (or
            passes through) a symbolic link.
    """
    pure = PurePosixPath(relative if isinstance(relative, str) else "")
    problem = ""
    if not pure.parts or pure.is_absolute() or any(char in relative for char in "\\:\0"):
        problem = "is not a relative path"
    elif not relative.isprintable():
        problem = "holds characters that cannot be shown"
    elif ".." in pure.parts:
        problem = "points outside the folder"
    else:
        path = root
        for part in pure.parts:
            path = path / part
            if path.is_symlink():
                problem = "is or passes through a symbolic link"
                break
    if problem:
        raise UserError(
            f"{what} {relative!r} {problem}; refused, because it could reach files that are not part of it",
            "get the folder again from a source you trust",
        )
    return root / pure


@contextlib.contextmanager
def exclusive(target: Path, *, patience: float | None = None) -> Iterator[None]:
    """Hold the only right to write `target`; the system gives it back when the process ends, however it ends.

    The lock lies beside the target, so that everybody who sees the one sees the other. Whoever gets it first tidies up
    what a killed writer left. `new_folder` takes the right for itself, but from a thread that has it already.

    Args:
        patience: seconds to wait for it; by default one, in which a reader is done with tidying up.

    Raises:
        UserError: when another process has it (which one), or the place cannot be written.
    """
    target = _one_name(target)
    try:
        lock = _lock_path(target)
        until = time.monotonic() + (_PATIENCE if patience is None else patience)
        while (handle := atomic.acquire(lock, wait=False)) is None:
            if time.monotonic() > until:
                raise UserError(
                    f"another process is writing {target} right now: {printable(atomic.holder(lock))}",
                    "wait for it to finish, or choose another folder",
                )
            time.sleep(0.05)
    except OSError as error:
        raise disk_error(error, target) from error
    _held().add(target)
    try:
        atomic.sign(handle)
        _tidy(target)
        yield
    finally:
        _held().discard(target)
        atomic.release(handle, lock)


@contextlib.contextmanager
def waiting_for(target: Path) -> Iterator[None]:
    """Like `exclusive`, for work of moments: waits until the others are done."""
    lock = _lock_path(_one_name(target))
    handle = atomic.acquire(lock, wait=True)
    assert handle is not None
    try:
        yield
    finally:
        atomic.release(handle, lock)


def settle(target: Path) -> None:
    """Tidy up after a killed writer of `target`, for whoever reads it: where it was killed in the middle of replacing
    a folder, the old one comes back. Nothing happens while another process is writing, or where nothing may be changed.
    """
    with contextlib.suppress(OSError, UserError, ValueError):
        if next(_leftovers(_one_name(target)), None):
            with exclusive(target, patience=0):
                pass


def _held() -> set[Path]:
    """What this thread has the only right to write."""
    return _own.__dict__.setdefault("held", set())


def _one_name(target: Path) -> Path:
    """One name for one place, however it is spelled: two writers must meet at the same lock."""
    if "\0" in str(target):
        raise UserError(f"{str(target)!r} cannot be a path", "choose another folder")
    target = Path(os.path.abspath(target))
    return Path(os.path.realpath(target.parent)) / target.name


def _lock_path(target: Path) -> Path:
    """Beside the target; within it where only the target may be written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    within = not os.access(target.parent, os.W_OK) and os.access(target, os.W_OK) and target.is_dir()
    return target / ".lock" if within else target.with_name(f".{target.name}.lock")


def _leftovers(out: Path) -> Iterator[Path]:
    """What writers of `out` leave beside it when they are killed."""
    name = glob.escape(out.name)
    for pattern in (f".{name}.previous", f".{name}.partial-*", f"..{name}.float.*"):
        yield from out.parent.glob(pattern)
    if _ours(float32 := out.with_name(f".{out.name}.float")):  # where an int8 export keeps the float32 bundle meanwhile
        yield float32


def _tidy(out: Path) -> None:
    previous = out.with_name(f".{out.name}.previous")
    if previous.exists():
        _settle(previous, out)
    for path in _leftovers(out):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sweep(folder: Path) -> None:
    """Remove what killed `write_bytes` left in a folder; what is being written is locked and stays."""
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if path.is_file() and (handle := atomic.acquire(path, wait=False)) is not None:
                atomic.release(handle, path)


@contextlib.contextmanager
def new_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Build a folder beside `out` and rename it into place only when the body has succeeded.

    A body that fails, or is interrupted, leaves `out` exactly as it was. What a killed process left behind is removed
    by the next one that writes or reads the same place.

    Raises:
        UserError: when `out` exists (and `overwrite` is false), cannot be written, or another process is writing it.
    """
    out = _one_name(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.nullcontext() if out in _held() else exclusive(out):
            refuse_existing(out, overwrite)
            temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
            try:
                temporary.chmod(0o755)
                yield temporary
                readable(temporary)
                refuse_existing(out, overwrite)  # somebody may have made it during the hours of work
                replace_folder(out, temporary)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise disk_error(error, out) from error


def readable(folder: Path) -> None:
    """Let everybody read what was written: safetensors makes files for their owner only, models are for servers too."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o644)


def replace_folder(out: Path, new: Path) -> None:
    """Put the folder `new` in the place of `out`, at once where the system can: a reader finds the old or the new one.

    Elsewhere the old one is set aside first, because no rename replaces a full folder; whoever meets the result of a
    kill in between puts it back (`settle`).
    """
    if out.exists() and atomic.exchange(out, new):
        _remove(new)  # which is the old one now
        return
    previous = out.with_name(f".{out.name}.previous")
    try:
        if out.exists():
            os.replace(out, previous)
        os.replace(new, out)
    finally:
        if previous.exists():
            _settle(previous, out)


def _settle(previous: Path, out: Path) -> None:
    """The folder set aside goes back when its place is empty, and away when it is taken."""
    if out.exists():
        _remove(previous)
    else:
        os.replace(previous, out)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Refuse to write where something is, but for an empty folder, or with `overwrite` for one that accel wrote."""
    if not out.is_symlink() and (not out.exists() or (out.is_dir() and not any(out.iterdir()))):
        return
    if not overwrite:
        raise UserError(f"{out} exists already", "choose another folder, or add --overwrite to replace it")
    if out.is_symlink():
        raise UserError(f"{out} is a symbolic link, so it is not overwritten", f"name the folder: {out.resolve()}")
    if not _ours(out):
        raise UserError(f"{out} is not something accel wrote, so it is not overwritten", "choose another folder")


def _ours(folder: Path) -> bool:
    """Whether accel wrote it."""
    return any((folder / name).is_file() for name in OWN)


def disk_error(error: OSError, out: Path) -> Exception:
    """What went wrong while `out` was made, for people; anything unexpected stays as it is."""
    code = error.errno
    if code is None and (found := re.search(r"\[Errno (\d+)\]", str(error))):
        code = int(found[1])  # shutil.copytree puts the errors of all files into one text
    if code in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no space left while writing {out}", "free some space or write to another disk")
    if isinstance(error.filename, str):
        where = Path(os.path.abspath(error.filename))
        if where not in (out, *out.parents) and not str(where).startswith(f"{out.parent}/.{out.name}."):
            return UserError(f"{where} cannot be used: {error.strerror}", "check that path and its permissions")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"no permission to write {out}", "choose a folder you may write to")
    if code in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"{out} cannot be created: a part of that path is a file", "choose another folder")
    if code == errno.ENAMETOOLONG:
        return UserError(f"{out} cannot be created: the name is too long", "choose another folder")
    return error


def require_space(folder: Path, needed: int) -> None:
    """Fail before hours of work, not after: `needed` bytes must be free where `folder` will be."""
    try:
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise disk_error(error, folder) from error
    if free < needed:
        raise UserError(
            f"about {needed / 1e9:.1f} GB are needed in {folder}, and {free / 1e9:.1f} GB are free",
            "free some space or write to another disk",
        )
