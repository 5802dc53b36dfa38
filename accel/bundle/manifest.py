"""The bundle: one folder that holds everything a compiled pipeline needs, described by `accel.json`.

Training writes a diffusers pipeline; export turns it into a bundle; runtime, benchmark, report and other apps read
the bundle. Weights are stored once, in safetensors; the ONNX graphs refer to them as external data, so eager torch,
ONNX Runtime, OpenVINO and TensorRT all read the very same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import records
from .._version import __version__
from ..assets import is_hub_id, resolve
from ..errors import UserError
from ..files import digest_of, inside, read_json, settle, sha256, write_json
from ..sampling import Sampling
from . import foreign, hub, limits, verified
from .kinds import DENOISER, KINDS
from .shape_profiles import Profile, Range, native_sides
from .tensor_spec import TensorSpec

if TYPE_CHECKING:
    from ..sampling.noise_schedule import NoiseSchedule

# 1: images of a text. 2: of classes, which only a version that knows them can draw.
SCHEMA = 2
MANIFEST = "accel.json"


# What the objects of a manifest that are kept as they are must have.
_FILE = {"sha256": str, "bytes": int}
_REQUIRED: dict[str, Any] = {
    "pipeline": dict.fromkeys(("vae_scale", "latent_channels", "latent_multiple"), int)
    | {"native_size": int | list[int]}
    | {"scaling_factor": float | list[float], "shift_factor": float | list[float], "zero_empty_prompt": bool},
    "source": {"name": str},
    "exporter": {"opset": int, "torch": str},
    "components": Mapping[str, dict],
    "files": Mapping[str, _FILE],  # type: ignore[valid-type]
}
_INT8 = dict.fromkeys(("config", "layers", "graphs", "calibration"), dict)


def is_bundle(path: str | Path) -> bool:
    """Whether a folder, or a name that ships or is on the hub, is a bundle, or a folder that is read like one."""
    if (Path(resolve(path)) / MANIFEST).is_file() or foreign.kind_of(resolve(path)):
        return True
    try:
        return hub.find(path) is not None
    except UserError:  # whoever opens it is told
        return False


@dataclass(frozen=True)
class Component:
    """One network of a bundle.

    Attributes:
        name: folder name: text_encoder, unet, vae_decoder, vae_encoder, t2i_adapter, controlnet, ...
        kind: a key of `accel.bundle.kinds.KINDS`, which says how it is rebuilt in torch.
        graph: ONNX file, relative to the bundle.
        weights: safetensors file that the graph and the eager engine share, relative to the bundle.
        inputs, outputs: tensors in graph order.
        dims: range of each symbolic dimension.
        dtype: dtype of weights and of the floating-point inputs and outputs.
        float32: modules that compute in float32 although `dtype` is lower.
        fp32_output: those of them whose output stays float32 too, because it exceeds the range of `dtype`.
        parameters: number of parameters.
        parity: what the export measured against torch.
        int8: how it is quantized, empty where it is not: `config` (`accel.int8.config`); `layers` (name -> traits,
            `accel.int8.fake_quant.TRAITS`); `graphs` (engine -> its own file, for engines that need one);
            `calibration`; `audit`; `acceptance`.
    """

    name: str
    kind: str
    graph: str
    weights: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, Range]
    dtype: str = "float32"
    float32: tuple[str, ...] = ()
    fp32_output: tuple[str, ...] = ()
    parameters: int = 0
    parity: Mapping[str, Any] = field(default_factory=dict)
    int8: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: unknown kind {self.kind!r}")
        for spec in (*self.inputs, *self.outputs):
            for dim in spec.shape:
                if isinstance(dim, str) and dim not in self.dims:
                    raise ValueError(f"{self.name}: {spec.name} has an unknown dimension {dim!r}")

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        return {
            key: found[key] for key in found if key != "name" and (found[key] or key not in ("fp32_output", "int8"))
        }

    @property
    def folder(self) -> str:
        return self.graph.rpartition("/")[0]

    def graph_for(self, engine: str) -> str:
        """The ONNX file that an engine loads."""
        return self.int8.get("graphs", {}).get(engine, self.graph)

    def unread_by(self, engine: str) -> set[str]:
        """Those of its files that an engine leaves alone: graphs of other engines."""
        graphs = {self.graph, *self.int8.get("graphs", {}).values()}
        return graphs if engine in ("eager", "compile") else graphs - {self.graph_for(engine)}

    @property
    def format(self) -> str:
        """The number format of its quantized layers (`accel.int8.formats`); "" where it has none."""
        return self.int8.get("config", {}).get("format", "int8") if self.int8 else ""

    @property
    def precision(self) -> str:
        """What it computes in, for people: float32, int8 + float16, ..."""
        return f"{self.format} + {self.dtype}" if self.int8 else self.dtype


def _present(component: Any) -> dict[str, Any]:
    """A component of a manifest by its present keys; in 0.1 some had other names.

    The values stay as they are written: an engine file's identity is a digest of them (`accel.trt.engine_files`).
    """

    def renamed(values: Any, **names: str) -> Any:
        return {names.get(key, key): value for key, value in values.items()} if isinstance(values, dict) else values

    component = renamed(component, wide="fp32_output")
    if int8 := component.get("int8"):
        component["int8"] = int8 = renamed(int8, recipe="config", verdict="acceptance")
        if "acceptance" in int8:
            int8["acceptance"] = renamed(int8["acceptance"], offered="enabled_engines")
    return component


@dataclass(frozen=True)
class Manifest:
    """Everything `accel.json` says.

    Attributes:
        family: sd1, sd2 or sdxl; edm for images of classes.
        topology: name out of `accel.models.topology`, or "custom".
        pipeline: constants that an app needs: vae_scale (pixels per latent pixel), latent_channels, scaling_factor and
            shift_factor (x = (z - shift) * factor; one number, or one for each latent channel), latent_multiple (of a
            latent side), native_size (pixels; [height, width] of a model that is not square), zero_empty_prompt
            (whether no prompt means zeros), clip_skip, control_conditional_only (ControlNets for rows with a prompt),
            preview (linear map of latents to colours: `factors`, `bias`, `error`). Of images of classes: classes (how
            many; 0 for none), sigma_min, sigma_max, rho and sigma_data (`accel.sampling.edm.levels`).
        sampler: name, steps or timesteps, guidance: how this model is meant to be sampled (`accel.sampling.Sampling`).
        profile: accepted batches and sizes.
        precision: name of the recipe (fp32, fp16, int8, ...).
        source: name and weights digest of the pipeline it was made from.
        exporter: package versions, opset.
        components: the networks.
        files: sha256 and size of every other file, by path relative to the bundle.
    """

    family: str
    topology: str
    pipeline: Mapping[str, Any]
    sampler: Mapping[str, Any]
    profile: Profile
    precision: str
    source: Mapping[str, Any]
    exporter: Mapping[str, Any]
    components: Mapping[str, Component]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def by_class(self) -> bool:
        """Whether it draws images of classes (`accel.class_to_image`), and not of a text (`accel.pipeline`)."""
        return DENOISER in self.components

    @property
    def edits(self) -> bool:
        """Whether the UNet takes latents of an image beside its own, as InstructPix2Pix (arXiv 2211.09800) does."""
        specs = self.components["unet"].inputs if "unet" in self.components else ()
        return bool(specs) and specs[0].shape[1] == 2 * self.pipeline["latent_channels"]

    @property
    def refines(self) -> bool:
        """Whether it is an SDXL refiner, whose size conditioning ends in an aesthetic score."""
        specs = self.components["unet"].inputs if "unet" in self.components else ()
        return any(spec.name == "time_ids" and spec.shape[1] == 5 for spec in specs)

    def as_dict(self) -> dict[str, Any]:
        components = {name: component.as_dict() for name, component in self.components.items()}
        changed = {
            "profile": self.profile.as_dict(),
            "components": components,
            "files": dict(sorted(self.files.items())),
        }
        return {"schema": 1 + self.by_class, "accel": __version__} | vars(self) | changed

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """The manifest of a JSON object.

        Raises:
            ValueError, UserError: for the first value that is missing or wrong.
        """
        records.read(_REQUIRED, data, "manifest")
        named = {name: _present(entry) | {"name": name} for name, entry in data["components"].items()}
        found = records.read(cls, {**data, "components": named}, "manifest")
        Sampling.from_dict(found.sampler, "manifest: sampler")
        for name, component in found.components.items():
            if component.int8:
                records.read(_INT8, component.int8, "manifest", "components", name, "int8")
        limits.check(found)
        return found


@dataclass(frozen=True, repr=False)
class Bundle:
    """An opened bundle.

    Attributes:
        path: its folder; of one from the hub, the folder in accel's cache that its files are put into.
        manifest: what `accel.json` says.
        origin: repository and commit of one from the hub, whose files arrive when they are first used.
    """

    path: Path
    manifest: Manifest
    origin: hub.Origin | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.title}; {', '.join(self.manifest.components)}>"

    @property
    def name(self) -> str:
        """What `accel.load` takes for this very bundle."""
        return str(self.origin or self.path)

    def refuse_by_class(self) -> None:
        """Raise a UserError where it draws images of classes, for whoever can only use a model of texts."""
        if self.manifest.by_class:
            fix = f"accel run {self.name} --class 0 draws with it"
            raise UserError(f"{self.name} draws images of classes, and this is for models of texts alone", fix)

    @property
    def title(self) -> str:
        """Model, family, precision, sizes and sampling, in a line."""
        manifest, sampling = self.manifest, Sampling.from_dict(self.manifest.sampler, "the bundle's sampler")
        high, wide, images = manifest.profile.height, manifest.profile.width, manifest.profile.batch
        sizes = zip((high, wide), native_sides(manifest.pipeline["native_size"]), strict=True)
        own = " x ".join(str(native if side.admits(native) else side.opt) for side, native in sizes)
        sides = "" if high.fixed and wide.fixed else f" ({high}{'' if high == wide else f' x {wide}'})"
        return (
            f"{manifest.source['name']} ({manifest.family}, {manifest.precision}): {own} px{sides}, {images} at once, "
            f"{sampling.sampler} in {sampling.count} steps, guidance {sampling.guidance:g}"
        )

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and check the manifest; files are checked when a component is used (`verify`).

        Args:
            path: its folder, the name of one that ships (`digits/4step-int8`), or of one of the hub (`user/name`, at
                a branch, tag or commit `user/name@revision`); or the folder of an exporter that is no bundle
                (`accel.bundle.foreign`).

        Raises:
            UserError: for a repository that cannot be read, a missing folder, a folder that is not a bundle, a manifest
                that is damaged, newer than this version, or that names files outside the bundle.
        """
        origin = hub.find(path)
        given, path = path, origin.folder if origin else Path(resolve(path))
        path = foreign.taken(path) if foreign.kind_of(path) else path
        settle(path)
        if is_hub_id(given) and origin is None:
            fix = f"accel run {given} draws with it; accel export {given} OUT makes a bundle of it"
            raise UserError(f"{given} has no {MANIFEST} on the hub, so it is a pipeline or another model", fix)
        if not path.is_dir():
            raise UserError(f"no such folder: {given}", "check the path; `accel export MODEL OUT` makes a bundle")
        if not (path / MANIFEST).is_file():
            if (path / "model_index.json").is_file():
                raise UserError(
                    f"{given} is a diffusers pipeline, not a bundle", f"accel export {given} {Path(given).name}-bundle"
                )
            raise UserError(f"{path} is not a bundle: it has no {MANIFEST}", "accel export MODEL OUT makes one")
        data = read_json(path / MANIFEST, "the manifest")
        schema = data.get("schema") if isinstance(data, dict) else None
        if not isinstance(schema, int) or schema is True or schema < 1:
            raise UserError(f"{path / MANIFEST} is not a manifest of accel", "export the model again")
        if schema > SCHEMA:
            raise UserError(
                f"{path} was written by a newer accel (schema {schema}; this version reads up to {SCHEMA})",
                "pip install --upgrade accel-diffusion",
            )
        try:
            manifest = Manifest.from_dict(data)
        except (ValueError, UserError) as error:
            raise UserError(
                f"{path / MANIFEST} is damaged ({getattr(error, 'message', error)})", "export the model again"
            ) from None
        bundle = cls(path, manifest, origin=origin)
        for entry in manifest.files:
            inside(path, entry, "the manifest entry")
        for component in manifest.components.values():
            for entry in (component.graph, component.weights, *component.int8.get("graphs", {}).values()):
                bundle._place(entry)
        return bundle

    def component(self, name: str) -> Component:
        if name not in self.manifest.components:
            self.refuse_by_class()
            raise UserError(f"{self.path} has no component {name!r}", f"it has: {', '.join(self.manifest.components)}")
        return self.manifest.components[name]

    def file(self, entry: str) -> Path:
        """The path of a file that the manifest lists; a file of the hub is there afterwards, and is what was exported.

        Raises:
            UserError: when it is not listed or not inside the bundle; of the hub, when it cannot be had.
        """
        path = self._place(entry)
        if self.origin and not path.is_file():
            self.compare([entry])
        return path

    def _place(self, entry: str) -> Path:
        path = inside(self.path, entry, "the manifest entry")
        if entry not in self.manifest.files:
            raise UserError(f"{self.path}: {entry} is not listed in the manifest", "export the model again")
        return path

    def listed(self, folder: str) -> frozenset[str]:
        """Names of the files in a folder that the manifest lists: no other is read. Those of the hub are there then."""
        return frozenset(
            entry.removeprefix(f"{folder}/")
            for entry in self.manifest.files
            if entry.startswith(f"{folder}/") and self.file(entry)
        )

    def copy(self, to: Path, folder: str | None = None) -> None:
        """Copy the listed files, all or those below one folder, into a folder of the same layout."""
        for entry in self.manifest.files:
            if entry != MANIFEST and (folder is None or entry.startswith(f"{folder}/")):
                copied = inside(to, entry, "the manifest entry")
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.file(entry), copied)

    def noise_schedule(self) -> NoiseSchedule:
        """Of the scheduler that lies in it."""
        from ..sampling.noise_schedule import NoiseSchedule

        return NoiseSchedule.from_folder(self.file("scheduler/scheduler_config.json").parent)

    def verify(self, folders: Iterable[str] | None = None, engine: str | None = None) -> None:
        """Compare files with the sizes and sha256 digests in the manifest.

        Args:
            folders: only files below these folders; None for all.
            engine: of a bundle of the hub, only what this engine reads is downloaded; None for all.

        Raises:
            UserError: naming the first file that is missing, truncated or changed.
        """
        chosen = None if folders is None else tuple(f"{folder}/" for folder in folders)
        entries = [entry for entry in self.manifest.files if chosen is None or entry.startswith(chosen)]
        if self.origin and engine:
            others = {entry for record in self.manifest.components.values() for entry in record.unread_by(engine)}
            entries = [entry for entry in entries if entry not in others or self._place(entry).is_file()]
        self.compare(entries)

    def compare(self, entries: Iterable[str]) -> None:
        """As `verify`, for files by their names in the manifest; those that are on the hub alone are fetched."""
        wanted = {entry: self.manifest.files[entry] for entry in entries}
        if self.origin:
            self.origin.fetch(wanted)
        verified.compare(self.name, self.path, wanted, self.origin)

    @property
    def digest(self) -> str:
        """What this bundle is, whatever folder it lies in: the digest of all file digests and constants."""
        return digest_of(self.manifest.as_dict())


def finalize(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a finished folder, with size and sha256 of every file in it."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, manifest.as_dict() | {"files": files})
