"""Generate images with a model: a pipeline folder run by diffusers, or a bundle run by an engine.

Each image comes from its own seed. Its generator gives the initial latents first and then, to a stochastic
sampler, the noise of one step after another; so an image does not depend on the batch it is made in, and both kinds
of model start from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel.assets import resolve
from accel.bundle import Bundle
from accel.bundle.kinds import DENOISER
from accel.class_to_image import load as load_by_class
from accel.class_to_image import opened as opened_by_class
from accel.dtypes import SHORT, torch_dtype
from accel.engines import choose
from accel.engines.base import check_device
from accel.errors import UserError
from accel.files import digest_of, sha256
from accel.models.config_files import clip_tokenizer
from accel.models.source import Source, open_source
from accel.sampling import Sampling
from accel.sampling.edm.solvers import Churn
from accel.sampling.samplers import SAMPLERS, NoiseSchedule, grid

from .protocols import schedulers

# prompts [n], seeds [n] -> images, uint8 [n, height, width, 3]
Maker = Callable[[Sequence[str], Sequence[int]], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, opened and not yet loaded.

    Attributes:
        origin: the pipeline folder or the bundle.
        name: what to call it.
        digest: of everything that decides its images: weights, configs, tokenizers; or of the bundle.
        own: the sampling constants it carries along, None where it has none.
        dtype: what it computes in unless another dtype is asked for.
    """

    origin: Source | Bundle
    name: str
    digest: str
    own: Sampling | None
    dtype: str

    @property
    def kind(self) -> str:
        return "bundle" if isinstance(self.origin, Bundle) else "pipeline"

    @property
    def network(self) -> str:
        """The component of a bundle that takes most of the time."""
        return DENOISER if isinstance(self.origin, Bundle) and self.origin.manifest.by_class else "unet"


def open_model(model: str | Path) -> Model:
    """Open a bundle, a diffusers pipeline folder, a hub id, or the shipped `digits` and `digits/NAME`.

    Raises:
        UserError: when it is neither.
    """
    if (of_classes := opened_by_class(model)) is not None:
        return _of_classes(of_classes)
    path = Path(resolve(model))
    if (path / "accel.json").is_file():
        bundle = Bundle.open(path)
        manifest = bundle.manifest
        own = Sampling.from_dict(manifest.sampler, f"the sampler of {path}", schedulers())
        return Model(origin=bundle, name=path.resolve().name, digest=bundle.digest, own=own, dtype=manifest.precision)
    source = open_source(model)
    constants = source.sampler()
    own = None if constants is None else Sampling.from_dict(constants, str(source.path / "sampler.json"), schedulers())
    return Model(origin=source, name=source.name, digest=_digest(source), own=own, dtype="fp32")


def _of_classes(bundle: Bundle) -> Model:
    """A model of classes. A student says how it is run; a teacher's steps are the protocol's."""
    manifest = bundle.manifest
    student = manifest.sampler["name"] != "heun"
    own = Sampling.from_dict(manifest.sampler, f"the sampler of {bundle.path}") if student else None
    name = bundle.path.resolve().name
    return Model(origin=bundle, name=name, digest=bundle.digest, own=own, dtype=manifest.precision)


def _digest(source: Source) -> str:
    """Weights, configs and tokenizers; not the caches and readmes that may lie beside them."""
    networks = [name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if source.has(name)]
    tokenizers = [name for name in ("tokenizer", "tokenizer_2") if source.has(name)]
    texts = [path for name in tokenizers for path in sorted((source.path / name).glob("*")) if path.is_file()]
    return digest_of(
        {
            "weights": source.digest(networks),
            "configs": {name: source.config(name) for name in [*networks, "scheduler"]},
            "tokenizers": {f"{path.parent.name}/{path.name}": sha256(path) for path in texts},
        }
    )


def load(
    model: Model,
    sampling: Sampling,
    size: int,
    engine: str = "auto",
    options: Mapping[str, Any] | None = None,
    local_rank: int = 0,
    churn: Churn | None = None,
) -> tuple[Maker, str]:
    """Load a model: what makes its images, and a description of what runs it.

    Args:
        size: height and width, pixels.
        engine: for a bundle, as in `accel.load`; a pipeline folder runs eagerly.
        options: the engine's own (device, dtype, provider, threads); for a pipeline folder device and dtype.
        local_rank: which of the machine's GPUs torch uses where no device is given.
        churn: of a model of classes.

    Raises:
        UserError: when the model cannot be loaded, or cannot run so.
    """
    options = {name: value for name, value in (options or {}).items() if value is not None}
    if model.network == DENOISER:
        return _class_maker(model.origin, sampling, churn, engine, options, local_rank)
    if isinstance(model.origin, Bundle):
        return _bundle_maker(model.origin, sampling, size, engine, options, local_rank)
    if engine not in ("auto", "eager"):
        raise UserError(
            f"{model.name} is a pipeline folder, which the {engine} engine cannot run",
            f"export it first: accel export {model.origin.path} BUNDLE",
        )
    if others := sorted(set(options) - {"device", "dtype"}):
        raise UserError(f"a pipeline folder has no option {others[0]}", "leave it out, or evaluate a bundle")
    return _pipeline_maker(model.origin, sampling, size, local_rank, **options)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def normal(sources: Sequence[torch.Generator], shape: Sequence[int]) -> torch.Tensor:
    """The next standard normal float32 noise [n, *shape] of every generator; diffusers draws the same."""
    return torch.cat([torch.randn((1, *shape), generator=source) for source in sources])


def torch_device(device: str | None, local_rank: int) -> str:
    if device not in (None, "auto"):
        return device
    return f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------------------------------------------------- pipelines


