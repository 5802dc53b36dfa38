"""The settings of every training method, as plain data: each field carries its default, help text and constraints.

No torch here: the command line makes its options from these fields.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accel import attention
from accel.errors import MissingPackage, UserError
from accel.int8.config import LEVELS

ATTENTIONS = attention.NAMES
_HALF = ("float32", "float16")
_SWITCH = ("auto", "on", "off")
_TEACHER = ("auto", "float32", "bfloat16", "float16")
_SCHEDULES = ("constant", "linear", "cosine", "polynomial")


def option(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A field of a recipe and an option of the command line.

    Args:
        default: its value where nothing is given; its type is the option's.
        text: the help text.
        least, above, below: a valid number is >= `least`, > `above` and < `below`.
        choices: the valid names.
    """
    metadata = dict(help=text, least=least, above=above, below=below, choices=choices)
    return dataclasses.field(default=default, metadata=metadata)


def default(name: str, value: Any, text: str = "") -> Any:
    """`Recipe`'s field `name` with another default (and help text); its constraints stay."""
    metadata = Recipe.__dataclass_fields__[name].metadata
    return dataclasses.field(default=value, metadata=metadata | {"help": text or metadata["help"]})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every training method has in common."""

    model: str = option("", "pipeline to start from: a diffusers folder, a hub id, or digits")

    data: str = option(
        "",
        "image folder, webdataset shards, a Hugging Face data set, or digits; several, by weight: 'photos=3 | art=1'; "
        "teacher:FILE: images that the teacher draws of the prompts in a .txt file",
    )
    split: str = option("train", "split of a Hugging Face data set")
    image_column: str = option("", "column of the images (default: found)")
    caption_column: str = option("", "column of the captions (default: found)")
    resolution: int = option(0, "width and height of the training images in pixels; 0: the model's own", least=0)
    center_crop: bool = option(True, "crop the middle of an image, not a random place")
    random_flip: bool = option(True, "mirror every image with probability 1/2")
    score_column: str = option("", "column of a score, such as aesthetic: images below --min-score are left out")
    min_score: float = option(0.0, "least score of an image")
    min_size: int = option(0, "least width and height of an image in pixels; smaller ones are left out", least=0)
    buckets: bool = option(False, "cut each image for the nearest of several aspect ratios, not for a square")
    bucket_step: int = option(64, "sides of the buckets are multiples of this many pixels", least=1)
    bucket_least: int = option(16, "a bucket of fewer images is given up, and the nearest takes them", least=1)
    validation: int = option(0, "images held out of training, on which the loss is measured; 0 for none", least=0)
    validation_every: int = option(500, "steps between two measurements of the validation loss", least=1)
    data_model: str = option("", "pipeline that draws the images of teacher:FILE (default: the teacher, or the model)")
    data_steps: int = option(25, "sampler steps of the images of teacher:FILE", least=1)
    data_guidance: float = option(7.5, "guidance scale of the images of teacher:FILE", least=0)
    data_images: int = option(0, "images of teacher:FILE, prompts in turn; 0: one of each prompt", least=0)
    caption_dropout: float = option(0.1, "share of captions replaced by the empty one, so that guidance works")
    cache: str = option("auto", "folder of the latent and text cache; auto: in the run folder; none: encode every time")
    cache_variants: int = option(2, "crops and flips kept of each image", least=1)
    cache_dtype: str = option("float16", "dtype of the cached tensors", choices=_HALF)
    vae_batch: int = option(8, "images or captions that are encoded at once for the cache", least=1)
    vae_dtype: str = option("float32", "dtype that the VAE encodes in", choices=("float32", "bfloat16", "float16"))
    workers: int = option(
        -1, "processes that load and draw noise ahead; -1: up to 4 for a GPU, none for a CPU", least=-1
    )

    steps: int = option(1000, "optimizer steps", least=0)
    batch: int = option(8, "images per process and micro-batch", least=1)
    accumulation: int = option(1, "micro-batches per optimizer step", least=1)
    learning_rate: float = option(5e-5, "peak learning rate", least=0)
    lr_schedule: str = option("constant", "learning rate after the warm-up", choices=_SCHEDULES)
    warmup: int = option(0, "steps of linear warm-up", least=0)
    optimizer: str = option("adamw", "adamw8bit needs bitsandbytes", choices=("adamw", "adamw8bit"))
    beta1: float = option(0.9, "AdamW's beta1", least=0, below=1)
    beta2: float = option(0.999, "AdamW's beta2", least=0, below=1)
    weight_decay: float = option(1e-2, "AdamW's weight decay", least=0)
    epsilon: float = option(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = option(1.0, "clip gradients to this norm", above=0)
    ema: float = option(0.0, "decay of the exponential moving average of the weights; 0 for none", least=0, below=1)

    qat: str = option("", "quantization-aware training: which layers round; empty: none", choices=("", *LEVELS))
    qat_ranges: str = option("learned", "ranges of the rounded activations", choices=("learned", "observed"))

    offset_noise: float = option(0.0, "strength of offset noise", least=0)
    input_perturbation: float = option(0.0, "strength of input perturbation", least=0)
    snr_gamma: float = option(0.0, "gamma of min-SNR weighting of the task loss; 0 for none", least=0)

    mixed_precision: str = option(
        "auto", "autocast dtype; auto: bf16 on a GPU that has it", choices=("auto", "no", "bf16", "fp16")
    )
    half_norms: bool = option(False, "norms in the dtype of mixed precision: less memory, one more rounding")
    tf32: str = option("auto", "TF32 for what stays in float32; auto: on a GPU that has it", choices=_SWITCH)
    channels_last: str = option("auto", "channels-last networks; auto: in half precision on a GPU", choices=_SWITCH)
    fused: str = option("auto", "one kernel for AdamW, few for averages; auto: on a GPU", choices=_SWITCH)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    attention: str = option("auto", "attention kernel", choices=ATTENTIONS)
    compile: bool = option(False, "torch.compile the networks")
    seed: int = option(0, "seed of all random numbers", least=0)

    checkpoint_every: int = option(500, "steps between checkpoints", least=1)
    keep: int = option(3, "checkpoints kept; 0 for all", least=0)
    sample_every: int = option(500, "steps between sample grids; 0 for none", least=0)
    sample_prompts: str = option("", "prompts of the sample grids, separated by |")
    sample_steps: int = option(25, "sampler steps of the sample grids", least=1)
    sample_guidance: float = option(7.5, "guidance scale of the sample grids", least=0)
    log: str = option("auto", "besides losses.jsonl: auto (tensorboard if installed), tensorboard, wandb, or none")
    save_dtype: str = option("float32", "dtype of the saved network", choices=_HALF)

    # What a method can do with its data; not fields.
    own_batches = False  # made otherwise than by `data.batches`, without mixtures, filters and buckets
    one_size = False  # its images have one size, so there are no buckets
    validates = False  # its loss on images held out says how well it generalises

    @property
    def needs_images(self) -> bool:
        """Whether prompts alone do not do."""
        return True

    @property
    def method(self) -> str:
        """The method's name in checkpoints and in training.json."""
        return type(self).__name__.removesuffix("Recipe")

    def in_effect(self) -> dict[str, Any]:
        """Fields that other fields override, as they take effect: what a checkpoint compares on resume."""
        return {}


