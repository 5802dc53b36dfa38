"""OpenAI's own client, and curl, at a real socket."""

import base64
import io
import json
import shutil
import subprocess

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

FEW, FULL = "digits/4step-int8", "digits/4step"


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def image_of(data):
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_client_lists_models_and_gets_the_pipelines_image(client, pipeline):
    assert [model.id for model in client.models.list()] == [FEW, FULL]
    assert client.models.retrieve(FEW).owned_by == "accel"
    made = client.images.generate(
        model=FEW, prompt="a handwritten seven", n=2, size="64x64", response_format="b64_json", extra_body={"seed": 7}
    )
    images = [np.asarray(image_of(one.b64_json)) for one in made.data]
    together = pipeline("a handwritten seven", seed=7, num_images_per_prompt=2).images
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(images, together, strict=True))
    assert [one.seed for one in made.data] == [7, 8] and made.size == "64x64"


def test_our_extensions_go_beside_openais_fields(client):
    more = {"seed": 3, "num_inference_steps": 6, "guidance_scale": 2.0, "negative_prompt": "a handwritten one"}
    first, same, other = (
        client.images.generate(prompt="a handwritten two", extra_body=more | change).data[0].b64_json
        for change in ({"sampler": "ddim"}, {"sampler": "ddim"}, {"sampler": "ddim", "guidance_scale": 4.0})
    )
    assert first == same != other


def test_an_image_by_its_address(client):
    made = client.images.generate(prompt="a handwritten two", response_format="url", output_format="jpeg")
    answer = httpx.get(made.data[0].url)
    assert answer.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(answer.content)).size == (64, 64)
    assert httpx.get(made.data[0].url[:-10] + "x.jpeg").status_code == 404


def test_partial_images_come_before_the_image(client):
    events = list(
        client.images.generate(
            prompt="a handwritten two", stream=True, partial_images=2, extra_body={"seed": 1, "num_inference_steps": 8}
        )
    )
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert all(image_of(event.b64_json).size == (64, 64) for event in events)


def test_edits_start_from_an_image_and_keep_what_the_mask_keeps(client, repainted):
    photo, mask, expected = repainted
    shown = photo.convert("RGBA")
    shown.putalpha(mask.point(lambda value: 255 - value))  # transparent where it is to be painted
    files = []
    for image in (photo, shown):
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(("image.png", file.getvalue(), "image/png"))
    how = dict(image=files[0], mask=files[1], prompt="a handwritten two", extra_body={"seed": 2, "strength": 1.0})
    made = client.images.edit(model=FULL, **how)
    pixels = np.asarray(image_of(made.data[0].b64_json)).astype(int)
    assert np.abs(pixels - np.asarray(expected)).max() <= 1
    with pytest.raises(openai.BadRequestError, match="vae_encoder"):
        client.images.edit(model=FEW, **how)


