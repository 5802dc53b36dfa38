"""`accel serve` as a process of its own: it starts, serves, finishes what it began, and ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from accel.cli import main

MODEL = "digits/4step-int8"


@pytest.fixture
def process():
    started = []

    def start(*args, **environment):
        command = [sys.executable, "-m", "accel", "serve", *args, "--port", "0", "--json"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, env=os.environ | environment, **pipes))
        line = started[-1].stdout.readline()
        assert line, started[-1].stderr.read()
        return started[-1], json.loads(line)["url"]

    yield start
    for one in started:
        if one.poll() is None:
            one.kill()
        one.communicate()


def test_it_serves_and_a_signal_lets_what_was_begun_be_finished(process):
    server, url = process(MODEL, "--engine", "onnxruntime", "--threads", "1", ACCEL_API_KEY="secret")
    key = {"authorization": "Bearer secret"}
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers=key).json()["data"][0]["id"] == MODEL
    answers = []
    body = {"prompt": "a handwritten two", "num_inference_steps": 60, "sampler": "ddim"}
    ask = lambda: answers.append(httpx.post(f"{url}/v1/images/generations", json=body, headers=key, timeout=60))  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    until = time.monotonic() + 20
    while httpx.get(f"{url}/sdapi/v1/progress", headers=key).json()["progress"] == 0 and time.monotonic() < until:
        time.sleep(0.01)
    server.send_signal(signal.SIGINT)
    thread.join(60)
    assert answers[0].status_code == 200 and server.wait(30) == 0


@pytest.mark.parametrize(
    "args, words",
    [
        ((MODEL, "--batch", "64"), "invalid batch: 64"),
        ((MODEL, MODEL), "named twice"),
        ((MODEL, "--port", "70000"), "invalid port"),
        ((MODEL, "--max-queue", "0"), "invalid limit: queue"),
        ((MODEL, "--lora", "x"), "--lora x"),
        ((MODEL, "--policy", "random"), "--policy"),
        (("no-such-model",), "no-such-model"),
    ],
)
def test_what_is_wrong_is_said_before_it_listens(refused, args, words):
    assert words in refused("serve", *args, "--engine", "onnxruntime", "--threads", "1")


def test_it_listens_before_it_says_where(monkeypatch):
    """Whoever reads the line may ask at once: a connection then waits, and is not refused."""
    from accel.commands import serve
    from accel.studio import server

    sockets, heard = [], []
    bind = server.bound
    monkeypatch.setattr(server, "bound", lambda *where: sockets.append(bind(*where)) or sockets[-1])
    listens = lambda: sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)  # noqa: E731
    monkeypatch.setattr(serve, "_announce", lambda *_: heard.append(listens()))
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    assert main(["serve", MODEL, "--engine", "onnxruntime", "--threads", "1", "--port", "0"]) == 0
    assert heard == [1]