@dataclass(frozen=True, kw_only=True)
class DistillationRecipe(Recipe):
    """Block removal or depth pruning with three-part knowledge distillation (BK-SDM, Distill-SD, SSD-1B)."""

    student: str = option("tiny", "base, small, tiny (SD1.x, SD2.x), ssd-1b or vega (SDXL)")
    init: str = option("copy", "student's initial weights: the teacher's, or random", choices=("copy", "random"))
    layers: str = option("first", "transformer layers that are kept: first, spread, or a list like 10:4=0,1,2,6")
    features: str = option("nota", "feature pairs that the loss compares", choices=("nota", "segmind", "layers"))
    task_weight: float = option(1.0, "weight of the denoising loss", least=0)
    output_weight: float = option(1.0, "weight of the loss against the teacher's output", least=0)
    feature_weight: float = option(1.0, "weight of the loss against the teacher's features", least=0)
    teacher_dtype: str = option("auto", "dtype of the teacher; auto is that of mixed precision", choices=_TEACHER)
    validates = True

    @property
    def loss_weights(self) -> dict[str, float]:
        """Term of the loss -> its weight."""
        return {"task": self.task_weight, "output": self.output_weight, "feature": self.feature_weight}


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    """Fine-tuning of the whole UNet of a pipeline."""

    learning_rate: float = default("learning_rate", 1e-5)
    text_encoder: bool = option(False, "also train the text encoder(s); captions are not cached then")
    validates = True

    @property
    def loss_weights(self) -> dict[str, float]:
        """Term of the loss -> its weight."""
        return {"task": 1.0}


