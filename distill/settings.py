"""Everything that decides a training run, as plain data, and which values make sense.

No torch here: the command line makes its options from these fields.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accel.dtypes import FLOATS
from accel.errors import MissingPackage, UserError
from accel.int8.config import LEVELS


def option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every method of training has in common."""

    model: str = option("", "pipeline to start from: a diffusers folder, a hub id, or digits")

    data: str = option("", "image folder, webdataset shards, a Hugging Face data set, or digits")
    split: str = option("train", "split of a Hugging Face data set")
    image_column: str = option("", "column of the images (default: found)")
    caption_column: str = option("", "column of the captions (default: found)")
    resolution: int = option(512, "pixels of a side")
    center_crop: bool = option(True, "crop in the middle, not anywhere")
    random_flip: bool = option(True, "mirror every second image")
    caption_dropout: float = option(0.1, "share of captions left empty, so that guidance works")
    cache: str = option("auto", "folder of the latent and text cache; auto: in the run folder; none: encode every time")
    cache_variants: int = option(2, "crops and flips kept of each image")
    cache_dtype: str = option("float16", "float16 or float32")
    workers: int = option(0, "processes that load data")

    steps: int = option(1000, "optimizer steps")
    batch: int = option(8, "images per process and micro-batch")
    accumulation: int = option(1, "micro-batches per step")
    learning_rate: float = option(5e-5, "peak learning rate")
    lr_schedule: str = option("constant", "constant, linear, cosine or polynomial (warm-up comes first)")
    warmup: int = option(0, "steps of linear warm-up")
    optimizer: str = option("adamw", "adamw or adamw8bit (needs bitsandbytes)")
    beta1: float = option(0.9, "AdamW's beta1")
    beta2: float = option(0.999, "AdamW's beta2")
    weight_decay: float = option(1e-2, "AdamW's weight decay")
    epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(1.0, "clip gradients to this norm")
    ema: float = option(0.0, "decay of the averaged weights; 0 for none")

    qat: str = option("", "train for int8: which layers round (conv, ff, qkv, all, scores, attention); empty for none")
    qat_ranges: str = option("learned", "ranges of the rounded activations: learned, or observed")

    offset_noise: float = option(0.0, "strength of offset noise")
    input_perturbation: float = option(0.0, "strength of input perturbation")
    snr_gamma: float = option(0.0, "gamma of min-SNR weighting of the task loss; 0 for none")

    mixed_precision: str = option("no", "no, bf16 or fp16")
    gradient_checkpointing: bool = option(False, "less memory, more time")
    attention: str = option("auto", "auto, sdpa, flash-attn or xformers")
    compile: bool = option(False, "torch.compile the networks")
    seed: int = option(0, "of everything random")

    checkpoint_every: int = option(500, "steps between checkpoints")
    keep: int = option(3, "checkpoints kept; 0 for all")
    sample_every: int = option(500, "steps between sample grids; 0 for none")
    sample_prompts: str = option("", "prompts of the grids, separated by |")
    sample_steps: int = option(25, "sampler steps of the grids")
    sample_guidance: float = option(7.5, "guidance scale of the grids")
    log: str = option("auto", "besides losses.jsonl: auto (tensorboard if installed), tensorboard, wandb, or none")
    save_dtype: str = option("float32", "dtype of the saved network: float32 or float16")


@dataclass(frozen=True, kw_only=True)
class Distillation(Recipe):
    """Block removal or depth pruning with three-part knowledge distillation (BK-SDM, Distill-SD, SSD-1B)."""

    student: str = option("tiny", "base, small, tiny (SD1.x, SD2.x), ssd-1b or vega (SDXL)")
    init: str = option("copy", "student's weights at the start: copy the teacher's, or random")
    layers: str = option("first", "transformer layers that survive: first, spread, or a list like 10:4=0,1,2,6")
    features: str = option("nota", "feature pairs: nota, segmind or layers")
    task_weight: float = option(1.0, "weight of the error against the noise")
    output_weight: float = option(1.0, "weight of the error against the teacher's output")
    feature_weight: float = option(1.0, "weight of the error against the teacher's features")
    teacher_dtype: str = option("auto", "dtype of the teacher: auto (as mixed precision), float32, bfloat16, float16")


@dataclass(frozen=True, kw_only=True)
class Finetune(Recipe):
    """Training the whole UNet of a pipeline on."""

    learning_rate: float = option(1e-5, "peak learning rate")
    text_encoder: bool = option(False, "train the text encoder, or both, too; its captions are not cached then")


