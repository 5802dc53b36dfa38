"""Signatures: only engine files that this user has built, or has signed with `accel trust`, are loaded.

An engine file is executable code, also with host code disallowed (NVIDIA's security notes say so). A digest proves that
it is intact, not who built it. So each is signed (HMAC-SHA256, RFC 2104) with a key that only this user can read. The
signature covers the bytes of the record, which holds the engine file's sha256; any language can check it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from ..errors import UserError
from ..files import cache_dir

_BYTES = 32


def key_file() -> Path:
    return cache_dir() / "plans.key"


def sign(record: bytes) -> str:
    """The signature of a record, in hex; creates this user's key where there is none yet."""
    return hmac.new(_key(create=True), record, hashlib.sha256).hexdigest()


def signed(record: bytes, signature: str) -> bool:
    """Whether a signature is this user's, of exactly these bytes."""
    key = _key(create=False)
    ours = b"" if key is None else hmac.new(key, record, hashlib.sha256).hexdigest().encode()
    return bool(ours) and hmac.compare_digest(ours, signature.strip().encode("utf-8", "replace"))


def owned(path: Path) -> bool:
    """Whether a file and its folder belong to this user (or root)."""
    return all(place.stat().st_uid in (0, os.getuid()) for place in (path, path.parent))


def private(path: Path) -> bool:
    """Whether only this user (and root) can write a file or replace it in its folder."""
    others = stat.S_IWGRP | stat.S_IWOTH
    return owned(path) and not any(place.stat().st_mode & others for place in (path, path.parent))


def _key(create: bool) -> bytes | None:
    path = key_file()
    if create and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # The key appears complete under its name, and only if no other process was first.
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
            f"{path} can be read or written by others, so its signatures prove nothing",
            f"rm {path}, then build the engine files again (or check them and sign them: accel trust BUNDLE --yes)",
        )
    if len(key) != _BYTES:
        raise UserError(f"{path} is damaged", f"rm {path}, then build the engine files again")
    return key