@dataclass(frozen=True, kw_only=True)
class LoraRecipe(FinetuneRecipe):
    """Low-rank updates of some layers, everything else frozen (Hu et al. 2021, arXiv 2106.09685)."""

    learning_rate: float = default("learning_rate", 1e-4)
    rank: int = option(16, "rank of the updates")
    alpha: float = option(
        16.0, "scale of the updates times the rank; every program reads the file right if both are equal"
    )
    targets: str = option("to_q,to_k,to_v,to_out.0", "layers of the UNet that get updates, by the end of their names")
    text_targets: str = option("q_proj,k_proj,v_proj,out_proj", "layers of the text encoder(s) that get updates")
    lora_format: str = option(
        "diffusers", "tensor names; ComfyUI and A1111 read kohya's", choices=("diffusers", "kohya")
    )


@dataclass(frozen=True, kw_only=True)
class DreamBoothRecipe(LoraRecipe):
    """A subject from a few images, with prior preservation (Ruiz et al. 2022, arXiv 2208.12242)."""

    data: str = default("data", "", "folder of images of the subject; they need no captions")
    instance_prompt: str = option("", 'caption of these images, with a rare word: "a photo of sks dog"')
    class_prompt: str = option("", 'the same without the rare word: "a photo of a dog"')
    prior_weight: float = option(1.0, "weight of the loss on images of the class; 0 for none", least=0)
    class_images: int = option(200, "images of the class that the model generates before training")
    class_data: str = option("", "folder of images of the class, instead of generating them")
    class_batch: int = option(4, "images of the class generated at once", least=1)
    rank: int = option(16, "rank of the updates; 0 trains all weights")
    learning_rate: float = default("learning_rate", 0.0, "peak learning rate; 0: 1e-4, or 1e-6 for all weights")
    caption_dropout: float = default("caption_dropout", 0.0)
    steps: int = default("steps", 800)
    batch: int = default("batch", 1, "images of the subject per process and micro-batch, and as many of the class")
    own_batches = True

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"task": 1.0, "prior": self.prior_weight}


@dataclass(frozen=True, kw_only=True)
class FewStepRecipe(Recipe):
    """What the methods for few-step students have in common.

    `model` is the student's start, and the result; `teacher` is what it learns from.
    """

    teacher: str = option("", "pipeline whose UNet teaches (default: the model's own)")
    few_steps: int = option(4, "steps of the student: 1, 2, 4, 8 or any other number")
    teacher_dtype: str = option("auto", "dtype of the teacher; auto is that of mixed precision", choices=_TEACHER)

    rank: int = option(0, "rank of the student's low-rank updates (LoRA); 0 trains all of its weights")
    alpha: float = option(0.0, "scale of the updates is alpha / rank; 0 for alpha equal to the rank")
    targets: str = option(
        "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,downsamplers.0.conv,"
        "upsamplers.0.conv,time_emb_proj",
        "layers that get updates, by the end of their names (default: those of DMD2's and LCM's published LoRAs)",
    )
    lora_format: str = option(
        "diffusers", "tensor names; ComfyUI and A1111 read kohya's", choices=("diffusers", "kohya")
    )

    caption_dropout: float = default("caption_dropout", 0.0)