@dataclass(frozen=True, kw_only=True)
class Lora(Finetune):
    """Low-rank updates of some layers, everything else frozen (Hu et al. 2021, arXiv 2106.09685)."""

    learning_rate: float = option(1e-4, "peak learning rate")
    rank: int = option(16, "rank of the updates")
    alpha: float = option(16.0, "their strength is alpha / rank; equal to rank, every program reads the file right")
    targets: str = option("to_q,to_k,to_v,to_out.0", "layers of the UNet, by the end of their names")
    text_targets: str = option("q_proj,k_proj,v_proj,out_proj", "layers of the text encoder(s)")
    lora_format: str = option("diffusers", "names in the file: diffusers or kohya (ComfyUI, A1111)")


@dataclass(frozen=True, kw_only=True)
class DreamBooth(Lora):
    """A subject from a few images, with prior preservation (Ruiz et al. 2022, arXiv 2208.12242)."""

    data: str = option("", "folder of images of the subject; they need no captions")
    instance_prompt: str = option("", 'caption of these images, with a rare word: "a photo of sks dog"')
    class_prompt: str = option("", 'the same without the rare word: "a photo of a dog"')
    prior_weight: float = option(1.0, "weight of the loss on images of the class; 0 for none")
    class_images: int = option(200, "images of the class that the model draws before training")
    class_data: str = option("", "folder of images of the class, instead of drawing them")
    class_batch: int = option(4, "images of the class drawn at once")
    rank: int = option(16, "rank of the updates; 0 trains all weights")
    learning_rate: float = option(0.0, "peak learning rate; 0 means 1e-4, or 1e-6 where all weights are trained")
    caption_dropout: float = option(0.0, "share of captions left empty, so that guidance works")
    steps: int = option(800, "optimizer steps")
    batch: int = option(1, "images of the subject per process and micro-batch, and as many of the class")


@dataclass(frozen=True, kw_only=True)
class DMD2(Recipe):
    """Few-step students by improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

    `model` is the generator's start, and the result; `teacher` gives the real score and the fake score's start.
    """

    teacher: str = option("", "pipeline whose UNet gives the real score (default: the model's own)")
    few_steps: int = option(4, "steps of the student: 1, 2, 4, 8 or any other number")
    timesteps: str = option("", "their timesteps, such as 999,749,499,249 or 399 (default: evenly from 999 on)")
    real_guidance: float = option(8.0, "guidance scale of the real score")
    ratio: int = option(5, "critic updates for each generator update (two time-scale update rule)")
    critic_warmup: int = option(0, "steps in which the critic alone learns, before the generator does")
    critic_learning_rate: float = option(0.0, "peak learning rate of the fake score; 0 for the generator's")
    matching_weight: float = option(1.0, "weight of the distribution matching loss")
    adversarial_weight: float = option(5e-3, "weight of the GAN loss of the generator; 0 for no GAN")
    discriminator_weight: float = option(1e-2, "weight of the GAN loss of the critic")
    backward_simulation: bool = option(True, "the generator learns on its own steps, not on noised images")
    mixed_steps: bool = option(
        True, "train all of the student's steps in each batch of at least as many images; off: one step a batch"
    )
    step_aware: bool = option(True, "tell the critic which of the student's steps drew an image; see docs/dmd2.md")
    low: float = option(0.02, "least timestep of distribution matching, as a share")
    high: float = option(0.98, "largest timestep of distribution matching, as a share")
    teacher_dtype: str = option("auto", "dtype of the teacher: auto (as mixed precision), float32, bfloat16, float16")
    offload_teacher: bool = option(False, "keep the teacher on the CPU between its calls")

    rank: int = option(0, "rank of the generator's low-rank updates (LoRA); 0 trains all of its weights")
    alpha: float = option(0.0, "their strength is alpha / rank; 0 for the rank")
    critic_rank: int = option(0, "rank of the fake score's updates on the frozen teacher; 0 trains a copy of it")
    targets: str = option(
        "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,downsamplers.0.conv,"
        "upsamplers.0.conv,time_emb_proj",
        "layers that get them, by the end of their names (default: those of DMD2's published LoRA)",
    )
    lora_format: str = option("diffusers", "names in the LoRA file: diffusers or kohya (ComfyUI, A1111)")

    caption_dropout: float = option(0.0, "share of captions left empty; the student needs no guidance")
    learning_rate: float = option(5e-7, "peak learning rate of the generator")
    max_grad_norm: float = option(10.0, "clip gradients to this norm")

    @property
    def mixes(self) -> bool:
        """Whether batches hold all of the student's steps: smaller micro-batches have no room for them."""
        steps = len(self.timesteps.split(",")) if self.timesteps else self.few_steps
        return self.mixed_steps and self.batch >= steps


