"""The figures' arithmetic against scipy, transformers and closed forms; the preparation of images against PIL."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from accel.distill.evaluation import metrics
from accel.distill.evaluation.protocols import PROTOCOLS, Metric, Preparation
from accel.errors import MissingPackage, UserError


def features(seed: int, count: int, width: int, spread: float = 1.0) -> np.ndarray:
    """Correlated normal features."""
    source = np.random.default_rng(seed)
    return source.normal(size=(count, width)) @ source.normal(size=(width, width)) * spread + source.normal(size=width)


def image(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


# ------------------------------------------------------------------------------------------------------------- frechet


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12), st.floats(0.1, 3))
def test_frechet_distance_is_that_of_scipys_matrix_root(seed, width, spread):
    first, second = features(seed, 60, width), features(seed + 1, 45, width, spread)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(one @ two).real
    wanted = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(one + two - 2 * root)
    assert metrics.frechet_distance(first, second) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40))
def test_frechet_distance_is_symmetric_not_negative_and_zero_to_itself_even_when_singular(seed, count):
    """Fewer features than dimensions leave the covariance singular, where a matrix root of the product goes astray."""
    first, second = features(seed, count, 20), features(seed + 1, count, 20)
    scale = np.trace(np.cov(first, rowvar=False)) + np.trace(np.cov(second, rowvar=False))
    there, back = metrics.frechet_distance(first, second), metrics.frechet_distance(second, first)
    assert there == pytest.approx(back, abs=1e-6 * scale)
    assert there > -1e-6 * scale
    assert abs(metrics.frechet_distance(first, first)) < 1e-6 * scale


def test_single_precision_features_are_summed_in_double():
    """30,000 features near 1000: a mean in single precision would be off by more than their distance."""
    sample = (1000 + np.random.default_rng(0).normal(size=(30_000, 3))).astype(np.float32)
    shifted = (sample.astype(np.float64) + 0.01).astype(np.float64)
    wanted = metrics.frechet_distance(sample.astype(np.float64), shifted)
    assert metrics.frechet_distance(sample, shifted) == pytest.approx(wanted, rel=1e-9)


def test_one_image_has_no_distance():
    with pytest.raises(UserError, match="1 images have no covariance"):
        metrics.frechet_distance(np.zeros((1, 4)), np.zeros((5, 4)))


# ----------------------------------------------------------------------------------------------------- inception score


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(20, 90), st.integers(2, 30), st.integers(1, 10))
def test_inception_score_is_that_of_scipys_entropies(seed, count, classes, splits):
    logits = np.random.default_rng(seed).normal(size=(count, classes)) * 4
    value, deviation = metrics.inception_score(logits, splits, seed=None)
    probabilities = scipy.special.softmax(logits, axis=1)
    scores = []
    for part in range(splits):
        rows = probabilities[part * count // splits : (part + 1) * count // splits]
        scores.append(np.exp(np.mean([scipy.stats.entropy(row, rows.mean(0)) for row in rows])))
    assert value == pytest.approx(np.mean(scores), rel=1e-9)
    assert deviation == pytest.approx(np.std(scores), rel=1e-6, abs=1e-9)


def test_inception_score_of_sure_and_even_guesses_is_the_number_of_classes_and_of_one_class_is_one():
    sure = 1e4 * np.tile(np.eye(5), (20, 1))
    assert metrics.inception_score(sure, 1)[0] == pytest.approx(5)
    assert metrics.inception_score(1e4 * np.eye(5)[np.zeros(100, int)], 4) == pytest.approx((1, 0))


def test_inception_score_shuffles_before_it_splits():
    """Images sorted by class would look alike within every part."""
    sorted_by_class = 1e4 * np.repeat(np.eye(10), 100, axis=0)
    assert metrics.inception_score(sorted_by_class, 10, seed=None)[0] == pytest.approx(1)
    assert metrics.inception_score(sorted_by_class, 10)[0] > 9


def test_inception_score_needs_an_image_to_a_part():
    with pytest.raises(UserError, match="3 images are less than the 10 parts"):
        metrics.inception_score(np.zeros((3, 5)))


# ---------------------------------------------------------------------------------------------------------- clip score


def test_clip_score_is_the_cosine_that_transformers_clip_computes():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = CLIPModel(
        CLIPConfig(
            text_config=dict(small, vocab_size=50, max_position_embeddings=8, eos_token_id=49, bos_token_id=48),
            vision_config=dict(small, image_size=16, patch_size=8),
            projection_dim=24,
        )
    ).eval()
    ids, pixels = torch.randint(0, 48, (5, 8)), torch.randn(5, 3, 16, 16)
    ids[:, -1] = 49
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    wanted = (out.logits_per_image.diag() / model.logit_scale.exp()).mean().item()
    # Embeddings of any length: the score is of their directions.
    lengths = np.random.default_rng(0).uniform(0.1, 10, (5, 1))
    assert metrics.clip_score(out.image_embeds.numpy() * lengths, out.text_embeds.numpy() / lengths) == (
        pytest.approx(wanted, abs=1e-6)
    )


def test_clip_score_refuses_captions_that_do_not_match():
    with pytest.raises(ValueError, match="caption"):
        metrics.clip_score(np.ones((3, 4)), np.ones((2, 4)))


# ------------------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_image_becomes_rgb_of_one_size(name, mode):
    for metric in PROTOCOLS[name].metrics:
        seen = metrics.prepare(image(0, 640, 427, mode), metric.prepare)
        side = metric.prepare.size or metric.prepare.crop
        assert seen.mode == "RGB" and seen.size == ((side, side) if side else (640, 427))


def test_bk_sdm_squashes_with_pils_default_filter_and_saves_a_jpeg():
    source = image(0, 90, 60)
    file = io.BytesIO()
    source.resize((256, 256)).save(file, "JPEG")
    wanted = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(np.asarray(metrics.prepare(source, PROTOCOLS["bk-sdm-coco30k"].metrics[0].prepare)), wanted)


@pytest.mark.parametrize(("width", "height"), [(90, 60), (61, 90), (60, 60), (91, 60)])
def test_dmd2_crops_the_middle_and_resizes_with_lanczos(width, height):
    source = image(1, width, height)
    side = min(width, height)
    left, top = round((width - side) / 2), round((height - side) / 2)
    square = Image.fromarray(np.asarray(source)[top : top + side, left : left + side])
    wanted = np.asarray(square.resize((256, 256), Image.Resampling.LANCZOS))
    seen = metrics.prepare(source, PROTOCOLS["dmd2-sd15-coco30k"].metrics[0].prepare)
    assert np.array_equal(np.asarray(seen), wanted)


def test_a_patch_is_cut_and_not_resized_and_an_image_that_is_smaller_stays_whole():
    source = image(2, 400, 310)
    assert np.array_equal(np.asarray(metrics.prepare(source, Preparation(crop=299))), np.asarray(source)[6:305, 50:349])
    assert metrics.prepare(image(2, 200, 310), Preparation(crop=299)).size == (200, 310)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    image(0, 8, 8).save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(UserError, match=name):
            metrics.read_image(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.fixture
def coarse(monkeypatch):
    """A network that sees the mean colour of each image, in the place of one that has to be downloaded."""
    shapes = []

    def see(images):
        shapes.append([image.size for image in images])
        return np.stack([np.asarray(image, np.float64).mean((0, 1)) / 255 for image in images])

    monkeypatch.setattr(metrics, "EXTRACTORS", {"coarse": (lambda device: see, "numpy", "numpy")})
    return shapes


def test_a_distance_is_measured_in_batches_on_prepared_images(coarse, tmp_path):
    files = {"made": [], "real": []}
    for kind, size in (("made", 64), ("real", 48)):
        for index in range(40):
            files[kind].append(tmp_path / f"{kind}{index}.png")
            image(index, size, size + (kind == "real")).save(files[kind][-1])
    metric = Metric(name="FID", kind="frechet", extractor="coarse", prepare=Preparation(size=32))
    shares = []
    found = metrics.measure(metric, files["made"], [], files["real"], "cpu", shares.append)
    assert {size for batch in coarse for size in batch} == {(32, 32)} and len(coarse) == 4
    assert shares == sorted(shares) and shares[-1] == 1
    means = {
        kind: np.stack(
            [np.asarray(metrics.prepare(Image.open(path), metric.prepare), float).mean((0, 1)) / 255 for path in paths]
        )
        for kind, paths in files.items()
    }
    assert found["value"] == pytest.approx(metrics.frechet_distance(means["made"], means["real"]))
    known = metrics.statistics(means["real"])
    assert metrics.measure(metric, files["made"], [], known, "cpu")["value"] == pytest.approx(found["value"])


def test_a_clip_score_reads_prefixed_captions_in_the_order_of_the_images(monkeypatch, tmp_path):
    files = []
    for index in range(70):
        files.append(tmp_path / f"{index}.png")
        Image.new("RGB", (4, 4), (index, 0, 0)).save(files[-1])
    read_texts = []

    def by_number(numbers):
        return np.eye(70)[list(numbers)]

    def read(texts):
        read_texts.extend(texts)
        return by_number(int(text.rpartition(" ")[2]) for text in texts)

    monkeypatch.setattr(
        metrics,
        "open_clip",
        lambda weights, device: (lambda images: by_number(image.getpixel((0, 0))[0] for image in images), read),
    )
    monkeypatch.setattr(metrics, "find_spec", lambda name: object())
    metric = Metric(name="CLIP", kind="clip_score", extractor="w", prefix="A photo depicts ")
    captions = [f"thing {index}" for index in range(70)]
    assert metrics.measure(metric, files, captions, [], "cpu") == {"value": 1.0}
    assert read_texts == [f"A photo depicts thing {index}" for index in range(70)]
    assert metrics.measure(metric, files, captions[::-1], [], "cpu")["value"] < 0.1


@pytest.mark.parametrize("name", [name for name, found in PROTOCOLS.items() if found.reference_images])
def test_a_missing_library_is_named_with_the_extra(name, monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda module: None)
    with pytest.raises(MissingPackage, match="pytorch-fid|clean-fid") as error:
        metrics.require(PROTOCOLS[name].metrics)
    assert error.value.fix == 'pip install "accel-diffusion[evaluate]"'


def test_every_library_is_in_the_extra():
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    extra = next(line for line in text.splitlines() if line.startswith("evaluate ="))
    for found in PROTOCOLS.values():
        for package in metrics.packages(found.metrics):
            assert f'"{package}>=' in extra, package


@pytest.mark.parametrize("error", [OSError("no network"), RuntimeError("no such tag\nmore"), ImportError("no C")])
def test_weights_that_cannot_be_had_are_a_message_and_not_a_traceback(error, monkeypatch):
    def fail(device):
        raise error

    monkeypatch.setattr(metrics, "EXTRACTORS", {"x": (fail, "numpy", "numpy")})
    with pytest.raises(UserError, match=str(error).splitlines()[0]) as shown:
        metrics.measure(Metric(name="FID", kind="frechet", extractor="x"), [], [], [], "cpu")
    assert "images are kept" in shown.value.fix


def test_the_adapters_give_the_libraries_what_they_take(monkeypatch):
    """The libraries need torchvision and downloads, so their interfaces stand in: names, shapes, ranges, dtypes."""
    given = {}

    class Inception(torch.nn.Module):
        BLOCK_INDEX_BY_DIM = {2048: 3}

        def __init__(self, blocks):
            super().__init__()
            given["blocks"] = blocks

        def forward(self, x):
            given["pytorch-fid"] = x
            return [x.new_ones(len(x), 2048, 1, 1)]

    class Logits(torch.nn.Module):
        def __init__(self, name, features):
            super().__init__()
            given["features"] = features

        def forward(self, x):
            given["torch-fidelity"] = x
            return (torch.ones(len(x), 1008),)

    def builder(mode, device, use_dataparallel):
        assert not use_dataparallel

        def model(x):
            given[{"clean": "clean-fid", "legacy_tensorflow": "edm"}[mode]] = x
            return torch.ones(len(x), 2048)

        return model

    def resizer(mode):
        return lambda pixels: np.zeros((299, 299, 3), np.float32) + pixels[0, 0]

    modules = {
        "pytorch_fid.inception": SimpleNamespace(InceptionV3=Inception),
        "torch_fidelity": SimpleNamespace(FeatureExtractorInceptionV3=Logits),
        "cleanfid.features": SimpleNamespace(build_feature_extractor=builder),
        "cleanfid.resize": SimpleNamespace(build_resizer=resizer),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, name.partition(".")[0], sys.modules.get(name.partition(".")[0], module))
    images = [Image.new("RGB", (20, 10), (255, 0, 51)) for _ in range(3)]
    widths = {"pytorch-fid": 2048, "clean-fid": 2048, "torch-fidelity": 1008, "edm": 2048}
    for name, (load, _, _) in metrics.EXTRACTORS.items():
        with torch.no_grad():
            assert load("cpu")(images).shape == (3, widths[name])
    assert given["blocks"] == [3] and given["features"] == ["logits_unbiased"]
    assert given["pytorch-fid"].shape == (3, 3, 10, 20) and given["pytorch-fid"][0, :, 0, 0].tolist() == (
        pytest.approx([1, 0, 0.2])
    )
    assert given["torch-fidelity"].dtype == torch.uint8 and given["torch-fidelity"].shape == (3, 3, 10, 20)
    # EDM's network takes 8-bit values as they are, and resizes inside.
    assert given["edm"].dtype == torch.uint8 and given["edm"].shape == (3, 3, 10, 20)
    assert given["clean-fid"].shape == (3, 3, 299, 299) and given["clean-fid"][0, :, 0, 0].tolist() == [255, 0, 51]
