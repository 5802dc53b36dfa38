"""Evaluation protocols, as data. A Frechet distance or a CLIP score without its protocol says nothing.

A protocol fixes the prompts, the sampler, the noise, the storage format, the way images are resized, the real
images and the weights of every metric. What is changed by hand becomes a part of its name, which is printed with
every figure: `digits[steps=4,guidance=0]`. Figures of two protocols are never comparable: BK-SDM and DMD2 both report
"FID on COCO 30K" and differ in the resizing, the cropping, the storage format and the network that sees the images.

Sources: BK-SDM (Kim et al. 2023, arXiv 2305.15798, and its published evaluation scripts), DMD2 (Yin et al. 2024,
arXiv 2405.14867, and its published evaluation scripts), EDM (Karras et al. 2022, arXiv 2206.00364, and its published
evaluation script).

In every protocol image i starts from the random numbers of seed `seed + i`, whatever process or batch makes it. The
published runs do not work so: BK-SDM draws from one generator for the whole run, DMD2 seeds each batch. By BK-SDM's own
table of batch sizes, this alone moves the FID by about 0.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from accel.errors import unknown
from accel.sampling import Sampling
from accel.sampling.edm.solvers import IMAGENET64_CHURN, Churn
from accel.sampling.samplers import SAMPLERS


def schedulers() -> dict[str, str]:
    """Every sampler that an evaluation can name -> the class of diffusers that runs it for a pipeline folder.

    PNDM (Liu et al. 2022, arXiv 2202.09778) is what BK-SDM was measured with.
    """
    return {name: sampler.scheduler for name, sampler in SAMPLERS.items()}


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to an image before a network sees it: crop, resize, save as JPEG and read again; in this order.

    Attributes:
        crop: "centre" for the largest square around the centre, or the side in pixels of a square around the centre;
            None for the whole image.
        size: side of the square that the image is resized to, whatever its aspect; None to keep its size.
        filter: a filter of PIL, "bicubic" or "lanczos".
        jpeg: whether it goes through a JPEG file of PIL's default quality (75).
    """

    crop: str | int | None = None
    size: int | None = None
    filter: str = "bicubic"
    jpeg: bool = False


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure: what it is called, the adapter in `metrics.py` that makes it, and what that is given.

    Attributes:
        name: as it is printed.
        kind: "frechet", "inception_score" or "clip_score"; "digits" or "emoji" for the figures of `own_sets.py`.
        extractor: the network: a key of `metrics.EXTRACTORS`, or the open_clip weights.
        prepare: applied to generated and real images alike.
        prefix: what every caption is given in front (CLIP score).
    """

    name: str
    kind: str
    extractor: str = ""
    prepare: Preparation = Preparation()
    prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of measuring.

    Attributes:
        id: its name.
        title: what it is, in a line.
        images: how many images, one to a prompt.
        prompts: "digits" or "emoji" for those of `own_sets.py`, "captions" for a file that the user gives, "classes"
            for random ones of a model that draws images of classes.
        classes: how many of those there are.
        churn: fresh noise of a teacher's heun steps, where images are of classes.
        sampling: how images are drawn.
        own_sampling: whether the constants that a model carries along (`sampler.json`, or a bundle's) come first.
        dtype: that the networks compute in; None for the model's own.
        size: height and width in pixels.
        seed: image i is drawn from seed + i.
        batch: images at once, if nothing else is asked for; it does not change the images.
        format: "png" or "jpeg" (PIL's default quality): how images are stored.
        metrics: what is measured.
        reference_images: how many real images there have to be; 0 where none are needed from the user.
        captions_source, reference_source: where the field gets the captions and the real images.
    """

    id: str
    title: str
    images: int
    prompts: str
    sampling: Sampling
    own_sampling: bool
    size: int
    dtype: str | None = None
    seed: int = 0
    batch: int = 1
    format: str = "png"
    metrics: tuple[Metric, ...] = ()
    reference_images: int = 0
    captions_source: str = ""
    reference_source: str = ""
    classes: int = 0
    churn: Churn | None = None


