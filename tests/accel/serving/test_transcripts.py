"""Sessions as people type them: curl at the OpenAI API, and the client script that A1111's wiki has."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def curl(server):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")

    def call(path: str, *args: str) -> tuple[int, bytes]:
        command = ["curl", "-sS", "-w", "\n%{http_code}", f"{server}{path}", *args]
        done = subprocess.run(command, capture_output=True, timeout=60, check=True)
        body, _, status = done.stdout.rpartition(b"\n")
        return int(status), body

    return call


JSON = ("-H", "content-type: application/json", "-d")


def test_a_session_with_curl(curl, tmp_path):
    status, body = curl("/v1/models")
    assert status == 200 and [one["id"] for one in json.loads(body)["data"]] == ["digits/4step-int8", "digits/4step"]
    ask = {"prompt": "a handwritten seven", "n": 2, "seed": 7, "response_format": "url"}
    status, body = curl("/v1/images/generations", *JSON, json.dumps(ask))
    made = json.loads(body)["data"]
    assert status == 200 and [one["seed"] for one in made] == [7, 8]
    status, file = curl("/images/" + made[0]["url"].rpartition("/")[2])
    assert status == 200 and file.startswith(PNG)
    (tmp_path / "photo.png").write_bytes(file)
    form = [f"image=@{tmp_path / 'photo.png'}", "prompt=a handwritten two", "model=digits/4step", "strength=0.5"]
    status, body = curl("/v1/images/edits", *(part for one in form for part in ("-F", one)))
    assert status == 200 and base64.b64decode(json.loads(body)["data"][0]["b64_json"]).startswith(PNG)
    status, body = curl("/v1/images/generations", "-N", *JSON, json.dumps(ask | {"n": 1, "stream": True}))
    assert status == 200 and body.decode().startswith("event: image_generation.completed\ndata: {")
    assert curl("/health")[0] == 200 and b"accel_images_total" in curl("/metrics")[1]


@pytest.mark.parametrize(
    ("path", "args", "status", "words"),
    [
        ("/v1/images/generations", (*JSON, "{"), 400, "the body is not JSON"),
        ("/v1/images/generations", (*JSON, "[1]"), 400, "invalid body"),
        ("/v1/images/generations", (*JSON, "{}"), 400, "invalid prompt: Field required"),
        ("/v1/images/generations", (*JSON, '{"prompt": "x", "size": "65x64"}'), 400, "65"),
        ("/v1/images/generations", (*JSON, '{"prompt": "x", "size": "0x0"}'), 400, "invalid width: 0"),
        ("/v1/images/generations", (*JSON, '{"prompt": "x", "size": "big"}'), 400, "invalid size"),
        ("/v1/images/generations", (*JSON, '{"prompt": "x", "n": 1000000}'), 400, "takes 1 to 4"),
        ("/v1/images/generations", (*JSON, '{"prompt": "x", "n": -1}'), 400, "takes 1 to 4"),
        ("/v1/images/generations", (*JSON, '{"prompt": "x", "model": "dall-e-3"}'), 404, "this server has"),
        ("/v1/images/generations", (*JSON, '{"prompt": "x", "promt": "y"}'), 400, "invalid promt: unknown field"),
        ("/v1/images/generations", ("-X", "GET"), 405, "GET is not allowed here"),
        ("/v1/images/edits", (*JSON, "{}"), 400, "multipart/form-data"),
        ("/v1/images/edits", ("-F", "prompt=x"), 400, "0 images to edit"),
        ("/v1/images/edits", ("-F", "prompt=x", "-F", "image=@/etc/hostname"), 400, "image"),
        ("/v1/chat/completions", (*JSON, "{}"), 404, "there is no /v1/chat/completions here"),
        ("/images/none.png", (), 404, "no such image"),
    ],
)
def test_nonsense_is_answered_with_a_sentence(curl, path, args, status, words):
    found, body = curl(path, *args)
    error = json.loads(body)["error"]
    assert found == status and words in error["message"] and "Traceback" not in error["message"], body
    assert set(error) == {"message", "type", "param", "code"}


def test_a_huge_body_is_refused_before_it_is_read(curl, tmp_path):
    (tmp_path / "huge").write_bytes(b'{"prompt": "' + b"x" * (3 << 20))
    status, body = curl("/v1/images/generations", "-H", "content-type: application/json", "-d", f"@{tmp_path / 'huge'}")
    assert status == 413 and b"exceeds 2,097,152 bytes" in body


SCRIPT = """
import base64, io, json, sys, urllib.request
from datetime import datetime
url = sys.argv[1]

def call(path, **payload):
    data = json.dumps(payload).encode()
    request = urllib.request.Request(f"{url}/{path}", data, {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request).read().decode("utf-8"))

made = call("sdapi/v1/txt2img", prompt="a handwritten two", negative_prompt="", seed=1, steps=4, width=64, height=64,
            cfg_scale=1, sampler_name="DPM++ 2M", n_iter=1, batch_size=1)
for index, image in enumerate(made["images"]):
    open(f"txt2img-{index}.png", "wb").write(base64.b64decode(image))
again = call("sdapi/v1/img2img", prompt="a handwritten two", seed=1, steps=4, denoising_strength=0.5, n_iter=1,
             init_images=[made["images"][0]], batch_size=2, override_settings={"sd_model_checkpoint": "digits/4step"})
for index, image in enumerate(again["images"]):
    open(f"img2img-{index}.png", "wb").write(base64.b64decode(image))
print(json.loads(again["info"])["infotexts"][0].splitlines()[-1])
"""


def test_a_script_of_a1111s_api_runs(server, tmp_path):
    """With no library but Python's own, as the example of the web UI's wiki is written."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), server]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["img2img-0.png", "img2img-1.png", "txt2img-0.png"]
    assert all(path.read_bytes().startswith(PNG) for path in Path(tmp_path).iterdir())
    assert done.stdout.startswith("Steps: ") and "Model: digits/4step" in done.stdout
