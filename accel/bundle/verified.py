"""Files compared with the sizes and sha256 digests of a manifest.

A digest is computed once; afterwards size, modification time and inode stand in for it, so that opening a five-gigabyte
bundle again costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import cache_dir, digest_of, inside, read_json, sha256, write_json
from .hub import Origin

_LOCAL = "get {} again, or export the model again"
_HUB = "run this once more, which downloads {} again; if it stays so, it was changed on the hub: ask its author"


def compare(name: str, folder: Path, files: Mapping[str, Mapping[str, Any]], origin: Origin | None) -> None:
    """Compare files of a bundle's folder with what its manifest says of them.

    Args:
        name: what to call the bundle.
        files: entry -> its `sha256` and `bytes`.
        origin: where to get a file again that is not what it should be.

    Raises:
        UserError: naming the first file that is missing, truncated or changed.
    """
    stamps_path = cache_dir() / "verified" / f"{digest_of(str(folder.absolute()))}.json"
    try:
        stamps = read_json(stamps_path, "the verification cache")
        assert isinstance(stamps, dict)
    except (UserError, OSError, AssertionError):
        stamps = {}
    known = dict(stamps)
    for entry, expected in files.items():
        path = inside(folder, entry, "the manifest entry")
        try:
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, expected["sha256"]]
            problem = "" if stamps.get(entry) == stamp else _problem(path, expected)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            problem = "is missing" if missing else f"cannot be read ({error.strerror})"
        if problem:
            if origin:
                origin.forget(entry)
            raise UserError(f"{name}: {entry} {problem}", (_HUB if origin else _LOCAL).format(entry))
        stamps[entry] = stamp
    if stamps != known:
        with contextlib.suppress(OSError):  # a read-only home only costs the next run a hash
            write_json(stamps_path, stamps)


def _problem(path: Path, expected: Mapping[str, Any]) -> str:
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"has {size:,} bytes where {expected['bytes']:,} were written"
    return "" if sha256(path) == expected["sha256"] else "was changed after export (its sha256 differs)"
