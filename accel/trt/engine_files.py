"""TensorRT engine files beside a bundle: their identity, their records, and the command that rebuilds one.

    my-bundle/engines/<key>/unet.plan  unet.json  unet.sig

An engine file is a serialized TensorRT engine. NVIDIA also calls it a plan, hence the extension `.plan` and the key
"plan" of a record: both stay as they are, because records written by earlier versions have to load.

The key is the digest of everything that changes an engine. `unet.json` records what it was built from, for and with;
`unet.sig` is this user's signature of that text. `preflight` decides whether an engine file may and can run here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import records
from ..bundle import Bundle, Component, limits
from ..errors import UserError
from ..files import digest_of, inside, parse_json, read_bytes, write_bytes
from . import trust
from .cuda import Cuda
from .library import Library

SCHEMA = 1
FOLDER = "engines"


_PROFILE = {"name": str, "dims": dict, "shapes": dict}
# What every record has: those of engine files from elsewhere are read too, and shown before anybody trusts them.
_REQUIRED = {
    "schema": int,
    "component": str,
    "key": str,
    "plan": {"bytes": int, "sha256": str},
    "audit": dict,
    "built": str,
    "identity": dict.fromkeys(("tensorrt", "gpu", "compute_capability", "platform"), str)
    | {"options": dict, "profiles": list[_PROFILE]},
}


@dataclass(frozen=True)
class Here:
    """What an engine is built for and runs on: TensorRT's version, the GPU, operating system and processor.

    Attributes:
        gpu: the GPU's name; "" where it does not matter.
        index: which of this machine's GPUs it is; not part of an engine's identity.
        engine: the engine that runs it, which is the flavour of TensorRT: "tensorrt" or "tensorrt-rtx".
        targets: compute capabilities that a build of TensorRT-RTX names; () for its default.
    """

    tensorrt: str
    gpu: str
    compute_capability: str
    platform: str = f"{platform.system()} {platform.machine()}"
    index: int = 0
    engine: str = "tensorrt"
    targets: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: Library, cuda: Cuda) -> Here:
        """The GPU of this machine, to run on or, with TensorRT 10 and 11, to build for."""
        capability = cuda.gpu.compute_capability or "0.0"
        return cls(found.version, cuda.gpu.name, capability, index=cuda.index, engine=found.flavour.engine)

    @classmethod
    def anywhere(cls, found: Library, targets: Sequence[str] = ()) -> Here:
        """What TensorRT-RTX builds for: cards of its targets, on any operating system."""
        return cls(found.version, "", "", "", engine=found.flavour.engine, targets=tuple(targets))


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

    @property
    def engine(self) -> str:
        """The engine that runs it: "tensorrt" or "tensorrt-rtx"."""
        return str(self.identity.get("engine", "tensorrt"))

    @property
    def targets(self) -> tuple[str, ...]:
        """The compute capabilities that a build of TensorRT-RTX named."""
        return tuple(map(str, self.identity.get("targets") or ()))

    @property
    def built_for(self) -> str:
        """What it was built with and for, in words: "TensorRT 11.4.0.106, NVIDIA L4"."""
        if self.engine == "tensorrt":
            return f"TensorRT {self.identity['tensorrt']}, {self.identity['gpu']}"
        return f"TensorRT-RTX {self.identity['tensorrt']}, {', '.join(self.targets) or 'Ampere and newer'}"


def sources(bundle: Bundle, component: Component) -> dict[str, Any]:
    """The part of an engine's identity that comes from the bundle: with any other value it is another network."""
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
    """Everything that changes an engine.

    Args:
        profiles: optimization profiles as `export.tensorrt.shapes.described` gives them.
        options: `export.tensorrt.build.BuildOptions.identity`.
    """
    return sources(bundle, component) | {
        "tensorrt": here.tensorrt,
        "gpu": here.gpu,
        "compute_capability": here.compute_capability,
        "platform": here.platform,
        # Only where it is not TensorRT's own, so that the digests of engine files built so far stay what they are.
        **({"engine": here.engine, "targets": list(here.targets)} if here.engine != "tensorrt" else {}),
        "profiles": [dict(profile) for profile in profiles],
        "options": dict(options),
    }


def key_of(identity: Mapping[str, Any]) -> str:
    return digest_of(identity)[:32]