def _pipeline_maker(
    source: Source, sampling: Sampling, size: int, local_rank: int, device: str | None = None, dtype: str = "fp32"
) -> tuple[Maker, str]:
    compute = torch_dtype(dtype, SHORT)
    device = torch_device(device, local_rank)
    check_device(device)
    how = _schedule(source, sampling)
    pipeline = _assemble(source, sampling).to(device, compute)
    scale = pipeline.vae_scale_factor
    if size % scale:
        raise UserError(f"{size} px is not a multiple of {scale}", "choose another protocol for this model")
    shape = (pipeline.unet.config.in_channels, size // scale, size // scale)

    def make(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        own = generators(seeds)
        latents = normal(own, shape).to(device, compute)
        result = pipeline(
            list(prompts),
            guidance_scale=sampling.guidance,
            generator=own,
            latents=latents,
            height=size,
            width=size,
            output_type="np",
            **how,
        )
        return rounded(result.images)

    return make, f"diffusers on {device}, {dtype}"


def _schedule(source: Source, sampling: Sampling) -> dict[str, Any]:
    if sampling.sampler == "dmd2":
        schedule = NoiseSchedule.from_scheduler(source.config("scheduler"))
        timesteps = sampling.timesteps or grid("dmd2", schedule, sampling.steps)
        return {"timesteps": [int(t) for t in timesteps]}
    if sampling.timesteps is not None:
        raise UserError(
            f"{source.name} asks for {sampling.sampler} at timesteps of its own, which only dmd2 takes here",
            f"--steps N, or export it: accel export {source.path} BUNDLE",
        )
    return {"num_inference_steps": sampling.steps}


def _assemble(source: Source, sampling: Sampling) -> Any:
    """The pipeline of diffusers, without its safety checker, whose black images would be measured as well."""
    import diffusers

    # From the file and not from the loaded scheduler, whose defaults would be taken for the model's choices.
    spacing = {name: value for name, value in sampling.options.items() if name == "timestep_spacing"}
    made = dict(SAMPLERS[sampling.sampler].pinned) | spacing
    scheduler = getattr(diffusers, schedulers()[sampling.sampler]).from_config(source.scheduler(), **made)
    networks = {
        name: source.load(name) for name in ("unet", "vae", "text_encoder", "text_encoder_2") if source.has(name)
    }
    tokenizers = {name: clip_tokenizer(source.path / name) for name in ("tokenizer", "tokenizer_2") if source.has(name)}
    parts = {**networks, **tokenizers, "scheduler": scheduler}
    if source.family == "sdxl":
        zeros = bool(source.index.get("force_zeros_for_empty_prompt", True))
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ------------------------------------------------------------------------------------------------------------ bundles


def _bundle_maker(
    bundle: Bundle, sampling: Sampling, size: int, engine: str, options: dict[str, Any], local_rank: int
) -> tuple[Maker, str]:
    from accel.pipeline import load

    engine = choose(engine, bundle.component("unet"))
    if engine in ("eager", "compile") and torch.cuda.is_available():
        options["device"] = torch_device(options.get("device"), local_rank)
    pipeline = load(bundle, engine, safety_checker=False, **options)  # whose black images would be measured
    constants = bundle.manifest.pipeline
    side = size // constants["vae_scale"]
    shape = (constants["latent_channels"], side, side)

    def make(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        own = generators(seeds)
        latents = normal(own, shape).numpy()
        # The pipeline may cut the batch and ask once for every part; a generator must be drawn from only once a step.
        renoise = cache(lambda step: normal(own, shape).numpy())
        result = pipeline(
            list(prompts),
            height=size,
            width=size,
            sampler=sampling.sampler,
            steps=sampling.steps,
            timesteps=sampling.timesteps,
            guidance_scale=sampling.guidance,
            latents=latents,
            renoise=renoise,
            output_type="np",
        )
        return rounded(result.images)

    return make, f"{engine}: {pipeline.engines['unet'].description}"


def _class_maker(
    bundle: Bundle, sampling: Sampling, churn: Churn | None, engine: str, options: dict[str, Any], local_rank: int
) -> tuple[Maker, str]:
    engine = choose(engine, bundle.component(DENOISER), bundle)
    if engine in ("eager", "compile") and torch.cuda.is_available():
        options["device"] = torch_device(options.get("device"), local_rank)
    pipeline = load_by_class(bundle, engine, **options)
    values, loaded = bundle.manifest.pipeline, pipeline.engines[DENOISER]
    shape = (values["latent_channels"], values["native_size"], values["native_size"])
    most = loaded.component.dims["images"].max

    def part(labels: list[int], own: list[torch.Generator]) -> np.ndarray:
        return pipeline(
            labels,
            sampler=sampling.sampler,
            steps=sampling.steps if sampling.sampler == "heun" else sampling.count,
            churn=churn,
            latents=normal(own, shape).numpy(),
            renoise=lambda step: normal(own, shape).numpy(),
            output_type="np",
        ).images

    def make(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        labels, own = list(map(int, prompts)), generators(seeds)
        # No more than one call of the network takes: then every generator is drawn from once a step, in order.
        starts = range(0, len(labels), most)
        return rounded(np.concatenate([part(labels[i : i + most], own[i : i + most]) for i in starts]))

    return make, f"{engine}: {loaded.description}"


def rounded(images: np.ndarray) -> np.ndarray:
    """Images in 0..1 to uint8.

    Raises:
        UserError: for NaN, which would become a black image and be measured.
    """
    if not np.isfinite(images).all():
        raise UserError("the image is NaN or infinite", "this dtype overflows on this model: --precision fp32")
    return (np.asarray(images, np.float32).clip(0, 1) * 255).round().astype(np.uint8)