@pytest.mark.parametrize(
    "fields, status, words",
    [
        ({"prompt": "x", "size": "63x64"}, 400, "width 63"),
        ({"prompt": "x", "size": "big"}, 400, "invalid size"),
        ({"prompt": "x", "n": 0}, 400, "number of images: 0"),
        ({"prompt": "x", "n": 100}, 400, "number of images: 100"),
        ({"prompt": "x", "num_inference_steps": 10**9}, 400, "number of steps"),
        ({"prompt": "x", "guidance_scale": float("nan")}, 400, "guidance_scale: nan"),
        ({"prompt": "x", "model": "nope"}, 404, "unknown model 'nope'"),
        ({"prompt": "x", "lora": "nope"}, 400, "unknown lora"),
        ({"prompt": "x", "sampler": "eulr"}, 400, "did you mean euler"),
        ({"prompt": "x", "partial_images": 2}, 400, "without stream"),
        ({"prompt": "x", "quality": "hd"}, 400, "invalid quality"),
        ({"prompt": "x", "strength": 0.5}, 400, "unknown field"),
        ({"prompt": ""}, 400, "invalid prompt"),
        ({"prompt": "x", "seed": -1}, 400, "invalid seed"),
        ({}, 400, "Field required"),
        ([], 400, "invalid body"),
    ],
)
def test_what_is_wrong_is_said_in_openais_form(server, fields, status, words):
    body = json.dumps(fields)
    answer = httpx.post(f"{server}/v1/images/generations", content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status and words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_other_things_that_clients_get_wrong(server):
    post = lambda path, **how: httpx.post(f"{server}{path}", **how)  # noqa: E731
    json_type = {"content-type": "application/json"}
    assert "not JSON" in post("/v1/images/generations", content="{bad", headers=json_type).json()["error"]["message"]
    large = b'{"prompt": "' + b"x" * (3 << 20) + b'"}'
    assert post("/v1/images/generations", content=large, headers=json_type).status_code == 413
    chunks = (large[i : i + 65536] for i in range(0, len(large), 65536))  # without a length
    assert post("/v1/images/generations", content=chunks, headers=json_type).status_code == 413
    assert post("/v1/images/edits", json={"prompt": "x"}).status_code == 400
    assert post("/v1/images/edits", data={"prompt": "x"}, files={"image": b"no image"}).status_code == 400
    assert post("/v1/images/edits", data={"prompt": "x"}, files={"photo": b""}).status_code == 400
    assert httpx.get(f"{server}/nothing").json()["error"]["message"] == "there is no /nothing here"
    assert httpx.get(f"{server}/v1/images/generations").status_code == 405


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_an_image_and_the_numbers(server):
    def curl(*args):
        return subprocess.run(["curl", "-sf", *args], capture_output=True, check=True, timeout=60).stdout

    body = json.dumps({"prompt": "a handwritten seven", "seed": 7})
    made = curl(f"{server}/v1/images/generations", "-H", "content-type: application/json", "-d", body)
    assert image_of(json.loads(made)["data"][0]["b64_json"]).size == (64, 64)
    assert json.loads(curl(f"{server}/health")) == {"status": "ok", "models": [FEW, FULL]}
    numbers = curl(f"{server}/metrics").decode()
    for name in ("accel_requests_total", "accel_queue_depth", "accel_batch_size_bucket", "accel_step_seconds_sum"):
        assert name in numbers
    assert f'accel_images_total{{model="{FEW}",outcome="made"}}' in numbers


def test_a_key_is_asked_for_but_not_of_a_probe(make_worker, listening):
    from accel.serving.metrics import Metrics

    with listening([make_worker()], Metrics(), key="secret", hosts=()) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        for wrong in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic ="}):
            answer = httpx.get(f"{url}/v1/models", headers=wrong)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="secret").models.list().data[0].id == FEW
        assert httpx.get(f"{url}/sdapi/v1/options", auth=("anybody", "secret")).status_code == 200


def test_a_page_in_a_browser_cannot_reach_it_by_another_name(make_worker, listening):
    from accel.serving.metrics import Metrics

    with listening([make_worker()], Metrics(), hosts=("127.0.0.1",)) as url:
        assert httpx.get(f"{url}/v1/models", headers={"host": "evil.example"}).status_code == 400
        assert httpx.get(f"{url}/v1/models").status_code == 200


def test_a_failure_of_the_server_says_little_and_keeps_the_connection(make_worker, listening):
    from accel.serving.metrics import Metrics

    worker = make_worker()
    engines = worker.pipeline.engines
    right = engines["vae_decoder"]

    class Broken:
        component = right.component
        array = right.array

        def __call__(self, **feeds):
            raise RuntimeError("secret path")

    with listening([worker], Metrics()) as url, httpx.Client(base_url=url) as client:
        engines._loaded["vae_decoder"] = Broken()
        body = {"prompt": "a handwritten two"}
        for _ in range(3):
            answer = client.post("/v1/images/generations", json=body)
            assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
            assert "connection" not in answer.headers and "secret" not in answer.text
        assert client.post("/sdapi/v1/txt2img", json=body).json()["detail"].startswith("the server failed")
        engines._loaded["vae_decoder"] = right
        assert client.post("/v1/images/generations", json=body).status_code == 200
        assert 'endpoint="/v1/images/generations",status="500"} 3.0' in client.get("/metrics").text
