"""Compiled engine files beside a bundle: what identifies them, their records, and the command that builds one again.

    my-bundle/engines/<key>/unet.plan  unet.json  unet.sig

The key is the digest of everything that changes a plan. `unet.json` says what it was built from, for and with, and
`unet.sig` is this user's signature of that text. Whether an engine file may and can run here is for `preflight` to say.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import Bundle, Component
from ..errors import UserError
from ..files import digest_of, inside, write_bytes
from . import trust
from .cuda import Cuda

SCHEMA = 1
FOLDER = "engines"
# What every record has: those of engine files from elsewhere are read too, and shown before anybody trusts them.
_WANTED = {
    "schema": int,
    "component": str,
    "key": str,
    "plan": {"bytes": int, "sha256": str},
    "audit": dict,
    "built": str,
    "identity": {
        "tensorrt": str,
        "gpu": str,
        "compute_capability": str,
        "platform": str,
        "options": dict,
        "profiles": [{"name": str, "dims": dict, "shapes": dict}],
    },
}


@dataclass(frozen=True)
class Here:
    """What engine files run on: TensorRT's version, the GPU's name and compute capability, system and processor.

    `index` is which of this machine's GPUs that is, and no part of what an engine file is.
    """

    tensorrt: str
    gpu: str
    compute_capability: str
    platform: str = f"{platform.system()} {platform.machine()}"
    index: int = 0

    @classmethod
    def of(cls, tensorrt: str, cuda: Cuda) -> Here:
        return cls(tensorrt, cuda.gpu.name, cuda.gpu.compute_capability or "0.0", index=cuda.index)


@dataclass(frozen=True)
class EngineFile:
    """An engine file, its record, and the record's own text."""

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
    """The part of an engine file's identity that is the bundle's: what would make it another network."""
    manifest = bundle.manifest
    return {
        "component": component.name,
        "graph_sha256": manifest.files[component.graph]["sha256"],
        "weights_sha256": manifest.files[component.weights]["sha256"],
        "exporter": dict(manifest.exporter),
        "precision": manifest.precision,
        "dtype": component.dtype,
        "float32": list(component.float32),
        # `recipe` is the name that the config has had in every identity so far: another one would change the digest.
        "int8": {"recipe": component.int8.get("config"), "calibration": component.int8.get("calibration")}
        if component.int8
        else {},
    }


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


def save(bundle: Bundle, data: bytes, record: Mapping[str, Any]) -> EngineFile:
    """Write and sign an engine file; the record comes after it, so an engine file without one was never finished."""
    text = (json.dumps({"schema": SCHEMA, **record}, indent=2, allow_nan=False) + "\n").encode()
    folder = bundle.path / FOLDER / record["key"]
    path = folder / f"{record['component']}.plan"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # where new folders are open to the user's group, an engine file in one would be refused
        path.with_suffix(".json").unlink(missing_ok=True)
        write_bytes(path, data)
        write_bytes(path.with_suffix(".json"), text)
        sign(path, text)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror})", "check permissions and free space") from None
    return read(bundle, record["key"], record["component"])


def sign(path: Path, text: bytes) -> None:
    """Put this user's signature of a record beside an engine file: of this text, whatever its file may say by now."""
    write_bytes(path.with_suffix(".sig"), trust.sign(text).encode() + b"\n")


def read(bundle: Bundle, key: str, component: str) -> EngineFile:
    """The engine file of a key.

    Raises:
        UserError: when its record is missing, damaged, or leaves the bundle.
    """
    path = inside(bundle.path, f"{FOLDER}/{key}/{component}.plan", "the engine file")
    described = inside(bundle.path, f"{FOLDER}/{key}/{component}.json", "the engine file's record")
    if not described.is_file():
        raise UserError(f"{path} has no {described.name}: accel did not build it", rebuild(bundle, component))
    try:
        text = described.read_bytes()
        record = json.loads(text)
    except (OSError, ValueError, RecursionError):
        record = None
    if isinstance(record, dict) and isinstance(record.get("schema"), int) and record["schema"] > SCHEMA:
        raise UserError(f"{described} was written by a newer accel", "pip install --upgrade accel-diffusion")
    if wrong := _lacks(record, _WANTED):
        raise UserError(f"{described} is damaged: it lacks {wrong}", rebuild(bundle, component))
    if record["component"] != component:
        raise UserError(f"{described} is damaged: it is of another component", rebuild(bundle, component))
    return EngineFile(path, record, text)


def _lacks(found: Any, wanted: Any, name: str = "a record") -> str:
    """The name of the first thing that is missing or of another kind; empty where there is none."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        parts = [(found.get(key), kind, key) for key, kind in wanted.items()]
    elif isinstance(wanted, list) and isinstance(found, list):
        parts = [(part, wanted[0], name) for part in found]
    else:
        return "" if isinstance(wanted, type) and isinstance(found, wanted) else name
    return next((wrong for part in parts if (wrong := _lacks(*part))), "")


def find(bundle: Bundle, component: str | None = None) -> list[EngineFile | UserError]:
    """The engine files beside a bundle, newest first; what cannot be understood comes as the error that says so."""
    found: list[EngineFile | UserError] = []
    for path in sorted((bundle.path / FOLDER).glob(f"*/{component or '*'}.plan")):
        try:
            found.append(read(bundle, path.parent.name, path.stem))
        except UserError as error:
            found.append(error)
    return sorted(found, key=lambda p: p.record["built"] if isinstance(p, EngineFile) else "", reverse=True)


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def rebuild(bundle: Bundle, component: str, engine_file: EngineFile | None = None, gpu: int = 0) -> str:
    """What to type for an engine file of this component, on one of this machine's GPUs.

    Args:
        engine file: one whose options and, if they fit, profiles it is to have. Only a signed engine file: what a
            stranger's record says is not to be copied into a shell.
    """
    words = ["accel", "build", str(bundle.path), "--components", component, *(["--gpu", str(gpu)] if gpu else [])]
    if engine_file is None or component not in bundle.manifest.components:
        return shlex.join(words)
    now, profiles = bundle.component(component).dims, engine_file.identity["profiles"]
    fits = all(
        name in now and now[name].min <= low and high <= now[name].max
        for profile in profiles
        for name, (low, _, high) in profile["dims"].items()
    )
    if fits and [profile["name"] for profile in profiles] != [bundle.manifest.profile.name]:
        words += [word for profile in profiles for word in ("--profile", profile["name"])]
    usual = {"optimization_level": 3, "hardware_compatible": "none"}
    for name, value in engine_file.identity["options"].items():
        if value is not None and value is not False and value != usual.get(name):
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)
