"""The digits: data, words, judge, the model that ships, and the command that makes it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.assets import DIGITS
from accel.distill.digits import train as train_digits
from accel.distill.evaluation import digits as digits_quality
from accel.distill.from_nothing import fit
from accel.distill.from_nothing import parts as from_nothing
from accel.distill.from_nothing.tokenizer import token_ids, write_tokenizer
from accel.distill.sources import digits
from accel.models.topology import topology

TEACHER = DIGITS / "teacher"
TINY = train_digits.DigitsSettings(
    steps=2, batch=4, text_steps=2, text_batch=4, vae_steps=2, vae_batch=4, classifier_steps=2, classifier_batch=4
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), digits.words())


@pytest.fixture(scope="module")
def classifier():
    return digits_quality.load_classifier()


# -------------------------------------------------------------------------------------------------------------- data


def test_split_is_disjoint_complete_and_stratified():
    _, labels = digits.raw()
    train, held_out = digits.split(labels)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(1797))
    assert torch.bincount(labels[held_out]).tolist() == [digits.HELD_OUT_PER_DIGIT] * 10


def test_images_are_rgb_white_on_black():
    images, labels = digits.dataset("held-out")
    assert images.shape == (500, 3, 64, 64) and len(labels) == 500
    assert images.min() == -1 and images.max() == 1
    frame = torch.cat([images[..., 0], images[..., -1], images[..., 0, :], images[..., -1, :]], -1)
    assert frame.max() < 0, "no digit touches the border"


# ------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("digit", range(10))
def test_prompts_name_their_digit_and_survive_the_tokenizer(digit, tokenizer):
    for prompt in digits.prompts(digit):
        named = set(prompt.split()) & {*digits.WORDS, *map(str, range(10))}
        assert len(named) == 1 and named <= {digits.WORDS[digit], str(digit)}
        ids = tokenizer(prompt).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        inner = ids[1:-1]
        assert tokenizer.unk_token_id not in inner
        assert len(inner) == len(prompt.split()), "one token to a word"
        assert tokenizer.decode(inner) == prompt


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30))
def test_any_text_has_tokens(text):
    tokenizer = _shipped_tokenizer()
    ids = token_ids(tokenizer, [text.replace("<|", "")])
    assert ids.shape == (1, 77) and int(ids.max()) < len(tokenizer)


_CACHE = {}


def _shipped_tokenizer():
    from transformers import CLIPTokenizer

    return _CACHE.setdefault("tokenizer", CLIPTokenizer.from_pretrained(TEACHER / "tokenizer"))


def test_tokenizer_is_the_same_after_saving_and_as_shipped(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    from transformers import CLIPTokenizer

    again = CLIPTokenizer.from_pretrained(tmp_path)
    texts = [prompt for digit in range(10) for prompt in digits.prompts(digit)] + ["", "Something Else, 42!"]
    wanted = token_ids(tokenizer, texts)
    for other in (again, _shipped_tokenizer()):
        assert type(other).__name__ == "CLIPTokenizer" and other.model_max_length == 77
        assert other.get_vocab() == tokenizer.get_vocab()
        assert torch.equal(token_ids(other, texts), wanted)
    assert (wanted[-2, 1:] == tokenizer.pad_token_id).all()


# ----------------------------------------------------------------------------------------------------------- quality


def test_classifier_reads_held_out_digits(classifier):
    images, labels = digits.dataset("held-out")
    assert digits_quality.prompt_accuracy(images, labels, classifier) >= 0.97
    assert digits_quality.prompt_accuracy(images, (labels + 1) % 10, classifier) <= 0.03


def test_frechet_distance_is_zero_to_itself_and_grows_with_noise(classifier):
    images, _ = digits.dataset("held-out")
    real = digits_quality.features(classifier, images)
    assert abs(digits_quality.frechet_distance(real, real)) < 1e-6 * np.trace(np.cov(real, rowvar=False))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        digits_quality.frechet_distance(digits_quality.features(classifier, images + level * noise), real)
        for level in (0.25, 0.5, 1.0)
    ]
    assert digits_quality.frechet_floor(classifier) < distances[-1]
    assert 0 < distances[0] < distances[1] < distances[2]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 5), st.floats(0.2, 5))
def test_frechet_distance_of_independent_normals_is_the_closed_form(seed, offset, spread):
    """Equal, whitened samples moved by d and stretched by s: d^2 per dimension, and (s - 1)^2 per dimension."""
    sample = np.random.default_rng(seed).normal(size=(200, 5))
    sample -= sample.mean(0)
    sample = sample @ np.linalg.inv(np.linalg.cholesky(np.cov(sample, rowvar=False))).T
    distance = digits_quality.frechet_distance(sample, spread * sample + offset)
    assert distance == pytest.approx(5 * (offset**2 + (spread - 1) ** 2), abs=1e-6)


# ---------------------------------------------------------------------------------------------------- shipped teacher


def test_shipped_pipeline_draws_what_it_is_asked(classifier):
    pipeline = from_nothing.load(TEACHER)
    assert pipeline.safety_checker is None and pipeline.unet.dtype == torch.float32
    assert pipeline.text_encoder.dtype == torch.float32
    guidance = json.loads((TEACHER / "quality.json").read_text())["guidance"]
    texts, wanted = zip(*digits.prompt_set(2), strict=True)
    images = digits_quality.generate(pipeline, list(texts), guidance)
    assert digits_quality.prompt_accuracy(images, torch.tensor(wanted), classifier) >= 0.9


def test_shipped_unet_is_the_topology_of_sd15_but_for_its_widths():
    shipped = json.loads((TEACHER / "unet" / "config.json").read_text())
    narrow = {"block_out_channels", "sample_size", "cross_attention_dim", "attention_head_dim"}
    wanted = {key: value for key, value in topology("sd15").config.items() if key not in narrow}
    assert len(shipped["block_out_channels"]) == 4
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in shipped.items()}.items() >= (
        wanted.items()
    )
    assert shipped["transformer_layers_per_block"] == 1 and not shipped["use_linear_projection"]


def test_shipped_folder_is_small_safe_and_measured():
    files = [path for path in TEACHER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}, "no pickle"
    quality = json.loads((TEACHER / "quality.json").read_text())
    assert quality["images"] >= 500 and quality["prompt_accuracy"] >= 0.97
    index = json.loads((TEACHER / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False


# ---------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def few_images(monkeypatch):
    """A hundred images of either part: encoding all of them would take most of a test's time."""
    whole = digits.dataset
    monkeypatch.setattr(digits, "dataset", lambda part: tuple(tensor[:100] for tensor in whole(part)))


