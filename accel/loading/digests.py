"""Digests of large files, computed once."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import UserError
from ..files import cache_dir, digest_of, read_json, sha256, write_json


def sha256_once(path: Path) -> str:
    """sha256 of a file, computed once: afterwards its size, times and inode stand for the contents."""
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    kept = cache_dir() / "digests" / f"{digest_of(os.path.abspath(path))}.json"
    with contextlib.suppress(UserError, OSError, KeyError, TypeError):
        known = read_json(kept, "a kept digest")
        if known["stamp"] == stamp:
            return known["sha256"]
    digest = sha256(path)
    with contextlib.suppress(UserError, OSError):
        write_json(kept, {"stamp": stamp, "sha256": digest})
    return digest
