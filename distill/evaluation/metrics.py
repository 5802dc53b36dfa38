"""Metrics: their arithmetic, and thin adapters to the networks that compute features of images.

Arithmetic (`frechet_distance`, `inception_score`, `clip_score`) takes features and knows no network. The networks come
from the libraries that the field's published figures come from (extra `evaluate`): pytorch-fid, clean-fid,
torch-fidelity and open_clip. Each of them downloads its weights on first use.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image

from accel.errors import MissingPackage, UserError
from accel.files import read_bytes
from accel.images import decoded

from .protocols import Metric, Preparation

# --------------------------------------------------------------------------------------------------------- arithmetic

Statistics = tuple[np.ndarray, np.ndarray]


def statistics(features: np.ndarray) -> Statistics:
    """Mean [d] and covariance [d, d] of features [n, d], in double precision.

    Raises:
        UserError: for fewer than two features, which have no covariance.
    """
    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise UserError(f"{len(features)} images have no covariance", "use at least two, and thousands for a figure")
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance of the normal distributions fitted to two sets of features [n, d] and [m, d]."""
    return frechet_of(statistics(first), statistics(second))


def frechet_of(first: Statistics, second: Statistics) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500)."""
    (mean, covariance), (other_mean, other) = first, second
    root = _square_root(covariance)
    # S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), and a trace is the sum of the eigenvalues.
    crossed = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(min=0)).sum()
    return float(((mean - other_mean) ** 2).sum() + (root @ root).trace() + other.trace() - 2 * crossed)


def _square_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def inception_score(logits: np.ndarray, splits: int = 10, seed: int | None = 2020) -> tuple[float, float]:
    """exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016, arXiv 1606.03498): mean and deviation over the splits.

    Args:
        logits: [n, classes], before the softmax.
        splits: parts that are scored apart.
        seed: of the permutation before the split (numpy's RandomState; 2020 and 10 splits are torch-fidelity's); None
            for none.

    Raises:
        UserError: for fewer logits than splits.
    """
    count = len(logits)
    if count < splits:
        raise UserError(f"{count} images are less than the {splits} parts of an inception score", "use more images")
    order = np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)
    log_p = torch.log_softmax(torch.as_tensor(np.asarray(logits)).double()[torch.from_numpy(order)], 1)
    scores = []
    for part in range(splits):
        rows = log_p[part * count // splits : (part + 1) * count // splits]
        marginal = rows.exp().mean(0, keepdim=True)
        # 0 log 0 is 0: softmax underflows to exact zeros when a network is very sure.
        divergence = torch.where(marginal > 0, rows.exp() * (rows - marginal.log()), 0.0).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def clip_score(images: np.ndarray, texts: np.ndarray) -> float:
    """Mean cosine between the embeddings [n, d] of images and of their captions (Hessel et al. 2021, arXiv
    2104.08718, without its factor 2.5 and without its cut at 0, as BK-SDM and DMD2 report it)."""
    images, texts = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    if images.shape != texts.shape:
        raise ValueError(f"{images.shape} image embeddings and {texts.shape} caption embeddings")
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return float(((images * texts).sum(1) / lengths).mean())


# ----------------------------------------------------------------------------------------------------------- images

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def prepare(image: Image.Image, how: Preparation) -> Image.Image:
    """An image as the protocol wants the network to see it, RGB."""
    if image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    if how.crop is not None:
        image = _crop(image, min(image.size) if how.crop == "centre" else int(how.crop))
    if how.size is not None:
        image = image.resize((how.size, how.size), FILTERS[how.filter])
    if how.jpeg:
        file = io.BytesIO()
        image.save(file, "JPEG")
        image = Image.open(file)
    return image.convert("RGB")


def _crop(image: Image.Image, side: int) -> Image.Image:
    """The square of that side around the centre; an image that is smaller either way stays whole."""
    width, height = image.size
    if side > min(width, height):
        return image
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


# ----------------------------------------------------------------------------------------------------------- adapters

Extractor = Callable[[Sequence[Image.Image]], np.ndarray]


def _pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """uint8 [n, 3, h, w]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def pytorch_fid(device: str) -> Extractor:
    """Inception-v3's 2,048 pooled features by pytorch-fid, which resizes to 299 px inside, bilinearly, in torch."""
    from pytorch_fid.inception import InceptionV3

    model = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).to(device).eval()
    return lambda images: model(_pixels(images).to(device).float() / 255)[0].flatten(1).cpu().numpy()


def clean_fid(device: str) -> Extractor:
    """Inception-v3's 2,048 pooled features by clean-fid, which resizes to 299 px in float with PIL's bicubic filter.

    (Parmar et al. 2022, arXiv 2104.11222.)
    """
    from cleanfid.features import build_feature_extractor
    from cleanfid.resize import build_resizer

    model = build_feature_extractor("clean", torch.device(device), use_dataparallel=False)
    resize = build_resizer("clean")

    def features(images: Sequence[Image.Image]) -> np.ndarray:
        resized = np.stack([resize(np.asarray(image)) for image in images])
        return model(torch.from_numpy(resized).permute(0, 3, 1, 2).to(device)).cpu().numpy()

    return features


def edm_inception(device: str) -> Extractor:
    """Inception-v3's 2,048 pooled features as EDM and DMD2 measure ImageNet 64 x 64: the network that NVIDIA publishes,
    which takes 8-bit values and resizes to 299 px inside, as TensorFlow's did; by way of clean-fid, which fetches it.
    """
    from cleanfid.features import build_feature_extractor

    model = build_feature_extractor("legacy_tensorflow", torch.device(device), use_dataparallel=False)
    return lambda images: model(_pixels(images).to(device)).flatten(1).cpu().numpy()


