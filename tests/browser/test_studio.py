"""The studio in a real browser: two engines draw, nonsense is a sentence, nothing is asked of anybody else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python() -> str:
    """A Python with Gradio, which wants an older Pillow than the pinned one: this one, or that of `make studio`."""
    if find_spec("gradio"):
        return sys.executable
    own = ROOT / ".venv-studio/bin/python"
    if not own.exists():
        pytest.skip("needs gradio: make .venv-studio/.installed, or the extra studio")
    return str(own)


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """Address of a studio on the shipped int8 model."""
    command = [python(), "-m", "accel", "studio", "digits/4step-int8", "--engine", "onnxruntime,openvino"]
    log = (tmp_path_factory.mktemp("studio") / "log").open("w+")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [*command, "--port", "0", "--json"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
    )
    line = started.stdout.readline()
    if not line:
        log.seek(0)
        pytest.fail(log.read())
    yield json.loads(line)["url"]
    started.terminate()
    started.wait(20)
    log.seek(0)
    assert "Traceback" not in log.read()


@pytest.fixture
def open_studio(tab, studio):
    def opened(width: int = 1280):
        page = tab(studio, width)
        page.locator("#go").wait_for(timeout=60_000)
        return page

    return opened


def draw(page, expected: str) -> str:
    page.locator("#go").click()
    page.locator("#status", has_text=re.compile(expected)).wait_for(timeout=60_000)
    return page.locator("#status").inner_text()


def fill(page, name: str, text: str) -> None:
    page.locator(f"#{name} textarea, #{name} input").first.fill(text)


def test_two_engines_draw_and_are_compared(open_studio):
    page = open_studio()
    draw(page, "of the pixels differ")
    said = draw(page, "times as fast as")
    assert re.search(
        r"\d\.\d\d times as fast as (onnxruntime|openvino); .* % of the pixels differ, by at most \d+ of 255", said
    )
    for side in ("a", "b", "map"):
        image = page.locator(f"#{side} img")
        assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [64, 64]
        assert image.bounding_box()["width"] > 200
    for side in ("a", "b"):
        assert re.fullmatch(r"[\d.]+ m?s", page.locator(f"#took-{side}").inner_text().strip())
    assert re.search(r"\d+ of 255", page.locator("#scale").inner_text())
    page.get_by_text("The command to type").click()
    typed = page.locator("#commands").inner_text()
    assert "accel run digits/4step-int8 --engine onnxruntime --prompt 'a handwritten seven' --seed 0" in typed


def test_a_batch_is_drawn_and_its_history_asks_again(open_studio):
    page = open_studio()
    fill(page, "prompts", "a handwritten three\na handwritten nine")
    fill(page, "seed", "11")
    draw(page, "2 of 2: .*of the pixels differ")
    lines = page.locator("#history label")
    assert lines.count() == 2 and "1. “a handwritten three”, seed 11" in lines.nth(1).inner_text()
    fill(page, "seed", "99")
    lines.nth(1).click()
    page.wait_for_function("document.querySelector('#seed textarea, #seed input').value === '11'", timeout=30_000)
    assert page.locator("#prompts textarea").input_value() == "a handwritten three"


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("prompts", "   ", "the prompt is empty"),
        ("steps", "many", "steps 'many' is not a whole number"),
        ("steps", "-4", "steps '-4' is not a whole number"),
        ("seed", "9" * 400, "is not a whole number"),
        ("seed", "<img src=x onerror=alert(1)>", "is not a whole number"),
    ],
)
def test_nonsense_is_survived_with_a_sentence(open_studio, field, text, said):
    page = open_studio()
    fill(page, field, text)
    shown = draw(page, said)
    assert "To put it right" in shown and page.locator("#status [role=alert]").count() == 1
    fill(page, "prompts", "a handwritten two")
    fill(page, "seed", "1")
    fill(page, "steps", "")
    draw(page, "of the pixels differ")


def test_what_the_model_cannot_do_is_a_sentence(open_studio):
    page = open_studio()
    page.get_by_label("Height, px").fill("63")
    assert "63" in draw(page, "height")


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overlaps_or_is_cut_off(open_studio, broken, width):
    page = open_studio(width)
    draw(page, "of the pixels differ")
    assert page.evaluate(broken) == []


def answer(address: str, **headers: str) -> tuple[int, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as found:
            return found.status, dict(found.headers)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers)


def test_only_this_machine_and_only_the_page(studio):
    assert studio.startswith("http://127.0.0.1:")
    code, headers = answer(studio)
    assert code == 200 and "default-src 'self'" in headers["content-security-policy"]
    assert answer(studio, Host="evil.example")[0] == 400
    for path in (f"/gradio_api/file={ROOT / 'README.md'}", "/gradio_api/file=/etc/passwd", "/docs", "/openapi.json"):
        assert answer(studio + path)[0] in (403, 404), path
