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
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from .errors import UserError

_CHUNK = 1 << 22

# A folder is ours, and may be replaced when asked, if it holds one of these: a bundle's, a trained pipeline's.
OWN = ("accel.json", "training.json")


def cache_dir() -> Path:
    """This user's cache: `$ACCEL_CACHE`, else the platform's usual place."""
    if "ACCEL_CACHE" in os.environ:
        return Path(os.environ["ACCEL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accel"


@contextlib.contextmanager
def temporary_caches() -> Iterator[dict[str, str]]:
    """Empty caches of accel and torch.compile for a block, deleted after it: a measurement must neither find what the
    user compiled earlier nor leave anything behind.

    Yields:
        The environment variables that name the caches, for child processes.
    """
    with tempfile.TemporaryDirectory(prefix="accel-caches-") as folder:
        caches = {"ACCEL_CACHE": f"{folder}/accel", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        before = {name: os.environ.get(name) for name in caches}
        os.environ.update(caches)
        try:
            yield caches
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


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
    """Write a file atomically: a reader sees the old one or the new one, never a part of either."""
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, and its folder where that is missing; NaN and infinity are refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file; `what` names it in the error."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{what} is missing: {path}", "restore the file or make the folder again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is damaged ({error}): {path}", "restore the file or make the folder again") from None
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror}): {path}", "check its permissions") from None


def inside(root: Path, relative: str, what: str) -> Path:
    """The path of a file that must lie in `root`.

    Raises:
        UserError: when the entry is absolute, climbs out with `..`, or is (or passes through) a symbolic link.
    """
    pure = PurePosixPath(relative if isinstance(relative, str) else "")
    problem = ""
    if not pure.parts or pure.is_absolute() or any(char in relative for char in "\\:\0"):
        problem = "is not a relative path"
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
            f"{what} {relative!r} {problem}; refused, because it could read files that are not part of it",
            "get the folder again from a source you trust",
        )
    return root / pure


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Hold the only right to write `target`; the system gives it back when the process ends, however it ends."""
    try:
        held = _lock(target).acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another process is writing {target} right now", "wait for it to finish, or choose another folder"
        ) from None
    with held:
        yield


def waiting_for(target: Path) -> FileLock:
    """Like `exclusive`, for work of moments: a context that waits until the others are done."""
    return _lock(target)


def _lock(target: Path) -> FileLock:
    # The lock lies in the cache, not beside the target: a lock file may never be deleted while others may wait on it.
    name = f"{digest_of(str(target))[:32]}.lock"
    user = getattr(os, "geteuid", int)()
    for folder in (cache_dir() / "locks", Path(tempfile.gettempdir()) / f"accel-{user}"):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
            break
    return FileLock(folder / name)


@contextlib.contextmanager
def new_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Build a folder beside `out` and rename it into place only when the body has succeeded.

    A body that fails, or is interrupted, leaves `out` exactly as it was. What a killed process left behind is removed
    by the next one that writes to the same place.

    Raises:
        UserError: when `out` exists (and `overwrite` is false), cannot be written, or another process is writing it.
    """
    if "\0" in str(out):
        raise UserError(f"{str(out)!r} cannot be a path", "choose another folder")
    # One name for one place, however it is spelled: two writers must meet at the same lock.
    out = Path(os.path.abspath(out))
    out = Path(os.path.realpath(out.parent)) / out.name
    previous = out.parent / f".{out.name}.previous"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(out):
            if previous.exists():
                _settle(previous, out)  # an earlier process was killed in `_replace`
            refuse_existing(out, overwrite)
            for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
                shutil.rmtree(stale, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
            try:
                temporary.chmod(0o755)
                yield temporary
                readable(temporary)
                refuse_existing(out, overwrite)  # somebody may have made it during the hours of work
                _replace(out, temporary, previous)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise _disk_error(error, out) from error


def readable(folder: Path) -> None:
    """Let everybody read what was written: safetensors makes files for their owner only, models are for servers too."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o644)


def _replace(out: Path, new: Path, previous: Path) -> None:
    """Put `new` in the place of `out`. The old folder is set aside first, because no rename replaces a full folder."""
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
        shutil.rmtree(previous, ignore_errors=True)
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
    if not any((out / name).is_file() for name in OWN):
        raise UserError(f"{out} is not something accel wrote, so it is not overwritten", "choose another folder")


def _disk_error(error: OSError, out: Path) -> Exception:
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
        raise _disk_error(error, folder) from error
    if free < needed:
        raise UserError(
            f"about {needed / 1e9:.1f} GB are needed in {folder}, and {free / 1e9:.1f} GB are free",
            "free some space or write to another disk",
        )
