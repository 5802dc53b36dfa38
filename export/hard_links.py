"""Hard links between bundles: one that differs from another in one network does not repeat the other files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from accel.bundle import Bundle
from accel.errors import Notice
from accel.files import sha256


def link_equal_files(folder: Path, base: Bundle) -> int:
    """Turn every file of a folder that is equal to one of the base bundle into a hard link to it.

    Deleting either bundle leaves the other whole. Where links are not possible (another disk) the files stay copies.

    Returns:
        Number of bytes that both bundles share.
    """
    known = {(entry["bytes"], entry["sha256"]): name for name, entry in base.manifest.files.items()}
    sizes = {size for size, _ in known}
    linked = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        name = known.get((size, sha256(path))) if size in sizes else None
        if name is None or not (original := base.file(name)).is_file() or sha256(original) != sha256(path):
            continue
        link = path.with_name(f".{path.name}.link")
        try:
            os.link(original, link)
        except OSError as error:
            what = f"no hard links to {base.path} ({error.strerror}): its files are copied"
            warnings.warn(what, Notice, stacklevel=2)
            return linked
        os.replace(link, path)
        linked += size
    return linked