DIGITS = Protocol(
    id="digits",
    title="500 digits, read by a classifier: prompt accuracy, and Frechet distance of its features to real ones'",
    images=500,
    prompts="digits",
    sampling=Sampling(sampler="dpmpp_2m", steps=25, guidance=3.0),
    own_sampling=True,
    size=64,
    batch=50,
    metrics=(Metric(name="digits", kind="digits"),),
)

EMOJI = Protocol(
    id="emoji",
    title="500 emoji, each looked up among all prompts by an image-text judge; Frechet distance in its features",
    images=500,
    prompts="emoji",
    sampling=Sampling(sampler="dpmpp_2m", steps=25, guidance=2.5),
    own_sampling=True,
    size=64,
    batch=50,
    metrics=(Metric(name="emoji", kind="emoji"),),
)

_VAL2014 = "the 40,504 images of COCO val2014: http://images.cocodataset.org/zips/val2014.zip"

# BK-SDM saves 512 px as .jpg, reads that, resizes with PIL's default filter (bicubic), the aspect of the real images
# not kept, and saves as .jpg again: so all of its figures are of images that were JPEG twice. The two JPEG qualities
# are PIL's default. CLIP sees the 256 px files as well.
_SQUASHED = Preparation(size=256, filter="bicubic", jpeg=True)
BK_SDM_COCO30K = Protocol(
    id="bk-sdm-coco30k",
    title="BK-SDM: 30,000 captions of COCO val2014, 512 px squashed to 256 and stored as JPEG; FID, IS, CLIP",
    images=30_000,
    prompts="captions",
    sampling=Sampling(sampler="pndm", steps=25, guidance=7.5),
    own_sampling=False,
    dtype="fp16",
    size=512,
    seed=1234,
    format="jpeg",
    reference_images=40_504,
    metrics=(
        Metric(name="FID", kind="frechet", extractor="pytorch-fid", prepare=_SQUASHED),
        Metric(name="IS", kind="inception_score", extractor="torch-fidelity", prepare=_SQUASHED),
        Metric(name="CLIP", kind="clip_score", extractor="laion2b_s34b_b88k", prepare=_SQUASHED),
    ),
    captions_source="mscoco_val2014_30k/metadata.csv, which scripts/get_mscoco_files.sh of Nota-NetsPresso/BK-SDM gets",
    reference_source=f"{_VAL2014} (or real_im256.npz, its statistics, from the same script as the captions)",
)

# DMD2 prepares real images as it does generated ones, and keeps generated ones in memory: PNG changes nothing. It
# cuts 8-bit values off where this program rounds them. Its own one-step SD1.5 model is run at t = 999; a
# student says in its sampler.json how it is run. Which 10,000 captions and images SDXL is measured with is not
# published: here the first 10,000 captions of the file, and whatever 10,000 images the user gives.
_SQUARE_256 = Preparation(crop="centre", size=256, filter="lanczos")
_CLIP_DMD2 = Metric(
    name="CLIP", kind="clip_score", extractor="laion2b_s12b_b42k", prepare=_SQUARE_256, prefix="A photo depicts "
)
_CAPTIONS_DMD2 = "main/coco_eval/captions_coco14_test.txt of tianweiy/DMD2: 30,000 lines, one caption to a line"

DMD2_SD15_COCO30K = Protocol(
    id="dmd2-sd15-coco30k",
    title="DMD2, SD1.5: 30,000 COCO captions, 512 px centre-cropped, LANCZOS to 256, clean-fid; CLIP with a prefix",
    images=30_000,
    prompts="captions",
    sampling=Sampling(sampler="dmd2", timesteps=(999,), guidance=0.0),
    own_sampling=True,
    dtype="fp32",
    size=512,
    seed=0,
    batch=10,
    reference_images=40_504,
    metrics=(Metric(name="FID", kind="frechet", extractor="clean-fid", prepare=_SQUARE_256), _CLIP_DMD2),
    captions_source=_CAPTIONS_DMD2,
    reference_source=_VAL2014,
)

