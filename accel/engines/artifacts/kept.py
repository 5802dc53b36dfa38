"""torch.compile's portable artifacts (torch.compiler.save_cache_artifacts) of one network and shape, kept."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...bundle import Bundle
from ...errors import Notice
from ...files import cache_dir, digest_of, inside, write_bytes
from ...machine import instruction_sets, machine_name, version_of
from ...trt import trust

_DIGEST = hashlib.sha256
_ARTIFACTS = "artifacts"
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
    """The first call of a shape: with what an earlier process compiled, or storing its own for the next one.

    A file that is damaged, or that others can write, is left out with a note, and the network compiled again. Without a
    place to write, nothing is kept.
    """
    import torch

    data = _read(path)
    if data is not None and _restored(data):
        return call()
    before = _libraries()
    with _alone():
        result = call()
        made = torch.compiler.save_cache_artifacts()
    if made is not None:
        packed = _packed(made[0], _libraries() - before)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.parent.chmod(0o700)
            write_bytes(path, _DIGEST(packed).digest() + packed)
            path.chmod(0o600)
    return result


def _packed(artifacts: bytes, libraries: Iterable[Path]) -> bytes:
    """torch's artifacts and, as they hold a processor's kernels as C++ alone, the libraries that were made of them."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_ARTIFACTS, artifacts)
        for library in sorted(libraries):
            with contextlib.suppress(OSError):  # without it the next process compiles this one kernel
                archive.writestr(library.relative_to(_torchs_cache()).as_posix(), library.read_bytes())
    return packed.getvalue()


def _restored(data: bytes) -> bool:
    """Put what was packed where torch looks for it; False where this torch does not read it."""
    import torch

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            place = inside(_torchs_cache(), name, "the compiled kernel") if name != _ARTIFACTS else None
            if place is not None and not place.exists():
                with contextlib.suppress(OSError):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    write_bytes(place, archive.read(name))
                    place.chmod(0o700)
        return torch.compiler.load_cache_artifacts(archive.read(_ARTIFACTS)) is not None


def _torchs_cache() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir as of_torch

    return Path(of_torch())


def _libraries() -> set[Path]:
    """The libraries of torch's cache that this process has loaded; none on systems that do not say (all but Linux)."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return set()
    loaded = {Path(found[1]) for line in lines if (found := re.search(r"\s(/.*\.so)$", line))}
    return {library for library in loaded if library.is_relative_to(_torchs_cache())}


def _read(path: Path) -> bytes | None:
    """What a file holds; None where there is none that may be used."""
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
