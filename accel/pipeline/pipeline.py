"""Prompt to image, on any engine."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..arrays import all_finite, to_host
from ..bundle import Bundle, Manifest
from ..bundle.kinds import KINDS
from ..engines import Engine
from ..engines.placement import Place, check_move
from ..engines.resource import Resource
from ..errors import UserError
from ..files import read_json
from ..models.embeddings import Embedding
from ..models.embeddings import files as embedding_files
from ..models.embeddings.for_bundle import Placed, placed
from ..models.lora import LoraFile
from ..models.lora.files import Spec
from ..models.lora.for_bundle import Fused, fused
from ..safety import COMPONENT as SAFETY_CHECKER
from ..safety import SafetyChecker
from ..sampling.constants import OPTIONS
from ..text.cache import SIZE, TextCache
from ..text.tokenizer import ClipTokenizer
from . import arguments
from . import request as requests
from .generator_noise import GeneratorNoise
from .input_images import InputImages, shown
from .lazy_engines import LazyEngines, component_names
from .output import Output, not_finite, note_rejected, of_type, table
from .previews import Previewer, preview_hook
from .request import Request
from .run import Hooks, Run, StepCallback, step_end_of
from .sampling_plan import plan as plan_of
from .tiling import VaeTiling

TEXT_ENCODERS = KINDS["text_encoder"].names


class Pipeline(Resource):
    """A loaded bundle. Make one with `accel.load`.

    Attributes:
        bundle: where it came from; `bundle.manifest.sampler` holds the default steps and guidance.
        engines: the components by name.
        loras: the LoRA files that it runs with.
        safety_checker: what looks at its images and lets the rejected ones become black; None where there is none,
            and it may be set to None, as in diffusers.
        embeddings: the learned tokens that it runs with.
        text_cache: the conditioning of the latest prompts.
        tiling: how the VAE sees images (`enable_vae_tiling`); None for whole ones.
    """

    what, again = "pipeline", "accel.load(BUNDLE) loads one"

    def __init__(
        self,
        bundle: Bundle,
        engines: Mapping[str, Engine],
        lora: Fused = Fused(),  # noqa: B008
        learned: Placed = Placed(),  # noqa: B008
        *,
        text_cache: int = SIZE,
    ):
        self.bundle = bundle
        self.engines = engines if isinstance(engines, LazyEngines) else LazyEngines.of(engines)
        self.schedule = bundle.noise_schedule()
        self.safety_checker = SafetyChecker.of(bundle) if SAFETY_CHECKER in self.engines else None
        self._tokenizers = tokenizers_of(bundle, engines)
        self._use(lora, learned)
        self.text_cache = TextCache(text_cache)
        self.tiling: VaeTiling | None = None
        self._previewer: Previewer | None = None
        if bundle.manifest.profile.vae_tile:
            self.enable_vae_tiling()

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        sigmas: str | None = None,
        timestep_spacing: str | None = None,
        shift: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        image_guidance_scale: float | None = None,
        control_image: Any = None,
        control_scale: float | Sequence[float] = 1.0,
        control_end: float | Sequence[float] = 1.0,
        ip_adapter_image: Any = None,
        ip_adapter_scale: float = 1.0,
        original_size: Sequence[int] | None = None,
        crop: Sequence[int] = (0, 0),
        target_size: Sequence[int] | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        prompt_weights: bool = False,
        clip_skip: int | None = None,
        latents: Any = None,
        renoise: Callable[[int], Any] | None = None,
        output_type: str = "pil",
        callback: StepCallback | None = None,
        preview_every: int | None = None,
        preview_callback: Callable[[int, list[Any]], None] | None = None,
        progress: bool = False,
        **others: Any,
    ) -> Output:
        """Make images. Without `seed` they are new ones each time; `output.seeds` says which seeds were drawn.

        Args:
            prompt: one text or several.
            negative_prompt: what to steer away from (with guidance): one text, or one per prompt.
            height, width: pixels, within the bundle's profile; None for the model's own size.
            sampler, steps, timesteps, guidance_scale: how to sample; None for the bundle's own constants.
            eta, sigmas, timestep_spacing, shift: more of the sampler (`accel.sampling.samplers.table`); None for what
                the bundle and its scheduler config say.
            num_images_per_prompt: images per prompt.
            seed: of the first image (the others count on from it), or one per image. The same seed gives the same
                noise on every engine. None draws a new one.
            image: an image to start from, or one per image (`accel.images.batch`).
            mask_image: white where to paint, black where the image is kept.
            strength: how much of the image is given up, above 0 to 1: the share of the steps that are run. None for
                0.8 (an SDXL refiner: 0.3), and for 1 with a mask.
            image_guidance_scale: how closely a model that edits images (InstructPix2Pix) keeps to the image; None for
                1.5.
            control_image: what the bundle's T2I-Adapter or ControlNet is shown; a list, one for each, where it has
                several ControlNets.
            control_scale: how strongly it counts (0.8 for DMD2 with a canny adapter); a number, or one for each.
            control_end: share of the steps that it counts for (an adapter's conditioning factor; 0.5 for DMD2); a
                number, or one for each.
            ip_adapter_image: what the bundle's IP-Adapter is shown: one image for all, or a list of one per image to
                make; a list of lists shows several together, as in diffusers (`[[a, b]]`: both, for every image).
            ip_adapter_scale: how strongly it counts, as diffusers' `set_ip_adapter_scale` says it.
            original_size, crop, target_size: SDXL's size conditioning in pixels, (height, width) and (top, left);
                None for the image's own size.
            aesthetic_score, negative_aesthetic_score: what an SDXL refiner is told of its images, 1 to 10, with and
                without the prompt.
            denoising_start, denoising_end: shares of the noise schedule where the run begins, with the latents of
                another run, and ends: a base model to 0.8, and a refiner from there.
            prompt_weights: let `(words:1.3)` in prompts count by that factor (`accel.text.prompts`).
            clip_skip: how many of the text encoder's last layers prompts do without (A1111's number less 1); negative
                prompts take all, as in diffusers. None for the bundle's own.
            latents: initial noise [N, C, h, w] with unit variance, float32 or less, instead of a seed's; with
                `denoising_start` the `Output.latents` to go on with.
            renoise: i -> noise [N, C, h, w] that a few-step sampler adds after step i, instead of a seed's.
            output_type: "pil", "np", "pt" or "latent", see `Output.images`.
            callback: called as (i, t, x) after each step with the latents so far; one that returns False stops the run.
            preview_every: show every n-th step to `preview_callback`; None for every step, where there is one.
            preview_callback: called as (i, images) with PIL images of what step i takes the images to be, for each
                part of the call that is made at once. By the bundle's decoder, where that is a tiny VAE's; else by a
                linear map of latents to colours (`accel.pipeline.previews`).
            progress: show a progress bar on stderr.
            others: diffusers' names for the above (`num_inference_steps`, ...). Also diffusers': `generator`, a
                `torch.Generator` or one per image, whose noise is diffusers' own in text to image;
                `callback_on_step_end(pipeline, i, t, tensors)`, whose `tensors["latents"]` (torch, unit variance) may
                be replaced in the dict that it returns; and `return_dict=False` for a tuple.

        Raises:
            UserError: for arguments of a wrong type, or that do not fit each other or the bundle's profile.
            accel.errors.Stopped: when the callback has returned False.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "others")}
        self.check_open()
        return self._make(**arguments.read(given, default_call, others))

    def _make(
        self,
        *,
        generator: Any = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        **call: Any,
    ) -> Any:
        """The images of arguments that have the right types."""
        if missing := set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise UserError(f"callback_on_step_end gets latents alone, not {missing.pop()}", "leave that name out")
        made = self.request(call)
        if generator is not None:
            made = self._with_generator(made, generator)
        run = Run(self.bundle, self.engines, self.tokenizers, self.schedule, made, self.text_cache)
        step_end = None if callback_on_step_end is None else step_end_of(self, callback_on_step_end, made.plan.start)
        decode = call["output_type"] != "latent"
        nsfw = None
        with self.engines.turn():
            preview = preview_hook(
                made.plan, made.pixels, self.previewer, call["preview_every"], call["preview_callback"]
            )
            hooks = Hooks(call["callback"], step_end, preview)
            latents, pixels = run(hooks, call["progress"], decode=decode)
            if not all_finite(latents) or pixels is not None and not all_finite(pixels):
                raise not_finite(self.bundle.manifest, self.engines.descriptions)
            if self.safety_checker is not None and pixels is not None:
                pixels = to_host(pixels)
                nsfw = run.checked(pixels, self.safety_checker)
        if nsfw:
            note_rejected(nsfw)
        images_made = of_type(call["output_type"], pixels, latents)
        if not return_dict:  # diffusers' own tuples: those of SD also hold the safety checker's findings
            return (images_made,) if self.bundle.manifest.family == "sdxl" else (images_made, nsfw)
        return Output(images_made, latents, made.seeds if generator is None else [], run.clock.seconds, nsfw)

    def request(self, call: Mapping[str, Any]) -> Request:
        """The call as a request, refused if it does not fit the bundle; runs nothing."""
        controls = map(call.__getitem__, ("control_image", "control_scale", "control_end"))
        seen = shown(self.bundle.manifest, *controls)
        manifest = self.bundle.manifest
        images = InputImages(
            call["image"],
            call["mask_image"],
            call["strength"],
            seen,
            edited=manifest.edits,
            usual_strength=0.3 if manifest.refines else 0.8,
            prompt=call["ip_adapter_image"],
            prompt_scale=call["ip_adapter_scale"],
        )
        plan = plan_of(
            self.bundle.manifest,
            self.schedule,
            call["sampler"],
            call["steps"],
            call["timesteps"],
            call["guidance_scale"],
            images.strength,
            {name: call[name] for name in OPTIONS},
            call["image_guidance_scale"],
            (call["denoising_start"], call["denoising_end"]),
        )
        return requests.complete(
            self._limits(),
            plan,
            call["prompt"],
            call["negative_prompt"],
            call["num_images_per_prompt"],
            secrets.randbelow(2**31) if call["seed"] is None else call["seed"],
            height=call["height"],
            width=call["width"],
            latents=call["latents"],
            inputs=images,
            scores=(call["aesthetic_score"], call["negative_aesthetic_score"]),
            sizes=(call["original_size"], call["crop"], call["target_size"]),
            renoise=call["renoise"],
            weighted=call["prompt_weights"],
            tiling=self.tiling,
            clip_skip=requests.clip_skip(manifest, call["clip_skip"]),
        )

    def _with_generator(self, made: Request, generator: Any) -> Request:
        """The request with noise of torch generators, in the order in which diffusers draws it."""
        source = GeneratorNoise(generator, made.total, (self.bundle.manifest.pipeline["latent_channels"], *made.size))
        chunks = [replace(chunk, seeds=source.seeds[chunk.rows]) for chunk in made.chunks]
        first = source.draw() if made.latents is None else made.latents
        return replace(made, chunks=chunks, latents=first, renoise=made.renoise or source.step)

    def previewer(self) -> Previewer:
        """What shows latents as small pictures; made when it is first asked for."""
        if self._previewer is None:
            self._previewer = Previewer.of(self.bundle, self.engines)
        return self._previewer

    def set_loras(self, loras: Spec | Sequence[Spec] | None = ()) -> None:
        """Run with these LoRA files from now on, instead of those it runs with; [] for none.

        They are fused into the bundle's own weights: seconds, and no export. The same files give the same bits,
        whatever ran in between. No image may be in the making meanwhile.

        Args:
            loras: each a file or a folder of diffusers' `save_lora_weights`, "FILE=SCALE", (file, scale), or {"path":
                file, "scale": 0.8, "blocks": {"unet.mid_block": 0.5}}, where `blocks` has scales for parts of networks.

        Raises:
            UserError: for a file that does not fit, or an engine that cannot follow; nothing is changed then.
        """
        self.check_open()
        self._change(fused(self.bundle, loras), self._learned)

    def set_embeddings(self, embeddings: embedding_files.Spec | Sequence[embedding_files.Spec] | None = ()) -> None:
        """Read the tokens of these files of textual inversion in prompts from now on; [] for none.

        Their vectors take rows of the token table that no text reaches (78 in CLIP's): seconds, and no export. LoRA
        files stay. The same files give the same bits, whatever ran in between. No image may be in the making meanwhile.

        Args:
            embeddings: each a file or a folder of diffusers, "FILE=TOKEN", or (file, token). Without a token it is
                the one that the file names, or else the file's name.

        Raises:
            UserError: for a file that does not fit, too many vectors, or an engine that cannot follow; nothing is
                changed then.
        """
        self.check_open()
        self._change(self._lora, placed(self.bundle, embeddings, self._tokenizers))

    def _change(self, lora: Fused, learned: Placed) -> None:
        self.engines.set_weights(learned.tensors(self.bundle, lora.tensors))
        self._use(lora, learned)

    def _use(self, lora: Fused, learned: Placed) -> None:
        """Say and tokenize what the engines run with."""
        self._lora, self._learned = lora, learned
        self.loras: tuple[LoraFile, ...] = lora.files
        self.embeddings: tuple[Embedding, ...] = learned.embeddings
        self.tokenizers = {
            name: tokenizer.with_tokens(learned.rows.get(name, {})) for name, tokenizer in self._tokenizers.items()
        }

    def enable_vae_tiling(self, tile: int | None = None) -> None:
        """Decode and encode images in overlapping tiles that are blended, as diffusers' method of this name does.

        Memory is then that of a tile, and the sizes of images are limited by the UNet alone. An image differs a little
        from the one that is decoded whole: the VAE's attention and group norms see a tile.

        Args:
            tile: side of a tile in pixels; None for the one that the bundle was exported for, else for diffusers' own
                (`accel.pipeline.tiling.VaeTiling.of`).

        Raises:
            UserError: for a side that makes no tiles.
        """
        self.check_open()
        manifest = self.bundle.manifest
        config = read_json(self.bundle.file("vae_decoder/config.json"), "the VAE's config")
        self.tiling = VaeTiling.of(config, manifest.pipeline["vae_scale"], tile or manifest.profile.vae_tile or None)

    def disable_vae_tiling(self) -> None:
        """Decode and encode whole images again."""
        self.tiling = None

    def to(self, *args: Any, **kwargs: Any) -> Pipeline:
        """The pipeline itself, where it is there already: a loaded engine cannot be moved.

        Args:
            args, kwargs: a device, a dtype, or both, as diffusers' pipelines take them.

        Raises:
            UserError: for another device or dtype than the pipeline's own.
        """
        self.check_open()
        places = {name: Place.of(self.engines[name]) for name in component_names(self.bundle) if name in self.engines}
        check_move("this pipeline", places, args, kwargs, "load it there: accel.load(BUNDLE, {options})")
        return self

    def release(self) -> None:
        self.engines.close()

    def __repr__(self) -> str:
        rows = "".join(f"\n  {name:<12} {text}" for name, text in self._parts().items())
        return f"<Pipeline{' (closed)' * self.closed} {self.bundle.title}{rows}>"

    def _repr_html_(self) -> str:
        return table(f"Pipeline{' (closed)' * self.closed} {self.bundle.title}", self._parts())

    def _parts(self) -> dict[str, str]:
        """What each component runs on."""
        later = "loaded in its phase" if self.engines.offload else "loaded when it is first used"
        parts = {name: self.engines.descriptions.get(name, later) for name in self.engines}
        more = {"loras": self.loras, "embeddings": self.embeddings}
        tiles = {} if self.tiling is None else {"vae tiling": f"{self.tiling.tile} px"}
        return parts | tiles | {name: ", ".join(map(str, files)) for name, files in more.items() if files}

    def _limits(self) -> Manifest:
        """The manifest with the shapes that the engines take: a TensorRT engine may take fewer than the bundle."""
        manifest = self.bundle.manifest
        loaded = () if self.engines.offload else ("unet", "vae_decoder")  # offloading loads them in their phase
        own = {name: self.engines[name].component for name in loaded if name in self.engines}
        return replace(manifest, components={**manifest.components, **own})


def tokenizers_of(bundle: Bundle, components: Iterable[str]) -> dict[str, ClipTokenizer]:
    """The tokenizer of each text encoder among some components of a bundle."""
    folders = {name: name.replace("text_encoder", "tokenizer") for name in components if name in TEXT_ENCODERS}
    return {
        name: ClipTokenizer.from_folder(bundle.path / folder, bundle.listed(folder)) for name, folder in folders.items()
    }


default_call = {
    name: parameter.default
    for name, parameter in inspect.signature(Pipeline.__call__).parameters.items()
    if name not in ("self", "others")
}
