"""The page in headless Chromium: it draws Python's pixels, and asks for nothing but its own files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from accel.bundle import Bundle
from accel.export.single_graph.export import write
from accel.export.single_graph.web import copy_page, server
from accel.machine import int8_saturates
from accel.parity import psnr
from accel.text.tokenizer import ClipTokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        not (FOLDER / "node_modules").is_dir(), reason="npm install --ignore-scripts --prefix examples/browser"
    ),
]
PIXELS = """() => {
  const canvas = document.getElementById("image");
  return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
}"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, folder) of `accel demo --web`, which Ctrl-C ends."""
    folder = tmp_path_factory.mktemp("web") / "page"
    command = [sys.executable, "-m", "accel", "demo", "--web", "--port", "0", "--out", str(folder), "--json"]
    log = folder.with_suffix(".log")
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ)
        try:
            line = process.stdout.readline()
            assert line, log.read_text()
            yield json.loads(line)["url"], folder
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, log.read_text()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, address: str):
    """The page, loaded; it lists the addresses that it asked for and its errors."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.asked, page.wrong = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#draw:not([disabled])", timeout=180_000)
    return page


@pytest.fixture(scope="module")
def page(browser, served):
    return opened(browser, served[0])


def draw(page, prompt: str, seed: int) -> np.ndarray:
    """The image in the page, uint8 [H, W, 4]."""
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.click("#draw")
    page.wait_for_selector(f'#image[data-prompt="{prompt}"]', timeout=60_000)
    page.wait_for_selector("#draw:not([disabled])")
    assert page.inner_text("#problem") == "" and page.inner_text("#milliseconds").endswith(" ms") and page.wrong == []
    sides = [int(page.get_attribute("#image", name)) for name in ("height", "width")]
    return np.array(page.evaluate(PIXELS), np.uint8).reshape(*sides, 4)


def python_draws(folder: Path, prompt: str, seed: int) -> np.ndarray:
    """The image of the same files in Python, uint8 [H, W, 3]."""
    import onnxruntime

    record = json.loads((folder / "single_graph.json").read_text())
    ids = ClipTokenizer.from_folder(folder / "tokenizer")([prompt, ""])
    feeds = {"input_ids": ids[:1], "negative_input_ids": ids[1:], "seed": np.array([seed], np.int32)}
    taken = {spec["name"] for spec in record["inputs"]}
    session = onnxruntime.InferenceSession(folder / record["graphs"][-1])
    (images,) = session.run(["image"], {name: value for name, value in feeds.items() if name in taken})
    return images[0]


@pytest.mark.parametrize(("prompt", "seed"), [("the cat", 40), ("a photo of the dog", 2**31 - 1)])
def test_the_pixels_are_pythons(browser, smallest_bundle, tmp_path, prompt, seed):
    """A float model with guidance and four steps of a multistep sampler."""
    folder = tmp_path / "page"
    write(Bundle.open(smallest_bundle), folder)
    copy_page(folder)
    with server(folder, 0) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        drawn = draw(opened(browser, f"http://127.0.0.1:{web.server_port}/"), prompt, seed)
        web.shutdown()
    difference = np.abs(drawn[..., :3].astype(int) - python_draws(folder, prompt, seed))
    assert (drawn[..., 3] == 255).all() and difference.max() <= 1


def test_int8_draws_what_python_draws(page, served):
    """Int8 rounds what differs in the last bits to one side or the other, so it is compared in dB.

    On a processor without VNNI Python's products saturate, and WebAssembly's do not: 28.7 dB were seen.
    """
    drawn = draw(page, "a handwritten seven", 40)[..., :3].astype(float)
    wanted = 25 if int8_saturates() else 30
    assert psnr(drawn, python_draws(served[1], "a handwritten seven", 40).astype(float), 255.0) > wanted


def test_nothing_leaves_the_machine(page, served):
    draw(page, "a handwritten two", 1)
    assert page.asked and all(url.startswith((served[0], "blob:", "data:")) for url in page.asked)
    assert not any("handwritten" in url for url in page.asked)


def test_it_fits_a_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