def torch_fidelity(device: str) -> Extractor:
    """Inception-v3's 1,008 logits, without the bias, by torch-fidelity: what its inception score is made of."""
    from torch_fidelity import FeatureExtractorInceptionV3

    model = FeatureExtractorInceptionV3("inception-v3-compat", ["logits_unbiased"]).to(device)
    return lambda images: model(_pixels(images).to(device))[0].cpu().numpy()


# name -> (adapter, the module it needs, the package that brings it)
EXTRACTORS: Mapping[str, tuple[Callable[[str], Extractor], str, str]] = MappingProxyType(
    {
        "pytorch-fid": (pytorch_fid, "pytorch_fid", "pytorch-fid"),
        "clean-fid": (clean_fid, "cleanfid", "clean-fid"),
        "edm": (edm_inception, "cleanfid", "clean-fid"),
        "torch-fidelity": (torch_fidelity, "torch_fidelity", "torch-fidelity"),
    }
)
CLIP = ("open_clip", "open_clip_torch")


def open_clip(weights: str, device: str) -> tuple[Extractor, Callable[[Sequence[str]], np.ndarray]]:
    """Embeddings [n, 1024] of images and of captions by open_clip's ViT-g-14 with `weights`, not yet normalised."""
    from open_clip import create_model_and_transforms, get_tokenizer

    model, _, preprocess = create_model_and_transforms("ViT-g-14", pretrained=weights, device=device)
    model.eval()
    tokenizer = get_tokenizer("ViT-g-14")

    def see(images: Sequence[Image.Image]) -> np.ndarray:
        return model.encode_image(torch.stack([preprocess(image) for image in images]).to(device)).cpu().numpy()

    def read(texts: Sequence[str]) -> np.ndarray:
        return model.encode_text(tokenizer(list(texts)).to(device)).cpu().numpy()

    return see, read


def require(metrics: Sequence[Metric]) -> None:
    """Fail before hours of work where a library is missing.

    Raises:
        MissingPackage: naming the extra that brings it.
    """
    for metric in metrics:
        for module, package in _needed(metric):
            if find_spec(module) is None:
                raise MissingPackage(package, f"the figure {metric.name}", extra="evaluate")


def packages(metrics: Sequence[Metric]) -> list[str]:
    """The packages that these metrics' networks come from."""
    return sorted({package for metric in metrics for _, package in _needed(metric)})


def _needed(metric: Metric) -> list[tuple[str, str]]:
    if metric.kind == "clip_score":
        return [CLIP]
    # The digits' real images come with scikit-learn, the judge of emoji with a folder.
    own = {"digits": [("sklearn", "scikit-learn")], "emoji": []}
    return own[metric.kind] if metric.kind in own else [EXTRACTORS[metric.extractor][1:]]


Progress = Callable[[float], None]


@torch.no_grad()
def features_of(
    paths: Sequence[Path], how: Preparation, extractor: Extractor, batch: int = 32, progress: Progress = lambda _: None
) -> np.ndarray:
    """Features [n, d] of image files, prepared, in batches.

    Raises:
        UserError: naming a file that is not an image.
    """
    found = []
    for start in range(0, len(paths), batch):
        found.append(extractor([prepare(read_image(path), how) for path in paths[start : start + batch]]))
        progress(min(1.0, (start + batch) / len(paths)))
    return np.concatenate(found)


def read_image(path: Path) -> Image.Image:
    """An image file, read to its end.

    Raises:
        UserError: when it cannot be.
    """
    try:
        return decoded(read_bytes(path, "the image", 1 << 28), str(path))
    except UserError as error:
        raise UserError(error.message, "remove it or get it again") from None


def measure(
    metric: Metric,
    images: Sequence[Path],
    captions: Sequence[str],
    reference: Sequence[Path] | Statistics,
    device: str,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """One figure of images: `value`, and `deviation` over its parts where it has some.

    Args:
        reference: real images, or their mean and covariance.
        device: of the network, such as "cuda:0".
    """
    require([metric])
    if metric.kind == "clip_score":
        see, read = _loaded(metric, lambda: open_clip(metric.extractor, device))
        features = features_of(images, metric.prepare, see, progress=progress)
        texts = [metric.prefix + caption for caption in captions]
        with torch.no_grad():
            embedded = np.concatenate([read(texts[start : start + 64]) for start in range(0, len(texts), 64)])
        return {"value": clip_score(features, embedded)}
    extractor = _loaded(metric, lambda: EXTRACTORS[metric.extractor][0](device))
    if metric.kind == "inception_score":
        value, deviation = inception_score(features_of(images, metric.prepare, extractor, progress=progress))
        return {"value": value, "deviation": deviation}
    if metric.kind != "frechet":
        raise ValueError(f"no metric of kind {metric.kind!r}")
    made = statistics(features_of(images, metric.prepare, extractor, progress=lambda share: progress(share / 2)))
    if not isinstance(reference, tuple):
        # One at a time where images keep their sizes: cropping a smaller one than the crop leaves it as it is.
        batch = 32 if metric.prepare.size else 1
        real = features_of(reference, metric.prepare, extractor, batch, lambda share: progress(0.5 + share / 2))
        reference = statistics(real)
    return {"value": frechet_of(made, reference)}


def _loaded(metric: Metric, load: Callable[[], Any]) -> Any:
    """A network of a library, which may have to be downloaded: hours of images have been made by now."""
    try:
        return load()
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise UserError(
            f"the network of {metric.name} cannot be loaded: {reason}",
            "it downloads its weights on first use; the images are kept, so run the same again with a network",
        ) from error
