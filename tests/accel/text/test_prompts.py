"""Long prompts and weights: against the text encoder of transformers, and the image of diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import accel
from accel.errors import UserError
from accel.sampling import noise
from accel.text import prompts
from accel.text.tokenizer import ClipTokenizer

LONG = "the cat and " * 30 + "a dog"


@pytest.fixture(scope="module")
def tokenizer(sd15):
    return ClipTokenizer.from_folder(sd15 / "tokenizer")


def test_one_chunk_is_what_the_tokenizer_makes(tokenizer):
    made = prompts.tokens(tokenizer, LONG)
    ids, dropped = tokenizer.encode(LONG)
    assert np.array_equal(made.ids, ids[None]) and made.dropped == dropped != ""
    assert (made.weights == 1).all()


def test_a_long_prompt_goes_on_in_the_next_chunk(tokenizer):
    every = tokenizer.backend.encode(LONG, add_special_tokens=False).ids
    assert 75 < len(every) <= 4 * 75
    made = prompts.tokens(tokenizer, LONG, chunks=4)
    kept = [row[1 : list(row).index(tokenizer.eos, 1)] for row in made.ids]
    assert [len(row) for row in kept][:1] == [75] and np.concatenate(kept).tolist() == every
    assert (made.ids[:, 0] == tokenizer.bos).all() and made.dropped == ""
    assert prompts.tokens(tokenizer, LONG, chunks=1).dropped


def test_weights_belong_to_their_words(tokenizer):
    made = prompts.tokens(tokenizer, "the (cat:1.5) a dog", weighted=True)
    plain = prompts.tokens(tokenizer, "the cat a dog")
    assert np.array_equal(made.ids, plain.ids)
    assert made.weights[0, :6].tolist() == [1, 1, 1.5, 1, 1, 1]
    assert prompts.parts(r"a \(cat:2\) sat") == [("a (cat:2) sat", 1.0)]
    assert np.array_equal(prompts.tokens(tokenizer, "(cat:2)").weights, np.ones((1, 77))), "off unless asked for"
    with pytest.raises(UserError, match="invalid weight: 9"):
        prompts.parts("(cat:9)")


@pytest.fixture(scope="module")
def long_bundle(sd15, sd15_bundle, completed, tmp_path_factory):
    from accel.bundle import Bundle
    from accel.export.pipeline import export_pipeline

    unet = export_pipeline(
        sd15,
        tmp_path_factory.mktemp("long") / "bundle",
        profile="batch=1,size=64,tokens=308",
        components=("unet",),
        sampler={"name": "ddim", "steps": 3, "guidance": 5.0},
    )
    return completed(unet, Bundle.open(sd15_bundle))


def embeddings(pipe, rows, weights=None):
    with torch.no_grad():
        hidden = pipe.text_encoder(torch.from_numpy(rows)).last_hidden_state
        if weights is not None:
            empty = pipe.text_encoder(torch.from_numpy(prompts.tokens(weights[0], "").ids)).last_hidden_state
            hidden = empty + torch.from_numpy(weights[1])[..., None] * (hidden - empty)
    return hidden.reshape(1, -1, hidden.shape[-1])


@pytest.mark.parametrize("weighted", [False, True])
def test_a_long_prompt_makes_the_image_of_its_chunks(sd15, long_bundle, tokenizer, weighted):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(sd15)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    text = LONG.replace("a dog", "(a dog:2.5)") if weighted else LONG
    made = prompts.tokens(tokenizer, text, chunks=4, weighted=weighted)
    expected = pipe(
        prompt_embeds=embeddings(pipe, made.ids, (tokenizer, made.weights) if weighted else None),
        negative_prompt_embeds=embeddings(pipe, prompts.tokens(tokenizer, "", chunks=4).ids),
        num_inference_steps=3,
        guidance_scale=5.0,
        output_type="np",
        latents=torch.from_numpy(noise.normal([5], 0, (4, 16, 16))),
    ).images
    loaded = accel.load(long_bundle, engine="onnxruntime")
    found = loaded(text, seed=5, output_type="np", prompt_weights=weighted).images
    assert np.abs(found - expected).max() < 1 / 255
    if weighted:
        assert np.abs(loaded(LONG, seed=5, output_type="np").images - found).max() > 1e-4


def test_a_context_that_is_no_multiple_is_refused(sd15, tmp_path):
    from accel.export.pipeline import export_pipeline

    with pytest.raises(UserError, match="100 tokens"):
        export_pipeline(sd15, tmp_path / "out", profile="size=64,tokens=100")
