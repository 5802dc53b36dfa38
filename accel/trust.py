"""Which compiled plans may be run: those that carry this user's signature.

A TensorRT plan is executable code, also with host code disallowed (NVIDIA's security notes say so). A digest beside it
proves that it is whole, not who made it. So every plan is signed (HMAC-SHA256, RFC 2104) with a key that only this user
can read; a plan from elsewhere has no such signature until `accel trust` gives it one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import cache_dir

_BYTES = 32


def key_file() -> Path:
    return cache_dir() / "plans.key"


def sign(record: Mapping[str, Any]) -> str:
    """The signature of a record; creates this user's key where there is none yet."""
    return _mac(record, _key(create=True))


def signed(record: Mapping[str, Any], signature: Any) -> bool:
    """Whether a signature is this user's, of exactly this record."""
    key = _key(create=False)
    return key is not None and isinstance(signature, str) and hmac.compare_digest(_mac(record, key), signature)


def private(path: Path) -> bool:
    """Whether nobody but this user (and root) can have written a file, or can replace it in its folder."""
    for place in (path, path.parent):
        found = place.stat()
        if found.st_uid not in (0, os.getuid()) or found.st_mode & stat.S_IWOTH:
            return False
    return True


def _mac(record: Mapping[str, Any], key: bytes) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key(create: bool) -> bytes | None:
    path = key_file()
    if create and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # A finished file appears under the final name, and only if no other process was first.
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(_BYTES))
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    try:
        found = path.lstat()
        key = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "check its owner and permissions") from None
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or not stat.S_ISREG(found.st_mode):
        raise UserError(
            f"{path} can be read or written by others, so it proves nothing",
            f"rm {path}, then build the plans again (or look at them and `accel trust` them)",
        )
    if len(key) != _BYTES:
        raise UserError(f"{path} is damaged", f"rm {path}, then build the plans again")
    return key