@dataclass(frozen=True, kw_only=True)
class Regression(Recipe):
    """Warm-up of a one-step student on pairs of noise and the teacher's image (DMD, arXiv 2311.18828)."""

    teacher: str = option("", "pipeline whose UNet makes the images (default: the model's own)")
    timestep: int = option(999, "timestep that the student is told; 399 for SDXL")
    pairs: str = option("", "folder of the pairs, made where they are missing (default: in the run folder)")
    pair_count: int = option(10_000, "pairs of noise and image")
    pair_steps: int = option(50, "the teacher's steps")
    pair_guidance: float = option(8.0, "the teacher's guidance scale")
    loss: str = option("mse", "mse or huber of latents, or lpips of images (needs the package lpips)")

    learning_rate: float = option(1e-5, "peak learning rate")
    steps: int = option(3000, "optimizer steps")
    batch: int = option(4, "pairs per process and micro-batch")


@dataclass(frozen=True, kw_only=True)
class TinyVae(Recipe):
    """A tiny VAE (TAESD's network) that stands in for the pipeline's own: reconstruction and perceptual loss."""

    width: int = option(64, "channels of every layer")
    blocks: int = option(3, "residual blocks of every stage")
    reconstruction_weight: float = option(1.0, "weight of the squared error against the full decoder's images")
    perceptual_weight: float = option(0.1, "weight of the error in the full encoder's features; 0 for none")
    encoder_weight: float = option(0.1, "weight of the tiny encoder's error; 0 leaves it untrained")
    caption_dropout: float = option(0.0, "nothing reads captions here")
    learning_rate: float = option(5e-4, "peak learning rate")
    lr_schedule: str = option("cosine", "constant, linear, cosine or polynomial (warm-up comes first)")
    warmup: int = option(50, "steps of linear warm-up")
    weight_decay: float = option(0.0, "AdamW's weight decay")


# --------------------------------------------------------------------------------------------------------------- check

# The least value that each field may have, and the names that each may be.
_LEAST = dict.fromkeys(
    (
        "batch",
        "accumulation",
        "checkpoint_every",
        "sample_steps",
        "cache_variants",
        "ratio",
        "class_batch",
        "pair_count",
        "pair_steps",
        "width",
        "blocks",
    ),
    1,
) | dict.fromkeys(
    (
        "steps",
        "critic_warmup",
        "keep",
        "sample_every",
        "workers",
        "warmup",
        "seed",
        "learning_rate",
        "weight_decay",
        "snr_gamma",
        "offset_noise",
        "input_perturbation",
        "task_weight",
        "output_weight",
        "feature_weight",
        "sample_guidance",
        "reconstruction_weight",
        "perceptual_weight",
        "encoder_weight",
    ),
    0,
)
_ABOVE_ZERO = ("max_grad_norm", "epsilon")
_BELOW_ONE = ("beta1", "beta2")
_NAMES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "mixed_precision": ("mixed precision", ("no", "bf16", "fp16")),
    "optimizer": ("optimizer", ("adamw", "adamw8bit")),
    "lr_schedule": ("schedule", ("constant", "linear", "cosine", "polynomial")),
    "save_dtype": ("save dtype", ("float32", "float16")),
    "cache_dtype": ("cache dtype", ("float32", "float16")),
    "qat": ("int8 level", ("", *LEVELS)),
    "qat_ranges": ("way of choosing ranges", ("learned", "observed")),
    "teacher_dtype": ("teacher dtype", ("auto", *FLOATS)),
    "lora_format": ("LoRA format", ("diffusers", "kohya")),
}


def check(recipe: Recipe) -> None:
    """Find at the start what would otherwise fail in the middle of a run, or at its end.

    Raises:
        UserError: for a number that is out of range, or a name that is unknown.
        MissingPackage: for an optimizer that is not installed.
    """
    for name, value in vars(recipe).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} is {value}", f"give a number to {flag}")
        if name in _LEAST and value < _LEAST[name]:
            raise UserError(f"{name} is {value}, the least is {_LEAST[name]}", f"{flag} {_LEAST[name]} or more")
        if name in _ABOVE_ZERO and value <= 0:
            raise UserError(f"{name} is {value}, where it must be above 0", f"leave {flag} out for the usual value")
        if name in _BELOW_ONE and not 0 <= value < 1:
            raise UserError(f"{name} is {value}, where it must be at least 0 and below 1", f"leave {flag} out")
        if name in _NAMES and value not in _NAMES[name][1]:
            what, known = _NAMES[name]
            raise UserError(f"unknown {what} {value!r}", f"one of: {', '.join(name for name in known if name)}")
    if recipe.qat in ("scores", "attention") and recipe.attention not in ("auto", "sdpa"):
        raise UserError(
            f"--qat {recipe.qat} rounds within attention, which --attention {recipe.attention} leaves to one kernel",
            "--attention sdpa, or --qat all",
        )
    if recipe.ema and not 0 < recipe.ema < 1:
        raise UserError(f"ema is a decay between 0 and 1, not {recipe.ema}", "for example --ema 0.9999")
    if recipe.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackage("bitsandbytes", "--optimizer adamw8bit")
