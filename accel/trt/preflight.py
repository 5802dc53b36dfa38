"""Whether a compiled plan may and can run here, with the reason and what to type.

TensorRT has no call that tells it in advance, and a plan is executable code: all of this comes before any byte of it is
deserialised. The contents come last: they have gigabytes, and most reasons are in the record.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass

from ..bundle import Bundle
from ..errors import UserError
from ..files import sha256
from . import trust
from .engine_files import Here, Plan, digest_bytes, find, key_of, rebuild, sources
from .library import numbers


@dataclass(frozen=True)
class Verdict:
    """Whether a plan can run here; if not, why and what to do."""

    ok: bool
    reason: str
    fix: str = ""


class NoPlan(UserError):
    """There is no plan that can be used."""


def check(bundle: Bundle, plan: Plan, here: Here | None) -> Verdict:
    """Whether a plan may be loaded here; reads all of it.

    Args:
        here: None leaves out what depends on the machine.
    """
    found = fits(bundle, plan, here)
    return _contents(bundle, plan, here, changed(plan)) if found.ok else found


def fits(bundle: Bundle, plan: Plan, here: Here | None) -> Verdict:
    """`check` without the plan's contents: takes no time, and whoever loads them has to compare them."""
    signed = trusted(plan)
    again = _again(bundle, plan, here, signed)
    if reason := damaged(plan):
        return Verdict(False, reason, again)
    if not trust.owned(plan.path):
        copied = f"cp -r {shlex.quote(str(bundle.path))} my-copy && accel build my-copy"
        return Verdict(False, "it or its folder belongs to another user, who can exchange it", copied)
    if not trust.private(plan.path):
        reason = "others can write it or its folder, so it may be anybody's code"
        return Verdict(False, reason, f"chmod -R go-w {shlex.quote(str(plan.path.parent))}")
    if not signed:
        return Verdict(
            False,
            "it does not carry your signature: a plan is executable code, and this one was not built by you",
            f"{again}   (or, if you know where it comes from: accel trust {bundle.path})",
        )
    return _fits_bundle(bundle, plan, again) or (here and _fits_here(plan, here, again)) or Verdict(True, "fits")


def damaged(plan: Plan) -> str:
    """What is wrong with a plan or its record at first sight; empty where nothing is."""
    if not plan.path.is_file():
        return f"{plan.path.name} is missing"
    size, built = plan.path.stat().st_size, plan.record["plan"]["bytes"]
    if size != built:
        return f"it has {size:,} bytes where {built:,} were built"
    if plan.key != key_of(plan.identity) or plan.path.parent.name != plan.key:
        return "its record was changed after it was built"
    return ""


def changed(plan: Plan, data: bytes | None = None) -> str:
    """What is wrong with a plan's contents; empty where they are what was built.

    Args:
        data: the contents, where they are in memory already.
    """
    digest = sha256(plan.path) if data is None else digest_bytes(data)
    same = digest == plan.record["plan"]["sha256"]
    return "" if same else "the file was changed after it was built (its sha256 differs)"


def trusted(plan: Plan) -> bool:
    """Whether it carries this user's signature."""
    try:
        return trust.signed(plan.text, plan.path.with_suffix(".sig").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return False


def _again(bundle: Bundle, plan: Plan, here: Here | None, signed: bool) -> str:
    return rebuild(bundle, plan.component, plan if signed else None, here.index if here else 0)


def _contents(bundle: Bundle, plan: Plan, here: Here | None, problem: str) -> Verdict:
    return Verdict(False, problem, _again(bundle, plan, here, True)) if problem else Verdict(True, "fits")


def _fits_bundle(bundle: Bundle, plan: Plan, again: str) -> Verdict | None:
    if plan.component not in bundle.manifest.components:
        return Verdict(False, f"this bundle has no {plan.component}", "accel inspect says what it has")
    now = sources(bundle, bundle.component(plan.component))
    words = {"graph_sha256": "another ONNX graph", "weights_sha256": "other weights"}
    for name, value in now.items():
        if plan.identity.get(name) != value:
            what = words.get(name, f"another {name}")
            return Verdict(False, f"it was built from {what} than the bundle has now", again)
    return None


def _fits_here(plan: Plan, here: Here, again: str) -> Verdict | None:
    built, options = plan.identity, plan.identity["options"]
    if built["platform"] != here.platform:
        return Verdict(False, f"it was built on {built['platform']}, this is {here.platform}", again)
    ours, theirs = numbers(here.tensorrt), numbers(built["tensorrt"])
    if ours != theirs:
        forward = options.get("version_compatible") and ours > theirs and ours[0] - theirs[0] <= 1
        if not forward:
            return Verdict(False, f"it was built with TensorRT {built['tensorrt']}, here is {here.tensorrt}", again)
    if (built["gpu"], built["compute_capability"]) != (here.gpu, here.compute_capability):
        level, capability = options.get("hardware_compatible"), tuple(map(int, here.compute_capability.split(".")))
        ampere = level == "ampere_plus" and capability >= (8, 0)
        same = level == "same_compute_capability" and built["compute_capability"] == here.compute_capability
        if not ampere and not same:
            return Verdict(
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
    refuse: Callable[[Plan], Verdict | None] = lambda plan: None,
) -> tuple[Plan, bytes]:
    """The newest plan of a component that passes the pre-flight, and its bytes: the very ones that were checked.

    Args:
        here: None leaves out what depends on the machine.
        key: only this plan.
        refuse: what else is wrong with a plan that would fit.

    Raises:
        NoPlan: when there is none, with the reason of the newest and its fix.
    """
    problems: list[tuple[str, Verdict]] = []
    for plan in find(bundle, component):
        if isinstance(plan, UserError):
            problems.append(("", Verdict(False, plan.message, plan.fix)))
        elif key in (None, plan.key):
            verdict = fits(bundle, plan, here)
            verdict = (verdict.ok and refuse(plan)) or verdict
            if verdict.ok:
                try:
                    data = plan.path.read_bytes()
                    verdict = _contents(bundle, plan, here, changed(plan, data))
                except OSError as error:
                    verdict = Verdict(False, f"it cannot be read ({error.strerror})", "check its permissions")
            if verdict.ok:
                return plan, data
            problems.append((plan.key, verdict))
    if not problems:
        which = f" with the key {key}" if key else ""
        again = rebuild(bundle, component, gpu=here.index if here else 0)
        raise NoPlan(f"{bundle.path} has no TensorRT plan of {component}{which}", again)
    first_key, first = problems[0]
    more = f" (and {len(problems) - 1} more that do not fit)" if len(problems) > 1 else ""
    name = f" {first_key[:8]}" if first_key else ""
    raise NoPlan(f"the TensorRT plan{name} of {component} cannot be used: {first.reason}{more}", first.fix)