@dataclass(frozen=True, kw_only=True)
class DMD2Recipe(FewStepRecipe):
    """Few-step students by improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

    `model` is the generator's start, and the result; `teacher` gives the real score and the fake score's start.
    """

    timesteps: str = option("", "their timesteps, such as 999,749,499,249 or 399 (default: evenly from 999 on)")
    real_guidance: float = option(8.0, "guidance scale of the real score")
    decoupled: str = option(
        "",
        "draw guidance's timestep apart from matching's (decoupled DMD): full, constrained to what a step has yet to "
        "decide, or hybrid, the published rule: guidance constrained, matching full",
        choices=("", "full", "constrained", "hybrid"),
    )
    ratio: int = option(5, "critic updates per generator update (two time-scale update rule)", least=1)
    critic_warmup: int = option(0, "steps in which only the critic learns, before the generator starts", least=0)
    critic_learning_rate: float = option(0.0, "peak learning rate of the fake score; 0 for the generator's")
    matching_weight: float = option(1.0, "weight of the distribution matching loss")
    adversarial_weight: float = option(5e-3, "weight of the GAN loss of the generator; 0 for no GAN")
    discriminator_weight: float = option(1e-2, "weight of the GAN loss of the critic")
    backward_simulation: bool = option(True, "train the generator on its own outputs, not on noised images")
    mixed_steps: bool = option(
        True, "train all of the student's steps in each batch that has room; off: one step a batch"
    )
    step_aware: bool = option(True, "condition the critic on the student's step that made an image; see docs/dmd2.md")
    low: float = option(0.02, "smallest timestep of distribution matching, as a share of all timesteps")
    high: float = option(0.98, "largest timestep of distribution matching, as a share of all timesteps")
    offload_teacher: bool = option(False, "keep the teacher on the CPU between its calls")
    critic_rank: int = option(0, "rank of the fake score's updates on the frozen teacher; 0 trains a copy of it")

    learning_rate: float = default("learning_rate", 5e-7, "peak learning rate of the generator")
    max_grad_norm: float = default("max_grad_norm", 10.0)
    one_size = True

    @property
    def needs_images(self) -> bool:
        return bool(self.adversarial_weight) or not self.backward_simulation

    def in_effect(self) -> dict[str, Any]:
        # Smaller micro-batches have no room for all of the student's steps.
        steps = len(self.timesteps.split(",")) if self.timesteps else self.few_steps
        return {"mixed_steps": self.mixed_steps and self.batch >= steps}


@dataclass(frozen=True, kw_only=True)
class LCMRecipe(FewStepRecipe):
    """Few-step students by latent consistency distillation (Luo et al. 2023, arXiv 2310.04378); with a rank, an
    LCM-LoRA (arXiv 2311.05556)."""

    skip: int = option(20, "timesteps of a solver step, over which the student learns to be consistent", least=1)
    guidance: float = option(7.5, "guidance scale of the teacher, which becomes the student's own", least=1)
    guidance_high: float = option(0.0, "draw the scale evenly from --guidance to here; 0: it is fixed", least=0)
    loss: str = option("huber", "distance between two predictions", choices=("huber", "l2"))
    huber: float = option(1e-3, "difference from which huber is no longer quadratic", above=0)

    learning_rate: float = default("learning_rate", 0.0, "peak learning rate; 0: 1e-6, or 1e-4 for a LoRA")
    weight_decay: float = default("weight_decay", 0.0)