DMD2_SDXL_COCO10K = Protocol(
    id="dmd2-sdxl-coco10k",
    title="DMD2, SDXL: 10,000 COCO captions, FID at 512, patch-FID of the middle 299 px, clean-fid; CLIP with a prefix",
    images=10_000,
    prompts="captions",
    own_sampling=True,
    sampling=Sampling(sampler="dmd2", timesteps=(999, 749, 499, 249), guidance=0.0),
    dtype="fp32",
    size=1024,
    seed=0,
    batch=4,
    reference_images=10_000,
    metrics=(
        Metric(
            name="FID",
            kind="frechet",
            extractor="clean-fid",
            prepare=Preparation(crop="centre", size=512, filter="lanczos"),
        ),
        Metric(name="patch-FID", kind="frechet", extractor="clean-fid", prepare=Preparation(crop=299)),
        _CLIP_DMD2,
    ),
    captions_source=_CAPTIONS_DMD2,
    reference_source="10,000 real COCO images",
)

# EDM draws the class of every image uniformly, from the generator of its seed, after its noise; here all come from one
# generator, so that they do not depend on a network's size. DMD2 takes the classes in turn, 0 to 999, fifty times. Both
# hold the 50,000 images as 8-bit values, and neither resizes them: Inception does, to 299 px, as TensorFlow did.
# A figure of EDM is the least of three such runs.
IMAGENET64 = Protocol(
    id="imagenet64",
    title="EDM, ImageNet 64 px: 50,000 images of random classes, FID by EDM's Inception and its published statistics",
    images=50_000,
    prompts="classes",
    classes=1000,
    sampling=Sampling(sampler="heun", steps=256, guidance=0.0),
    churn=IMAGENET64_CHURN,
    own_sampling=True,
    dtype="fp32",
    size=64,
    seed=0,
    batch=50,
    metrics=(Metric(name="FID", kind="frechet", extractor="edm"),),
    reference_images=1_281_167,
    reference_source="imagenet-64x64.npz, their statistics: https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/",
)

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.id: protocol
        for protocol in (DIGITS, EMOJI, BK_SDM_COCO30K, DMD2_SD15_COCO30K, DMD2_SDXL_COCO10K, IMAGENET64)
    }
)


def protocol(name: str) -> Protocol:
    """The protocol of that id.

    Raises:
        UserError: when there is none.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def overridden(
    base: Sampling, sampler: str | None = None, steps: int | None = None, guidance: float | None = None
) -> Sampling:
    """`base` with the given values in its place. Another sampler uses its own timesteps, as many as before.

    Raises:
        UserError: for an unknown sampler, or numbers out of range.
    """
    if sampler is not None and sampler not in schedulers():
        raise unknown("sampler", sampler, schedulers())
    used = replace(base, sampler=sampler or base.sampler, guidance=base.guidance if guidance is None else guidance)
    if used.sampler == base.sampler and steps in (None, base.count):
        return used
    return replace(used, steps=base.count if steps is None else steps, timesteps=None)


def full_id(name: str, changes: Mapping[str, Any]) -> str:
    """The id that is printed with a figure: `name`, and in brackets what differs from it."""
    if not changes:
        return name
    shown = (
        f"{key}={value:g}" if isinstance(value, (int, float)) and abs(value) < 1e5 else f"{key}={value}"
        for key, value in changes.items()
    )
    return f"{name}[{','.join(shown)}]"


def sampling_record(used: Sampling) -> dict[str, Any]:
    """Sampling constants by the names of the flags, as results keep them."""
    timesteps = None if used.timesteps is None else list(used.timesteps)
    return {"sampler": used.sampler, "guidance": float(used.guidance), "steps": used.steps, "timesteps": timesteps}


def sampling_changes(base: Sampling, used: Sampling) -> dict[str, Any]:
    """What of `used` differs from `base`, by the names of the flags."""
    changes: dict[str, Any] = {}
    if used.sampler != base.sampler:
        changes["sampler"] = used.sampler
    if used.count != base.count:
        changes["steps"] = used.count
    if used.guidance != base.guidance:
        changes["guidance"] = used.guidance
    return changes
