"""Whether a compiled engine file may and can run here, with the reason and what to type.

TensorRT has no call that tells it in advance, and an engine file is executable code: all of this comes before any byte
of it is deserialised. The contents come last: they have gigabytes, and most reasons are in the record.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass

from ..bundle import Bundle
from ..errors import UserError
from ..files import sha256
from . import trust
from .engine_files import EngineFile, Here, digest_bytes, find, key_of, rebuild, sources
from .library import numbers


@dataclass(frozen=True)
class Fit:
    """Whether an engine file can run here; if not, why and what to do."""

    ok: bool
    reason: str
    fix: str = ""


class NoEngineFile(UserError):
    """There is no engine file that can be used."""


def check(bundle: Bundle, engine_file: EngineFile, here: Here | None) -> Fit:
    """Whether an engine file may be loaded here; reads all of it.

    Args:
        here: None leaves out what depends on the machine.
    """
    found = fits(bundle, engine_file, here)
    return _contents(bundle, engine_file, here, changed(engine_file)) if found.ok else found


def fits(bundle: Bundle, engine_file: EngineFile, here: Here | None) -> Fit:
    """`check` without the engine file's contents: takes no time, and whoever loads them has to compare them."""
    signed = trusted(engine_file)
    again = _again(bundle, engine_file, here, signed)
    if reason := damaged(engine_file):
        return Fit(False, reason, again)
    if not trust.owned(engine_file.path):
        copied = f"cp -r {shlex.quote(str(bundle.path))} my-copy && accel build my-copy"
        return Fit(False, "it or its folder belongs to another user, who can exchange it", copied)
    if not trust.private(engine_file.path):
        reason = "others can write it or its folder, so it may be anybody's code"
        return Fit(False, reason, f"chmod -R go-w {shlex.quote(str(engine_file.path.parent))}")
    if not signed:
        return Fit(
            False,
            "it does not carry your signature: an engine file is executable code, and this one was not built by you",
            f"{again}   (or, if you know where it comes from: accel trust {bundle.path})",
        )
    return (
        _fits_bundle(bundle, engine_file, again) or (here and _fits_here(engine_file, here, again)) or Fit(True, "fits")
    )


def damaged(engine_file: EngineFile) -> str:
    """What is wrong with an engine file or its record at first sight; empty where nothing is."""
    if not engine_file.path.is_file():
        return f"{engine_file.path.name} is missing"
    size, built = engine_file.path.stat().st_size, engine_file.record["plan"]["bytes"]
    if size != built:
        return f"it has {size:,} bytes where {built:,} were built"
    if engine_file.key != key_of(engine_file.identity) or engine_file.path.parent.name != engine_file.key:
        return "its record was changed after it was built"
    return ""


def changed(engine_file: EngineFile, data: bytes | None = None) -> str:
    """What is wrong with an engine file's contents; empty where they are what was built.

    Args:
        data: the contents, where they are in memory already.
    """
    digest = sha256(engine_file.path) if data is None else digest_bytes(data)
    same = digest == engine_file.record["plan"]["sha256"]
    return "" if same else "the file was changed after it was built (its sha256 differs)"


def trusted(engine_file: EngineFile) -> bool:
    """Whether it carries this user's signature."""
    try:
        return trust.signed(
            engine_file.text, engine_file.path.with_suffix(".sig").read_text(encoding="utf-8", errors="replace")
        )
    except OSError:
        return False


def _again(bundle: Bundle, engine_file: EngineFile, here: Here | None, signed: bool) -> str:
    return rebuild(bundle, engine_file.component, engine_file if signed else None, here.index if here else 0)


def _contents(bundle: Bundle, engine_file: EngineFile, here: Here | None, problem: str) -> Fit:
    return Fit(False, problem, _again(bundle, engine_file, here, True)) if problem else Fit(True, "fits")


def _fits_bundle(bundle: Bundle, engine_file: EngineFile, again: str) -> Fit | None:
    if engine_file.component not in bundle.manifest.components:
        return Fit(False, f"this bundle has no {engine_file.component}", "accel inspect says what it has")
    now = sources(bundle, bundle.component(engine_file.component))
    words = {"graph_sha256": "another ONNX graph", "weights_sha256": "other weights"}
    for name, value in now.items():
        if engine_file.identity.get(name) != value:
            what = words.get(name, f"another {name}")
            return Fit(False, f"it was built from {what} than the bundle has now", again)
    return None


def _fits_here(engine_file: EngineFile, here: Here, again: str) -> Fit | None:
    built, options = engine_file.identity, engine_file.identity["options"]
    if built["platform"] != here.platform:
        return Fit(False, f"it was built on {built['platform']}, this is {here.platform}", again)
    ours, theirs = numbers(here.tensorrt), numbers(built["tensorrt"])
    if ours != theirs:
        forward = options.get("version_compatible") and ours > theirs and ours[0] - theirs[0] <= 1
        if not forward:
            return Fit(False, f"it was built with TensorRT {built['tensorrt']}, here is {here.tensorrt}", again)
    if (built["gpu"], built["compute_capability"]) != (here.gpu, here.compute_capability):
        level, capability = options.get("hardware_compatible"), tuple(map(int, here.compute_capability.split(".")))
        ampere = level == "ampere_plus" and capability >= (8, 0)
        same = level == "same_compute_capability" and built["compute_capability"] == here.compute_capability
        if not ampere and not same:
            return Fit(
                False,
                f"it was built for {built['gpu']} ({built['compute_capability']}), here is {here.gpu} "
                f"({here.compute_capability})",
                again,
            )
    return None


def choose(
    bundle: Bundle,
    component: str,
    here: Here | None,
    key: str | None = None,
    refuse: Callable[[EngineFile], Fit | None] = lambda engine_file: None,
) -> tuple[EngineFile, bytes]:
    """The newest engine file of a component that passes the pre-flight, and its bytes: the very ones that were checked.

    Args:
        here: None leaves out what depends on the machine.
        key: only this plan.
        refuse: what else is wrong with an engine file that would fit.

    Raises:
        NoPlan: when there is none, with the reason of the newest and its fix.
    """
    problems: list[tuple[str, Fit]] = []
    for engine_file in find(bundle, component):
        if isinstance(engine_file, UserError):
            problems.append(("", Fit(False, engine_file.message, engine_file.fix)))
        elif key in (None, engine_file.key):
            verdict = fits(bundle, engine_file, here)
            verdict = (verdict.ok and refuse(engine_file)) or verdict
            if verdict.ok:
                try:
                    data = engine_file.path.read_bytes()
                    verdict = _contents(bundle, engine_file, here, changed(engine_file, data))
                except OSError as error:
                    verdict = Fit(False, f"it cannot be read ({error.strerror})", "check its permissions")
            if verdict.ok:
                return engine_file, data
            problems.append((engine_file.key, verdict))
    if not problems:
        which = f" with the key {key}" if key else ""
        again = rebuild(bundle, component, gpu=here.index if here else 0)
        raise NoEngineFile(f"{bundle.path} has no TensorRT engine file of {component}{which}", again)
    first_key, first = problems[0]
    more = f" (and {len(problems) - 1} more that do not fit)" if len(problems) > 1 else ""
    name = f" {first_key[:8]}" if first_key else ""
    raise NoEngineFile(f"the TensorRT engine file{name} of {component} cannot be used: {first.reason}{more}", first.fix)