def _weights(pipeline, classifier):
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.vae, classifier)
    return [tensor for part in parts for tensor in part.state_dict().values()]


def test_killed_run_resumes_to_the_same_weights(few_images, tmp_path, monkeypatch):
    uninterrupted = train_digits.train(TINY, tmp_path / "whole", every=1)
    save_checkpoint = fit.save_checkpoint

    def die_in_the_unet(path, state):
        save_checkpoint(path, state)
        if path.stem == "unet" and state["step"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit, "save_checkpoint", die_in_the_unet)
        train_digits.train(TINY, tmp_path / "killed", every=1)
    resumed = train_digits.train(TINY, tmp_path / "killed", every=1)
    for one, other in zip(_weights(*uninterrupted[:2]), _weights(*resumed[:2]), strict=True):
        assert torch.equal(one, other)
    assert uninterrupted[0].vae.config.scaling_factor == resumed[0].vae.config.scaling_factor


def test_command_writes_a_pipeline_and_its_card(few_images, tmp_path):
    out = tmp_path / "out"
    options = (
        "--steps 2 --batch 4 --text-steps 2 --text-batch 4 --vae-steps 2 --vae-batch 4 --classifier-steps 2 "
        "--classifier-batch 4 --guidance 3 --choose-per-digit 1 --per-digit 1 --sample-steps 2"
    )
    assert train_digits.main(["--out", str(out), "--run", str(tmp_path / "run"), *options.split()]) == 0
    quality = json.loads((out / "teacher" / "quality.json").read_text())
    assert quality["images"] == 10 and quality["guidance"] == 3
    assert json.loads((out / "teacher" / "sampler.json").read_text()) == {"name": "dpmpp_2m", "steps": 2, "guidance": 3}
    assert "--batch 4" in (out / "teacher" / "README.md").read_text()
    assert (out / "classifier.safetensors").is_file() and (tmp_path / "run" / "grid.png").is_file()
