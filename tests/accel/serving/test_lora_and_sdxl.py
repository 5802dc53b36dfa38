"""SDXL behind the server, with a LoRA file that one request names and the next does not."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import pytest
from PIL import Image

import accel
from accel.serving.limits import Limits
from accel.serving.metrics import Metrics
from accel.serving.models import Settings, open_worker

PROMPT, SEED, SCALE = "a red bicycle", 4, 0.8


@pytest.fixture(scope="module")
def style(sdxl, tmp_path_factory):
    """A LoRA file of the UNet's attention, written by diffusers itself."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(sdxl, subfolder="unet")
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    out = tmp_path_factory.mktemp("lora")
    StableDiffusionXLPipeline.save_lora_weights(out, unet_lora_layers=get_peft_model_state_dict(unet))
    return out / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def client(sdxl_bundle, style, listening):
    metrics, limits = Metrics(), Limits()
    how = dict(engine="onnxruntime", options={"threads": 1}, loras={"style": str(style)})
    worker = open_worker(Settings(name="sdxl", model=str(sdxl_bundle), **how), metrics)
    with listening([worker], metrics, limits=limits) as url, httpx.Client(base_url=url, timeout=120) as one:
        yield one


@pytest.fixture(scope="module")
def expected(sdxl_bundle, style):
    """Without the LoRA, and with it."""
    with accel.load(sdxl_bundle, "onnxruntime", threads=1) as pipe:
        plain = np.asarray(pipe(PROMPT, seed=SEED).images[0]).astype(int)
        pipe.set_loras([(str(style), SCALE)])
        styled = np.asarray(pipe(PROMPT, seed=SEED).images[0]).astype(int)
    assert abs(plain - styled).max() > 8
    return plain, styled


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


def test_a_lora_is_of_the_request_that_names_it(client, expected):
    found = []
    for lora in (None, [{"name": "style", "scale": SCALE}], None):
        body = {"prompt": PROMPT, "seed": SEED} | ({"lora": lora} if lora else {})
        answer = client.post("/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        found.append(pixels(answer.json()["data"][0]["b64_json"]))
    for image, wanted in zip(found, (expected[0], expected[1], expected[0]), strict=True):
        assert abs(image - wanted).max() <= 1


def test_a1111_names_a_lora_in_the_prompt(client, expected):
    assert client.get("/sdapi/v1/loras").json() == [{"name": "style", "alias": "style"}]
    prompt = f"{PROMPT} <lora:style:{SCALE}>"
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": prompt, "seed": SEED}).json()
    assert abs(pixels(answer["images"][0]) - expected[1]).max() <= 1
    assert answer["parameters"]["prompt"] == prompt


@pytest.mark.parametrize(
    ("prompt", "words"), [("x <lora:nope:1>", "unknown lora 'nope'"), ("x <lora:style:much>", "invalid scale")]
)
def test_a_lora_that_is_not_there_is_an_error_and_no_text(client, prompt, words):
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": prompt})
    assert answer.status_code == 400 and words in answer.json()["detail"]


def test_sizes_of_sdxl_are_those_of_its_profile(client):
    wide = client.post("/v1/images/generations", json={"prompt": PROMPT, "size": "96x64"})
    assert pixels(wide.json()["data"][0]["b64_json"]).shape == (64, 96, 3)
    refused = client.post("/v1/images/generations", json={"prompt": PROMPT, "size": "64x96"})
    assert refused.status_code == 400 and "height" in refused.json()["error"]["message"]
