"""Compiled plans beside a bundle: their identity, and whether they may and can run here.

    my-bundle/engines/<key>/unet.plan  unet.json  unet.sig

The key is the digest of everything that changes a plan. `unet.json` says what it was built from, for and with, and
`unet.sig` is this user's signature of that text. TensorRT has no call that tells in advance whether a plan fits, so
`preflight` does, before any byte is deserialised, with the reason and what to type.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import trust
from .bundle import Bundle, Component
from .errors import UserError
from .files import digest_of, inside, sha256, write_bytes, write_json
from .machine import Gpu
from .trt import numbers

SCHEMA = 1
FOLDER = "engines"
_WANTED = {"schema": int, "component": str, "key": str, "identity": dict, "plan": dict, "audit": dict, "built": str}


@dataclass(frozen=True)
class Here:
    """What plans run on: TensorRT's version, the GPU's name and compute capability, system and processor."""

    tensorrt: str
    gpu: str
    compute_capability: str
    platform: str = f"{platform.system()} {platform.machine()}"

    @classmethod
    def of(cls, tensorrt: str, gpu: Gpu) -> Here:
        return cls(tensorrt, gpu.name, gpu.compute_capability or "0.0")


@dataclass(frozen=True)
class Verdict:
    """Whether a plan can run here; if not, why and what to do."""

    ok: bool
    reason: str
    fix: str = ""


@dataclass(frozen=True)
class Plan:
    """A plan, its record, and the record's own text."""

    path: Path
    record: Mapping[str, Any]
    text: bytes

    @property
    def key(self) -> str:
        return self.record["key"]

    @property
    def component(self) -> str:
        return self.record["component"]

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.record["identity"]


def sources(bundle: Bundle, component: Component) -> dict[str, Any]:
    """The part of a plan's identity that is the bundle's: what would make it another network."""
    manifest = bundle.manifest
    return {
        "component": component.name,
        "graph_sha256": manifest.files[component.graph]["sha256"],
        "weights_sha256": manifest.files[component.weights]["sha256"],
        "exporter": dict(manifest.exporter),
        "precision": manifest.precision,
        "dtype": component.dtype,
        "float32": list(component.float32),
    } | ({"calibration": component.int8["calibration"]["digest"]} if component.int8 else {})


