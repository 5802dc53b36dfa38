"""Fields of a page become questions; whatever a browser sends, the answer is a question or a sentence."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel.commands.verbs import verb
from accel.errors import UserError
from accel.studio import Choices, Question, asked
from accel.studio.question import MOST_PROMPTS

CHOICES = Choices(models=("digits/4step-int8",), engines=("eager", "onnxruntime"), loras=("a b.safetensors",))
FIELDS = {"model": "digits/4step-int8", "engine_a": "eager", "engine_b": "onnxruntime", "prompts": "a cat"}


def test_empty_fields_are_the_models_own():
    (question,) = asked(CHOICES, FIELDS | {"steps": "", "guidance": None, "seed": ""})
    assert question == Question(model="digits/4step-int8", engines=("eager", "onnxruntime"), prompt="a cat")
    assert question.call() == {
        **{"prompt": "a cat", "seed": 0, "steps": None, "guidance_scale": None, "height": None, "width": None}
    }


def test_every_line_is_a_question():
    found = asked(CHOICES, FIELDS | {"prompts": "one\n\n  two \n", "seed": "7", "steps": "4", "guidance": "1.5"})
    assert [(q.prompt, q.seed, q.steps, q.guidance) for q in found] == [("one", 7, 4, 1.5), ("two", 7, 4, 1.5)]


def test_the_command_is_one_that_accel_takes_and_means_the_same():
    values = FIELDS | {"prompts": 'it\'s "a" $cat; rm -rf /', "negative": "blurry", "seed": "3", "steps": "4"}
    values |= {"guidance": "2", "height": "64", "loras": ["a b.safetensors"], "scale": 0.5, "image": "/tmp/x/photo.png"}
    (question,) = asked(CHOICES, values)
    words = shlex.split(question.command("onnxruntime"))
    args = verb("run")[1].parse_args(words[2:])
    assert (args.bundle, args.prompt, args.negative) == ("digits/4step-int8", [question.prompt], "blurry")
    assert (args.seed, args.steps, args.guidance, args.height, args.width) == (3, 4, 2.0, 64, None)
    assert (args.lora, args.image, args.strength) == (["a b.safetensors=0.5"], "photo.png", 0.8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": " \n "}, "the prompt is empty"),
        ({"prompts": "x\n" * (MOST_PROMPTS + 1)}, "prompts are too many"),
        ({"model": "/etc/passwd"}, "unknown model"),
        ({"engine_a": "onnx"}, "unknown engine"),
        ({"loras": ["/etc/passwd"]}, "unknown LoRA"),
        ({"loras": 1}, "unknown LoRA"),
        ({"steps": "0"}, "steps '0' is not a whole number"),
        ({"seed": "seven"}, "seed 'seven' is not"),
        ({"seed": 1.5}, "seed 1.5 is not"),
        ({"guidance": "nan"}, "guidance 'nan' is not a number"),
        ({"height": "9" * 5000}, "is not a whole number"),
        ({"scale": "inf"}, "LoRA strength"),
    ],
)
def test_nonsense_is_a_sentence(wrong, message):
    with pytest.raises(UserError, match=message):
        asked(CHOICES, FIELDS | wrong)


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text(), max_size=2)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys([*FIELDS, "seed", "steps", "width", "loras", "scale"], anything))
)
def test_anything_is_a_question_or_a_sentence(values):
    try:
        asked(CHOICES, FIELDS | values)
    except UserError as error:
        assert error.message and error.fix
