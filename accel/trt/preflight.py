"""Whether an engine file may and can run here; if not, the reason and the command that helps.

No library has a call that tells this in advance, and an engine file is executable code: all checks come before a byte
of it is deserialized. The contents are compared last: they have gigabytes, and the record alone gives most reasons.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass

from ..bundle import Bundle
from ..errors import UserError
from ..files import sha256
from . import trust
from .engine_files import KINDS, EngineFile, Place, digest_bytes, find, key_of, rebuild, sources


@dataclass(frozen=True)
class Fit:
    """Whether an engine file can run here; if not, why and what to type."""

    ok: bool
    reason: str
    fix: str = ""


class NoEngineFile(UserError):
    """A component has no engine file that can be used here."""


def check(bundle: Bundle, file: EngineFile, here: Place | None) -> Fit:
    """Whether an engine file may be loaded here; reads all of it.

    Args:
        here: None leaves out what depends on the machine.
    """
    fit = fits(bundle, file, here)
    return _contents(bundle, file, here) if fit.ok else fit


def fits(bundle: Bundle, file: EngineFile, here: Place | None) -> Fit:
    """`check` without reading the contents, so it takes no time; whoever loads them has to compare them."""
    signed = trusted(file)
    build = _rebuild(bundle, file, here, signed)
    if reason := damaged(file):
        return Fit(False, reason, build)
    if not trust.owned(file.path):
        copied = f"cp -r {shlex.quote(str(bundle.path))} my-copy && accel build my-copy"
        return Fit(False, "it or its folder belongs to another user, who can exchange it", copied)
    if not trust.private(file.path):
        reason = "others can write it or its folder, so it may be anybody's code"
        return Fit(False, reason, f"chmod -R go-w {shlex.quote(str(file.path.parent))}")
    if not signed:
        return Fit(
            False,
            "it does not carry your signature: an engine file is executable code, and this one was not built by you",
            f"{build}   (or, if you know where it comes from: accel trust {bundle.path})",
        )
    if file.component not in bundle.manifest.components:
        return Fit(False, f"this bundle has no {file.component}", "accel inspect says what it has")
    reason = _other_bundle(bundle, file) or (_refused(file, here) if here else "")
    return Fit(False, reason, build) if reason else Fit(True, "fits")


def damaged(file: EngineFile) -> str:
    """What is wrong with an engine file or its record, without reading the contents; empty where nothing is."""
    if not file.path.is_file():
        return f"{file.path.name} is missing"
    size, built = file.path.stat().st_size, file.record["plan"]["bytes"]
    if size != built:
        return f"it has {size:,} bytes where {built:,} were built"
    if file.key != key_of(file.identity) or file.path.parent.name != file.key:
        return "its record was changed after it was built"
    return ""


def changed(file: EngineFile, data: bytes | None = None) -> str:
    """What is wrong with an engine file's contents; empty where they are what was built.

    Args:
        data: the contents, where they are in memory already.
    """
    digest = sha256(file.path) if data is None else digest_bytes(data)
    same = digest == file.record["plan"]["sha256"]
    return "" if same else "the file was changed after it was built (its sha256 differs)"


def trusted(file: EngineFile) -> bool:
    """Whether an engine file carries this user's signature."""
    try:
        return trust.signed(file.text, file.path.with_suffix(".sig").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return False


def _rebuild(bundle: Bundle, file: EngineFile, here: Place | None, signed: bool = True) -> str:
    engine = file.engine if file.engine in KINDS else "tensorrt"
    gpu = here.index if here else None if file.identity.get("device") == "cpu" else 0
    return rebuild(bundle, file.component, file if signed else None, gpu, engine)


def _contents(bundle: Bundle, file: EngineFile, here: Place | None, data: bytes | None = None) -> Fit:
    reason = changed(file, data)
    return Fit(False, reason, _rebuild(bundle, file, here)) if reason else Fit(True, "fits")


def _other_bundle(bundle: Bundle, file: EngineFile) -> str:
    """What of the bundle has changed since the build; empty where nothing has."""
    words = {"graph_sha256": "another ONNX graph", "weights_sha256": "other weights"}
    for name, value in sources(bundle, bundle.component(file.component)).items():
        if file.identity.get(name) != value:
            return f"it was built from {words.get(name, f'another {name}')} than the bundle has now"
    return ""


def _refused(file: EngineFile, here: Place) -> str:
    """Why an engine does not run here; empty where it does."""
    if file.engine != here.engine:
        return f"it is of the engine {file.engine}, and this is {here.engine}"
    return here.refuses(file)


def choose(
    bundle: Bundle,
    component: str,
    here: Place | None,
    key: str | None = None,
    engine: str = "tensorrt",
    refuse: Callable[[EngineFile], Fit | None] = lambda file: None,
) -> tuple[EngineFile, bytes]:
    """The newest engine file of a component that passes the pre-flight, and its bytes: the very ones that were checked.

    Args:
        here: None leaves out what depends on the machine.
        key: only the engine file with this key.
        engine: the one that is to run it.
        refuse: what else is wrong with an engine file that would fit.

    Raises:
        NoEngineFile: when there is none, with the reason of the newest and its fix.
    """
    problems: list[tuple[str, Fit]] = []
    for file in find(bundle, component, engine):
        if isinstance(file, UserError):
            problems.append(("", Fit(False, file.message, file.fix)))
        elif key in (None, file.key):
            fit = fits(bundle, file, here)
            fit = (fit.ok and refuse(file)) or fit
            if fit.ok:
                try:
                    data = file.path.read_bytes()
                    fit = _contents(bundle, file, here, data)
                except OSError as error:
                    fit = Fit(False, f"it cannot be read ({error.strerror})", "check its permissions")
            if fit.ok:
                return file, data
            problems.append((file.key, fit))
    if not problems:
        which = f" with the key {key}" if key else ""
        build = rebuild(bundle, component, gpu=here.index if here else 0, engine=engine)
        raise NoEngineFile(f"{bundle.path} has no {KINDS[engine].title} engine file of {component}{which}", build)
    first_key, first = problems[0]
    more = f" (and {len(problems) - 1} more that do not fit)" if len(problems) > 1 else ""
    name = f" {first_key[:8]}" if first_key else ""
    title = KINDS[engine].title
    raise NoEngineFile(f"the {title} engine file{name} of {component} cannot be used: {first.reason}{more}", first.fix)
