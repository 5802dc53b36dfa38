"""What a file system does at once: locks that end with their process, and two names exchanged.

No error here is for people yet: `accel.files` says what was meant.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from pathlib import Path


def acquire(path: Path, *, wait: bool) -> int | None:
    """A handle of a file that is locked by it, made where it is missing; None where somebody else has it.

    The last holder renames or deletes the file, so a lock counts only if the file still has its name.
    """
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
                return handle
            os.close(handle)
            raise
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def release(handle: int, lock: Path) -> None:
    with contextlib.suppress(OSError):
        lock.unlink()
    os.close(handle)


def sign(handle: int) -> None:
    """Say in the lock who holds it, for the others' messages."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:2]] if sys.argv else ["python"]
    who = f"{' '.join(words)} (process {os.getpid()} on {os.uname().nodename}, since {time.strftime('%F %T')})"
    os.ftruncate(handle, 0)
    os.pwrite(handle, who.encode(errors="replace"), 0)


def holder(lock: Path) -> str:
    try:
        with lock.open("rb") as file:
            return file.read(300).decode(errors="replace") or "it does not say which"
    except OSError:
        return "it does not say which"


def exchange(one: Path, other: Path) -> bool:
    """Swap two names (renameat2 of Linux with RENAME_EXCHANGE); False where the system or the disk cannot."""
    import ctypes

    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0
