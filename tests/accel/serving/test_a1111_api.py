"""A client script of AUTOMATIC1111's API, at a real socket."""

import base64
import io
import json
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from accel.errors import UserError
from accel.serving.a1111_api import sampler_of

FEW, FULL = "digits/4step-int8", "digits/4step"


@pytest.fixture
def api(server):
    with httpx.Client(base_url=f"{server}/sdapi/v1", timeout=60) as client:
        yield client
        client.post("/options", json={"sd_model_checkpoint": FEW})


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_txt2img_as_scripts_call_it(api):
    payload = {
        "prompt": "a handwritten two",
        "negative_prompt": "",
        "seed": 5,
        "steps": 6,
        "cfg_scale": 2,
        "width": 64,
        "height": 64,
        "batch_size": 2,
        "n_iter": 1,
        "sampler_name": "Euler a",
        "restore_faces": False,
        "alwayson_scripts": {},
    }
    first, again = (api.post("/txt2img", json=payload).json() for _ in range(2))
    assert len(first["images"]) == 2 and np.array_equal(
        *map(np.asarray, (opened(r["images"][0]) for r in (first, again)))
    )
    info = json.loads(first["info"])
    assert info["all_seeds"] == [5, 6] and info["steps"] == 6 and info["sampler_name"] == "euler_ancestral"
    assert opened(first["images"][0]).text["parameters"].startswith("a handwritten two\nSteps: 6, Sampler: euler_anc")
    assert first["parameters"]["prompt"] == "a handwritten two"


def test_img2img_changes_what_the_mask_shows(api, repainted):
    def sent(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    photo, mask, expected = repainted
    payload = {"prompt": "a handwritten two", "seed": 2, "denoising_strength": 1.0, "mask": sent(mask)}
    payload |= {"init_images": [f"data:image/png;base64,{sent(photo)}"]}
    answer = api.post("/img2img", json=payload | {"override_settings": {"sd_model_checkpoint": FULL}})
    assert answer.status_code == 200, answer.text
    pixels, photo = (np.asarray(image).astype(int) for image in (opened(answer.json()["images"][0]), photo))
    assert np.abs(pixels - np.asarray(expected)).max() <= 1
    assert np.abs(pixels - photo)[:, 36:].mean() < 25 < np.abs(pixels - photo)[:, :32].mean()


def test_progress_shows_the_image_and_interrupt_ends_it(api):
    idle = api.get("/progress").json()
    assert idle["progress"] == 0 and idle["current_image"] is None
    answers = []
    payload = {"prompt": "a handwritten two", "steps": 60, "sampler_name": "DDIM", "batch_size": 4}
    thread = threading.Thread(target=lambda: answers.append(api.post("/txt2img", json=payload)))
    thread.start()
    until = time.monotonic() + 30
    while (seen := api.get("/progress").json())["progress"] == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert 0 < seen["progress"] < 1 and opened(seen["current_image"]).size == (64, 64)
    assert seen["state"]["job_count"] == 4 and seen["eta_relative"] > 0
    assert api.post("/interrupt").json() == {}
    thread.join(30)
    (answer,) = answers
    assert answer.status_code == 200 and json.loads(answer.json()["info"])["interrupted"]
    assert len(answer.json()["images"]) < 4 and api.get("/progress").json()["progress"] == 0


def test_lists_and_options(api):
    assert [model["model_name"] for model in api.get("/sd-models").json()] == [FEW, FULL]
    assert {"name": "Euler a", "aliases": ["euler_ancestral"], "options": {}} in api.get("/samplers").json()
    assert "karras" in [one["name"] for one in api.get("/schedulers").json()]
    assert api.get("/loras").json() == []
    assert api.post("/options", json={"sd_model_checkpoint": FULL}).status_code == 200
    assert api.get("/options").json()["sd_model_checkpoint"] == FULL
    assert api.post("/options", json={"sd_model_checkpoint": "nope"}).status_code == 404
    assert api.post("/options", json={"CLIP_stop_at_last_layers": 2}).status_code == 400


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"enable_hr": True}, "enable_hr is not supported"),
        ({"alwayson_scripts": {"x": {}}}, "alwayson_scripts is not supported"),
        ({"sampler_name": "Nonsense"}, "unknown sampler"),
        ({"scheduler": "nonsense"}, "unknown scheduler"),
        ({"width": 512}, "width 512"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 1000}, "number of steps"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a1111s_form(api, fields, words):
    answer = api.post("/txt2img", json={"prompt": "a handwritten two"} | fields)
    assert answer.status_code == 400 and words in answer.json()["detail"]


def test_samplers_by_a1111s_names():
    assert sampler_of("DPM++ 2M Karras", None) == ("dpmpp_2m", "karras")
    assert sampler_of("DPM++ 2M", "Karras") == ("dpmpp_2m", "karras")
    assert sampler_of("Euler a", "Automatic") == ("euler_ancestral", None)
    assert sampler_of(None, None) == (None, None) and sampler_of("lcm", "") == ("lcm", None)
    with pytest.raises(UserError, match="unknown sampler"):
        sampler_of("DPM fast", None)