def save(bundle: Bundle, data: bytes, record: Mapping[str, Any]) -> EngineFile:
    """Write an engine file, then its record, then the signature: without a record, it was never finished."""
    text = (json.dumps({"schema": SCHEMA, **record}, indent=2, allow_nan=False) + "\n").encode()
    path = inside(bundle.path, f"{FOLDER}/{record['key']}/{record['component']}.plan", "the engine file")
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # a umask may leave new folders writable for the group, and preflight refuses those
        path.with_suffix(".json").unlink(missing_ok=True)
        write_bytes(path, data)
        write_bytes(path.with_suffix(".json"), text)
        sign(path, text)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror})", "check permissions and free space") from None
    return read(bundle, record["key"], record["component"])


def sign(path: Path, text: bytes) -> None:
    """Write this user's signature of a record beside its engine file.

    Args:
        text: the record as it was read, whatever its file may say by now.
    """
    write_bytes(path.with_suffix(".sig"), trust.sign(text).encode() + b"\n")


def read(bundle: Bundle, key: str, component: str) -> EngineFile:
    """The engine file of a key.

    Raises:
        UserError: when its record is missing, damaged, of a newer schema, or outside the bundle.
    """
    path = inside(bundle.path, f"{FOLDER}/{key}/{component}.plan", "the engine file")
    described = inside(bundle.path, f"{FOLDER}/{key}/{component}.json", "the engine file's record")
    if not described.is_file():
        raise UserError(f"{path} has no {described.name}: accel did not build it", rebuild(bundle, component))
    text, record = b"", None
    with contextlib.suppress(UserError, ValueError):
        text = read_bytes(described, "the engine file's record", 1 << 20)
        record = parse_json(text)
    if isinstance(record, dict) and isinstance(record.get("schema"), int) and record["schema"] > SCHEMA:
        raise UserError(f"{described} was written by a newer accel", "pip install --upgrade accel-diffusion")
    try:
        records.read(_REQUIRED, record, "record")
        if odd := next((text for text in limits.texts(record) if not text.isprintable()), None):
            raise ValueError(f"{odd!r:.80} is not a line of text")
    except ValueError as error:
        raise UserError(f"{described} is damaged ({error})", rebuild(bundle, component)) from None
    if record["component"] != component:
        raise UserError(f"{described} is damaged: it is of another component", rebuild(bundle, component))
    return EngineFile(path, record, text)


def find(bundle: Bundle, component: str | None = None, engine: str | None = None) -> list[EngineFile | UserError]:
    """The engine files beside a bundle, newest first; in place of one that cannot be read comes the error.

    Args:
        engine: only those that this engine runs.
    """
    found: list[EngineFile | UserError] = []
    for path in sorted((bundle.path / FOLDER).glob(f"*/{component or '*'}.plan")):
        try:
            found.append(read(bundle, path.parent.name, path.stem))
        except UserError as error:
            found.append(error)
    if engine is not None:
        found = [file for file in found if isinstance(file, UserError) or file.engine == engine]
    return sorted(found, key=lambda file: file.record["built"] if isinstance(file, EngineFile) else "", reverse=True)


def digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def rebuild(
    bundle: Bundle, component: str, like: EngineFile | None = None, gpu: int = 0, engine: str = "tensorrt"
) -> str:
    """The command that builds an engine file of this component, on one of this machine's GPUs.

    Args:
        engine: the one that is to run it.
        like: repeat its build options and, where the bundle still takes them, its profiles. Only a signed engine file:
            what a stranger's record says must not be copied into a shell.
    """
    words = [
        "accel",
        "build",
        str(bundle.path),
        "--components",
        component,
        *(["--engine", engine] if engine != "tensorrt" else ["--device", f"cuda:{gpu}"] if gpu else []),
    ]
    if like is None or component not in bundle.manifest.components:
        return shlex.join(words)
    dims, profiles = bundle.component(component).dims, like.identity["profiles"]
    fits = all(
        name in dims and dims[name].min <= low and high <= dims[name].max
        for profile in profiles
        for name, (low, _, high) in profile["dims"].items()
    )
    if fits and [profile["name"] for profile in profiles] != [bundle.manifest.profile.name]:
        words += [word for profile in profiles for word in ("--profile", profile["name"])]
    if like.targets:
        words += ["--targets", ",".join(like.targets)]
    usual = {"optimization_level": 3, "hardware_compatible": "none"}
    for name, value in like.identity["options"].items():
        if value is not None and value is not False and value != usual.get(name):
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)