def identity(
    bundle: Bundle, component: Component, here: Here, profiles: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that changes a plan."""
    return sources(bundle, component) | {
        "tensorrt": here.tensorrt,
        "gpu": here.gpu,
        "compute_capability": here.compute_capability,
        "platform": here.platform,
        "profiles": [dict(profile) for profile in profiles],
        "options": dict(options),
    }


def key_of(identity: Mapping[str, Any]) -> str:
    return digest_of(identity)[:32]


def save(bundle: Bundle, data: bytes, record: Mapping[str, Any]) -> Plan:
    """Write and sign a plan; the record comes last, so a plan without one was never finished."""
    folder = bundle.path / FOLDER / record["key"]
    path = folder / f"{record['component']}.plan"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
        write_bytes(path, data)
        write_json(path.with_suffix(".json"), {"schema": SCHEMA, **record})
        sign(path)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror})", "check permissions and free space") from None
    return read(bundle, record["key"], record["component"])


def sign(path: Path) -> None:
    """Put this user's signature beside a plan and its record."""
    write_bytes(path.with_suffix(".sig"), trust.sign(path.with_suffix(".json").read_bytes()).encode() + b"\n")


def read(bundle: Bundle, key: str, component: str) -> Plan:
    """The plan of a key.

    Raises:
        UserError: when its record is missing, damaged, or leaves the bundle.
    """
    path = inside(bundle.path, f"{FOLDER}/{key}/{component}.plan", "the plan")
    described = inside(bundle.path, f"{FOLDER}/{key}/{component}.json", "the plan's record")
    if not described.is_file():
        raise UserError(f"{path} has no {described.name}: accel did not build it", _rebuild(bundle, component))
    try:
        text = described.read_bytes()
        record = json.loads(text)
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or any(not isinstance(record.get(k), kind) for k, kind in _WANTED.items()):
        raise UserError(f"{described} is damaged", _rebuild(bundle, component))
    if not isinstance(record["plan"].get("bytes"), int) or record["component"] != component:
        raise UserError(f"{described} is damaged", _rebuild(bundle, component))
    if record["schema"] > SCHEMA:
        raise UserError(f"{described} was written by a newer accel", "pip install --upgrade accel-diffusion")
    return Plan(path, record, text)


def find(bundle: Bundle, component: str | None = None) -> list[Plan | UserError]:
    """The plans beside a bundle, newest first; what cannot be understood comes as the error that says so."""
    found: list[Plan | UserError] = []
    for path in sorted((bundle.path / FOLDER).glob(f"*/{component or '*'}.plan")):
        try:
            found.append(read(bundle, path.parent.name, path.stem))
        except UserError as error:
            found.append(error)
    return sorted(found, key=lambda p: p.record["built"] if isinstance(p, Plan) else "", reverse=True)


def preflight(bundle: Bundle, plan: Plan, here: Here | None, data: bytes | None = None) -> Verdict:
    """Whether a plan may be loaded here, without giving TensorRT a single byte of it.

    Args:
        here: None leaves out what depends on the machine.
        data: the plan's bytes, where they are in memory already.
    """
    rebuild = _rebuild(bundle, plan.component)
    if broken := damage(plan, data):
        return Verdict(False, broken.reason, rebuild)
    if not trust.private(plan.path):
        reason = "others can write it or its folder, so it may be anybody's code"
        return Verdict(False, reason, f"chmod -R go-w {plan.path.parent}")
    if not trusted(plan):
        return Verdict(
            False, "it does not carry your signature: a plan is executable code, and this one was not built by you",
            f"{rebuild}   (or, if you know where it comes from: accel trust {bundle.path})",
        )  # fmt: skip
    return _fits_bundle(bundle, plan, rebuild) or (here and _fits_here(plan, here, rebuild)) or Verdict(True, "fits")


def damage(plan: Plan, data: bytes | None = None) -> Verdict | None:
    """What is wrong with the plan's bytes or its record, if anything is."""
    if data is None and not plan.path.is_file():
        return Verdict(False, f"{plan.path.name} is missing")
    size = plan.path.stat().st_size if data is None else len(data)
    expected = plan.record["plan"]
    if size != expected.get("bytes"):
        return Verdict(False, f"it has {size:,} bytes where {expected.get('bytes'):,} were built")
    digest = sha256(plan.path) if data is None else digest_bytes(data)
    if digest != expected.get("sha256"):
        return Verdict(False, "the file was changed after it was built (its sha256 differs)")
    if plan.key != key_of(plan.identity) or plan.path.parent.name != plan.key:
        return Verdict(False, "its record was changed after it was built")
    return None


def trusted(plan: Plan) -> bool:
    """Whether it carries this user's signature."""
    try:
        return trust.signed(plan.text, plan.path.with_suffix(".sig").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return False


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _fits_bundle(bundle: Bundle, plan: Plan, rebuild: str) -> Verdict | None:
    if plan.component not in bundle.manifest.components:
        return Verdict(False, f"this bundle has no {plan.component}", "accel inspect says what it has")
    now = sources(bundle, bundle.component(plan.component))
    words = {"graph_sha256": "another ONNX graph", "weights_sha256": "other weights"}
    for name, value in now.items():
        if plan.identity.get(name) != value:
            what = words.get(name, f"another {name}")
            return Verdict(False, f"it was built from {what} than the bundle has now", rebuild)
    return None


def _fits_here(plan: Plan, here: Here, rebuild: str) -> Verdict | None:
    built, options = plan.identity, plan.identity["options"]
    if built["platform"] != here.platform:
        return Verdict(False, f"it was built on {built['platform']}, this is {here.platform}", rebuild)
    ours, theirs = numbers(here.tensorrt), numbers(built["tensorrt"])
    if ours != theirs:
        forward = options.get("version_compatible") and ours > theirs and ours[0] - theirs[0] <= 1
        if not forward:
            return Verdict(False, f"it was built with TensorRT {built['tensorrt']}, here is {here.tensorrt}", rebuild)
    if (built["gpu"], built["compute_capability"]) != (here.gpu, here.compute_capability):
        level, capability = options.get("hardware_compatible"), tuple(map(int, here.compute_capability.split(".")))
        ampere = level == "ampere_plus" and capability >= (8, 0)
        same = level == "same_compute_capability" and built["compute_capability"] == here.compute_capability
        if not ampere and not same:
            return Verdict(
                False,
                f"it was built for {built['gpu']} ({built['compute_capability']}), here is {here.gpu} "
                f"({here.compute_capability})",
                rebuild,
            )
    return None


def choose(bundle: Bundle, component: str, here: Here, key: str | None = None) -> tuple[Plan, bytes]:
    """The newest plan of a component that passes the pre-flight, and its bytes: the very ones that were checked.

    Args:
        key: only this plan.

    Raises:
        UserError: when there is none, with the reason of the newest and its fix.
    """
    problems: list[tuple[str, Verdict]] = []
    for plan in find(bundle, component):
        if isinstance(plan, UserError):
            problems.append(("", Verdict(False, plan.message, plan.fix)))
            continue
        if key is not None and plan.key != key:
            continue
        try:
            data = plan.path.read_bytes()
        except OSError as error:
            verdict = Verdict(False, f"it cannot be read ({error.strerror})", "check its permissions")
            problems.append((plan.key, verdict))
            continue
        verdict = preflight(bundle, plan, here, data)
        if verdict.ok:
            return plan, data
        problems.append((plan.key, verdict))
    if not problems:
        which = f" with the key {key}" if key else ""
        raise UserError(f"{bundle.path} has no TensorRT plan of {component}{which}", _rebuild(bundle, component))
    first_key, first = problems[0]
    more = f" (and {len(problems) - 1} more that do not fit)" if len(problems) > 1 else ""
    name = f" {first_key[:8]}" if first_key else ""
    raise UserError(f"the TensorRT plan{name} of {component} cannot be used: {first.reason}{more}", first.fix)


def _rebuild(bundle: Bundle, component: str) -> str:
    return f"accel build {bundle.path} --components {component}"