@dataclass(frozen=True, kw_only=True)
class RegressionRecipe(Recipe):
    """Warm-up of a one-step student on pairs of noise and the teacher's image (DMD, arXiv 2311.18828)."""

    teacher: str = option("", "pipeline whose UNet makes the images (default: the model's own)")
    timestep: int = option(999, "timestep that the student is conditioned on; 399 for SDXL")
    pairs: str = option("", "folder of the pairs; missing ones are made (default: in the run folder)")
    pair_count: int = option(10_000, "pairs of noise and image", least=1)
    pair_steps: int = option(50, "the teacher's steps", least=1)
    pair_guidance: float = option(8.0, "the teacher's guidance scale")
    loss: str = option("mse", "of latents, or lpips of images (needs lpips)", choices=("mse", "huber", "lpips"))

    learning_rate: float = default("learning_rate", 1e-5)
    steps: int = default("steps", 3000)
    batch: int = default("batch", 4, "pairs per process and micro-batch")
    needs_images = False
    own_batches = True


@dataclass(frozen=True, kw_only=True)
class TinyVaeRecipe(Recipe):
    """A tiny VAE (TAESD's network) that stands in for the pipeline's own: reconstruction and perceptual loss."""

    width: int = option(64, "channels of every layer", least=1)
    blocks: int = option(3, "residual blocks of every stage", least=1)
    reconstruction_weight: float = option(1.0, "weight of the squared error against the full decoder's images", least=0)
    perceptual_weight: float = option(0.1, "weight of the error in the full encoder's features; 0 for none", least=0)
    encoder_weight: float = option(0.1, "weight of the tiny encoder's loss; 0 leaves it untrained", least=0)
    caption_dropout: float = default("caption_dropout", 0.0, "has no effect: no captions are read")
    learning_rate: float = default("learning_rate", 5e-4)
    lr_schedule: str = default("lr_schedule", "cosine")
    warmup: int = default("warmup", 50)
    weight_decay: float = default("weight_decay", 0.0)
    validates = True


def check(recipe: Recipe) -> None:
    """Find at the start what would otherwise fail in the middle of a run, or at its end.

    Raises:
        UserError: for a value that its field does not allow, or two that exclude each other.
        MissingPackage: for an optimizer that is not installed.
    """
    for field in dataclasses.fields(recipe):
        if expected := _expected(getattr(recipe, field.name), field.metadata):
            raise UserError(
                f"invalid {field.name}: {getattr(recipe, field.name)!r} (expected {expected})",
                f"leave out --{field.name.replace('_', '-')} for the default, {field.default!r}",
            )
    if recipe.qat in ("scores", "attention") and recipe.attention not in ("auto", "sdpa"):
        raise UserError(
            f"--qat {recipe.qat} rounds within attention, which --attention {recipe.attention} leaves to one kernel",
            "--attention sdpa, or --qat all",
        )
    if recipe.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage("bitsandbytes", "--optimizer adamw8bit")


_BOUNDS = {"least": (">=", operator.ge), "above": (">", operator.gt), "below": ("<", operator.lt)}


def _expected(value: Any, rules: Mapping[str, Any]) -> str:
    """What the rules of `option` ask for, in words, where a value breaks them; else ""."""
    if rules["choices"]:
        return "" if value in rules["choices"] else f"one of: {', '.join(filter(None, rules['choices']))}"
    bounds = [(sign, holds, rules[name]) for name, (sign, holds) in _BOUNDS.items() if rules[name] is not None]
    finite = not isinstance(value, float) or math.isfinite(value)
    if finite and all(holds(value, bound) for _, holds, bound in bounds):
        return ""
    kind = "an integer" if isinstance(value, int) else "a finite number"
    return " and ".join([kind, *(f"{sign} {bound}" for sign, _, bound in bounds)]).replace(" and ", " ", 1)
