"""torch.compile's portable artifacts (torch.compiler.save_cache_artifacts) of one network and shape, in accel's cache."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...bundle import Bundle
from ...errors import Notice
from ...files import cache_dir, digest_of, inside, write_bytes
from ...machine import instruction_sets, machine_name, version_of
from ...trt import trust

_DIGEST = hashlib.sha256
Result = TypeVar("Result")


def path_for(bundle: Bundle, component: str, options: Mapping[str, Any], sizes: Mapping[str, int], gpu: str) -> Path:
    """The file of a network and shape: with any other bundle, option, version or machine it is another one.

    Args:
        options: of the engine, in values that JSON can hold.
        sizes: of every free dimension.
        gpu: name of the GPU; "" for the processor.
    """
    known = {
        "options": dict(options),
        "sizes": dict(sizes),
        "versions": {name: version_of(name) for name in ("torch", "triton", "diffusers", "transformers")},
        "machine": [gpu] if gpu else [machine_name(), *instruction_sets()],
    }
    name = f"torch-compile/{bundle.digest[:32]}/{component}-{digest_of(known)[:32]}.bin"
    return inside(cache_dir(), name, "the cache folder")


def compiled(path: Path, call: Callable[[], Result]) -> Result:
    """The first call of a shape: with the artifacts of an earlier process, or storing its own for the next one.

    A file that is damaged, or that others can write, is left out with a note, and the network compiled again. Without a
    place to write, nothing is kept.
    """
    import torch

    data = _read(path)
    if data is not None and torch.compiler.load_cache_artifacts(data) is not None:
        return call()
    with _alone():
        result = call()
        made = torch.compiler.save_cache_artifacts()
    if made is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.parent.chmod(0o700)
            write_bytes(path, _DIGEST(made[0]).digest() + made[0])
            path.chmod(0o600)
    return result


def _read(path: Path) -> bytes | None:
    """A file's artifacts; None where there are none that may be used."""
    try:
        data = path.read_bytes()
        private = trust.private(path)
    except OSError:
        return None
    size = _DIGEST().digest_size
    if private and _DIGEST(data[size:]).digest() == data[:size]:
        return data[size:]
    reason = "is damaged" if private else "can be written by others, and what lies there is executed"
    text = f"{path} {reason}: the network is compiled again, which takes up to minutes"
    warnings.warn(text, Notice, stacklevel=4)
    with contextlib.suppress(OSError):
        path.unlink()
    return None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Of all that torch compiles in this process, gather what the body compiles alone; torch has no public way."""
    from torch.compiler import _cache

    with getattr(_cache.CacheArtifactManager, "with_fresh_cache", contextlib.nullcontext)():
        yield
