"""Engine files beside a bundle: their identity, their records, and the command that rebuilds one.

    my-bundle/engines/<key>/unet.plan (or unet.pt2)  unet.json  unet.sig

An engine file is a serialized TensorRT engine, or a package of AOTInductor. NVIDIA also calls it a plan, hence the
extension `.plan` and the key "plan" of every record: both stay as they are, because records written by earlier versions
have to load.

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
from types import MappingProxyType
from typing import Any, Protocol

from .. import records
from ..bundle import Bundle, Component, limits
from ..bundle.shape_profiles import Range
from ..errors import UserError
from ..files import digest_of, inside, parse_json, read_bytes, write_bytes
from . import trust
from .cuda import Cuda
from .flavours import BY_ENGINE, RTX, runs_on, target_of
from .library import Library, numbers

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
    "identity": {"platform": str, "options": dict, "profiles": list[_PROFILE]},
}


@dataclass(frozen=True)
class Kind:
    """What an engine's engine files are.

    Attributes:
        title: what makes them, in messages.
        suffix: of their names.
        identity: what their identity holds beside what every one does.
    """

    title: str
    suffix: str
    identity: Mapping[str, Any]


_TENSORRT = dict.fromkeys(("tensorrt", "gpu", "compute_capability"), str)
KINDS: Mapping[str, Kind] = MappingProxyType(
    {engine: Kind(flavours[0].title, ".plan", _TENSORRT) for engine, flavours in BY_ENGINE.items()}
    | {"aoti": Kind("AOTInductor", ".pt2", {"torch": str, "device": str, "gpu": str, "isa": list[str]})}
)


class Place(Protocol):
    """Where engine files of an engine are built and run.

    Attributes:
        engine: the engine that runs them.
        index: which of this machine's GPUs it is; None for the CPU.
    """

    @property
    def engine(self) -> str: ...
    @property
    def index(self) -> int | None: ...

    def identity(self) -> dict[str, Any]:
        """The part of an engine's identity that comes from the place."""

    def refuses(self, file: EngineFile) -> str:
        """Why an engine file of its engine does not run here; empty where it does."""


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

    def identity(self) -> dict[str, Any]:
        """The part of an engine's identity that comes from the place."""
        return {
            "tensorrt": self.tensorrt,
            "gpu": self.gpu,
            "compute_capability": self.compute_capability,
            "platform": self.platform,
            # Only where it is not TensorRT's own, so that the digests of engine files built so far stay what they are.
            **({"engine": self.engine, "targets": list(self.targets)} if self.engine != "tensorrt" else {}),
        }

    def refuses(self, file: EngineFile) -> str:
        """Why an engine does not run on this platform, TensorRT or GPU; empty where it does."""
        built, options = file.identity, file.identity["options"]
        if file.engine == RTX.engine:
            return self._refuses_rtx(file)
        if built["platform"] != self.platform:
            return f"it was built on {built['platform']}, this is {self.platform}"
        ours, theirs = numbers(self.tensorrt), numbers(built["tensorrt"])
        later = ours > theirs and ours[0] - theirs[0] <= 1
        if ours != theirs and not (options.get("version_compatible") and later):
            return f"it was built with TensorRT {built['tensorrt']}, here is {self.tensorrt}"
        if (built["gpu"], built["compute_capability"]) == (self.gpu, self.compute_capability):
            return ""
        level, capability = options.get("hardware_compatible"), tuple(map(int, self.compute_capability.split(".")))
        ampere = level == "ampere_plus" and capability >= (8, 0)
        same = level == "same_compute_capability" and built["compute_capability"] == self.compute_capability
        if ampere or same:
            return ""
        return (
            f"it was built for {built['gpu']} ({built['compute_capability']}), here is {self.gpu} "
            f"({self.compute_capability})"
        )

    def _refuses_rtx(self, file: EngineFile) -> str:
        """Engine files of TensorRT-RTX are bound to one version, and to no system."""
        if file.identity["tensorrt"] != self.tensorrt:
            return f"it was built with TensorRT-RTX {file.identity['tensorrt']}, here is {self.tensorrt}"
        if not self.gpu:  # a place to build, not to run
            return "" if file.targets == self.targets else "it was built for other targets"
        if not runs_on(file.targets, self.compute_capability):
            held = ", ".join(file.targets) or f"{RTX.default_targets[0]} and newer"
            return f"it was built for {held}, here is {self.gpu} ({target_of(self.compute_capability)})"
        return ""


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
        """The engine that runs it: "tensorrt", "tensorrt-rtx" or "aoti"."""
        return str(self.identity.get("engine", "tensorrt"))

    @property
    def targets(self) -> tuple[str, ...]:
        """The compute capabilities that a build of TensorRT-RTX named."""
        return tuple(map(str, self.identity.get("targets") or ()))

    @property
    def dtype(self) -> str:
        """What a file of aoti computes in instead of the bundle's own dtype: "bf16"; "" for that."""
        return str(self.identity.get("options", {}).get("dtype", ""))

    @property
    def built_for(self) -> str:
        """What it was built with and for, in words: "TensorRT 11.4.0.106, NVIDIA L4"."""
        if self.engine == "tensorrt":
            return f"TensorRT {self.identity['tensorrt']}, {self.identity['gpu']}"
        if self.engine == "aoti":
            place = self.identity["gpu"] or "CPU"
            return ", ".join(filter(None, (f"torch {self.identity['torch']}", place, self.dtype)))
        return f"TensorRT-RTX {self.identity['tensorrt']}, {', '.join(self.targets) or 'Ampere and newer'}"

    def ranges(self, component: Component) -> dict[str, Range]:
        """The dimensions that it takes: from the smallest to the largest of all its optimization profiles."""
        dims = {}
        for name, own in component.dims.items():
            low, best, high = zip(*(profile["dims"][name] for profile in self.identity["profiles"]), strict=True)
            dims[name] = Range(min(low), best[0], max(high), own.multiple)
        return dims


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
    bundle: Bundle, component: Component, here: Place, profiles: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that changes an engine.

    Args:
        profiles: optimization profiles as `export.tensorrt.shapes.described` gives them.
        options: those of the build that change the engine (`export.tensorrt.build.BuildOptions.identity`).
    """
    own = {"profiles": [dict(profile) for profile in profiles], "options": dict(options)}
    return sources(bundle, component) | here.identity() | own


def key_of(identity: Mapping[str, Any]) -> str:
    return digest_of(identity)[:32]


def save(bundle: Bundle, data: bytes, record: Mapping[str, Any]) -> EngineFile:
    """Write an engine file, then its record, then the signature: without a record, it was never finished."""
    text = (json.dumps({"schema": SCHEMA, **record}, indent=2, allow_nan=False) + "\n").encode()
    suffix = _kind(record).suffix
    path = inside(bundle.path, f"{FOLDER}/{record['key']}/{record['component']}{suffix}", "the engine file")
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
    described = inside(bundle.path, f"{FOLDER}/{key}/{component}.json", "the engine file's record")
    if not described.is_file():
        what = f"the engine file of {component} in {described.parent}"
        raise UserError(f"{what} has no {described.name}: accel did not build it", rebuild(bundle, component))
    text, record = b"", None
    with contextlib.suppress(UserError, ValueError):
        text = read_bytes(described, "the engine file's record", 1 << 20)
        record = parse_json(text)
    if isinstance(record, dict) and isinstance(record.get("schema"), int) and record["schema"] > SCHEMA:
        raise UserError(f"{described} was written by a newer accel", "pip install --upgrade accel-diffusion")
    try:
        records.read(_REQUIRED, record, "record")
        records.read(dict(_kind(record).identity), record["identity"], "record", "identity")
        if odd := next((text for text in limits.texts(record) if not text.isprintable()), None):
            raise ValueError(f"{odd!r:.80} is not a line of text")
    except ValueError as error:
        raise UserError(f"{described} is damaged ({error})", rebuild(bundle, component)) from None
    if record["component"] != component:
        raise UserError(f"{described} is damaged: it is of another component", rebuild(bundle, component))
    return EngineFile(described.with_suffix(_kind(record).suffix), record, text)


def _kind(record: Mapping[str, Any]) -> Kind:
    engine = str(record["identity"].get("engine", "tensorrt"))
    return KINDS.get(engine, KINDS["tensorrt"])


def find(bundle: Bundle, component: str | None = None, engine: str | None = None) -> list[EngineFile | UserError]:
    """The engine files beside a bundle, newest first; in place of one that cannot be read comes the error.

    Args:
        engine: only those that this engine runs.
    """
    found: list[EngineFile | UserError] = []
    suffixes = {kind.suffix for kind in KINDS.values()}
    paths = [path for suffix in suffixes for path in (bundle.path / FOLDER).glob(f"*/{component or '*'}{suffix}")]
    for path in sorted(paths):
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
    bundle: Bundle, component: str, like: EngineFile | None = None, gpu: int | None = 0, engine: str = "tensorrt"
) -> str:
    """The command that builds an engine file of this component, on one of this machine's GPUs or on its CPU.

    Args:
        gpu: index of the GPU; None for the CPU.
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
        *(["--engine", engine] if engine != "tensorrt" else []),
        *(["--device", "cpu"] if gpu is None else ["--device", f"cuda:{gpu}"] if gpu and engine != RTX.engine else []),
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
