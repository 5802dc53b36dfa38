"""Two engines draw: order, times, difference, history, and no pipeline left open."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import accel
from accel.studio import Engines, Question, compare, history
from accel.studio.compare import Drawn, Pair
from accel.studio.question import Choices

QUESTION = Question(
    model="digits/4step-int8", engines=("onnxruntime", "openvino"), prompt="a handwritten seven", seed=40
)


class Fake:
    """A pipeline of one grey."""

    def __init__(self, grey: float):
        self.grey, self.closed, self.loras = grey, False, "unset"

    def set_loras(self, loras):
        self.loras = loras

    def __call__(self, **call):
        self.call = call
        return SimpleNamespace(images=np.full((1, 8, 8, 3), self.grey))

    def close(self):
        self.closed = True


@pytest.fixture
def made():
    return {}


@pytest.fixture
def engines(made):
    def load(model, engine, **options):
        made[model, engine] = Fake(0.5 if engine == "eager" else 0.6)
        return made[model, engine]

    return Engines(load)


def question(engines: tuple[str, str] = ("eager", "openvino"), model: str = "m", **more) -> Question:
    return Question(model=model, engines=engines, prompt="x", **more)


def test_a_pair_grows_and_says_how_it_differs(engines, made):
    asked = question(loras=(("l.safetensors", 0.5),))
    empty, half, whole = compare(engines, asked)
    assert (empty.a, half.b) == (None, None) and half.verdict == ""
    assert made["m", "eager"].loras == ["l.safetensors=0.5"]
    assert whole.difference.most == round(0.6 * 255) - round(0.5 * 255) and whole.map.shape == (8, 8, 3)
    assert whole.a.first and "draw again" in whole.verdict and "of 255" in whole.verdict
    *_, again = compare(engines, asked)
    assert not again.b.first and "times as fast as" in again.verdict


def test_equal_images_are_called_identical(engines):
    for _ in range(2):
        *_, pair = compare(engines, question(("eager", "eager")))
    assert pair.map is None and pair.verdict.endswith("the images are identical: every pixel has the same value.")


def test_the_faster_one_is_the_subject():
    image = np.zeros((8, 8, 3), np.uint8)
    assert Pair(QUESTION, Drawn(image, 1.0), Drawn(image, 0.25)).verdict.startswith(
        "openvino was 4.00 times as fast as"
    )
    assert Pair(QUESTION, Drawn(image, 1.0), Drawn(image, 2.0)).verdict.startswith("onnxruntime was 2.00 times")


def test_what_was_not_used_for_the_longest_time_is_closed(engines, made):
    for model in "abcde":
        engines.draw(question(model=model), "eager")
    assert [made[model, "eager"].closed for model in "abcde"] == [True, False, False, False, False]
    assert engines.draw(question(model="a"), "eager").first
    engines.close()
    assert all(pipe.closed for pipe in made.values())


def test_history_is_newest_first_and_brings_its_question_back(engines):
    past = []
    for seed in (1, 2):
        *_, pair = compare(engines, question(seed=seed, steps=4))
        past = history.add(past, pair)
    first, second = history.lines(past)
    assert first.startswith("2. “x”, seed 2 · eager ") and second.startswith("1. “x”, seed 1")
    fields = history.fields(past[0].question)
    again = accel.studio.asked(Choices(models=("m",), engines=("eager", "openvino")), fields)
    assert again == [past[0].question]


def test_the_shipped_model_is_drawn_as_accel_run_draws_it():
    pytest.importorskip("openvino")
    engines = Engines()
    *_, pair = compare(engines, QUESTION)
    engines.close()
    with accel.load(QUESTION.model, engine="onnxruntime") as pipe:
        drawn = pipe(QUESTION.prompt, seed=40, output_type="np").images[0]
    assert np.array_equal(pair.a.image, (drawn * 255).round().astype(np.uint8))
    assert pair.b.image.shape == pair.a.image.shape and pair.difference.most > 0


def test_an_image_to_start_from_and_a_lora_reach_the_engine(tmp_path):
    pytest.importorskip("torch")
    from PIL import Image
    from safetensors.numpy import save_file

    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    with accel.Bundle.open("digits/4step-int8").path.joinpath("unet/config.json").open() as file:
        width = json.load(file)["block_out_channels"][-1]
    rng = np.random.default_rng(0)
    parts = {"lora_A": rng.normal(size=(2, width)), "lora_B": rng.normal(size=(width, 2))}
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = str(tmp_path / "l.safetensors")
    save_file({f"{layer}.{part}.weight": value.astype(np.float32) for part, value in parts.items()}, lora)
    plain = Question(model="digits/4step", engines=("eager", "eager"), prompt="a handwritten seven", seed=40)
    engines = Engines()
    drawn = {
        name: engines.draw(one, "eager").image.astype(int)
        for name, one in {
            "plain": plain,
            "lora": replace(plain, loras=((lora, 5.0),)),
            "from white": replace(plain, image=str(tmp_path / "white.png"), strength=0.25),
            "plain again": plain,
        }.items()
    }
    engines.close()
    assert np.array_equal(drawn["plain"], drawn["plain again"])  # the LoRA is off again
    assert abs(drawn["plain"] - drawn["lora"]).max() > 0
    assert abs(drawn["plain"] - drawn["from white"]).max() > 50
