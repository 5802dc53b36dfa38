"""The report in a real browser: figures, sliders, buttons, keyboard, colours, both widths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from accel.bench.page import compared, page
from accel.bench.results import comparison

ROOT = Path(__file__).parents[2]


def document() -> dict:
    data = json.loads((ROOT / "benchmarks/digits.json").read_text())
    data["work"] |= {"prompts": ["a handwritten seven", "a handwritten three"], "seeds": [7, 8]}
    return data


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """Address of a page on which onnxruntime's images are black where eager's are white, and openvino's equal."""
    eager = np.full((2, 64, 64, 3), 255, np.uint8)
    images = {"eager": eager, "onnxruntime": np.zeros_like(eager), "openvino": eager.copy()}
    file = tmp_path_factory.mktemp("report") / "x.html"
    file.write_text(page(document(), images))
    return file.as_uri()


@pytest.fixture(scope="module")
def comparing(tmp_path_factory) -> str:
    other = json.loads((ROOT / "benchmarks/sd15-tiny-256.json").read_text())
    file = tmp_path_factory.mktemp("report") / "y.html"
    file.write_text(compared(comparison.compare([document(), other, document()], ["before", "machine two", "after"])))
    return file.as_uri()


def test_the_figures_equal_the_json_that_the_page_carries(tab, report):
    shown = tab(report)
    data = json.loads(shown.locator("#document").text_content())
    assert data == document()
    lines = shown.locator("#speed .bars li")
    measured = [row for row in data["rows"] if row["scopes"]["image"]["timing"]]
    measured.sort(key=lambda row: row["scopes"]["image"]["timing"]["p50_s"])
    assert lines.count() == len(measured) == 5
    longest = max(row["scopes"]["image"]["timing"]["p90_s"] for row in measured)
    for i, row in enumerate(measured):
        line, timing = lines.nth(i), row["scopes"]["image"]["timing"]
        assert line.locator(".name").inner_text() == row["variant"]
        assert float(line.locator("data").get_attribute("value")) == timing["p50_s"]
        assert line.locator("data").inner_text() == f"{timing['p50_s'] * 1e3:.3g} ms"
        whole = line.locator("svg").bounding_box()["width"]
        part = line.locator("rect.fill").bounding_box()["width"]
        assert part / whole == pytest.approx(timing["p50_s"] / longest, abs=0.01)


def luminance(shown, x: float, y: float) -> int:
    """Of a point of the first slider, as it is painted; x and y are shares of its sides."""
    from io import BytesIO

    from PIL import Image

    shot = Image.open(BytesIO(shown.locator(".slider").first.screenshot())).convert("L")
    return shot.getpixel((int(x * shot.width), int(y * shot.height)))


def test_the_slider_uncovers_one_image_by_keyboard_and_by_pointer(tab, report):
    shown = tab(report)
    slider = shown.locator(".slider").first
    slider.scroll_into_view_if_needed()
    handle = shown.get_by_role("slider").first
    assert luminance(shown, 0.25, 0.8) > 240 and luminance(shown, 0.75, 0.8) < 15
    handle.focus()
    for _ in range(40):
        shown.keyboard.press("ArrowRight")
    assert handle.input_value() == "90" and luminance(shown, 0.75, 0.8) > 240
    assert handle.get_attribute("aria-valuetext") == "eager 90 %, onnxruntime 10 %"
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    shown.mouse.move(box["x"] + 0.9 * box["width"], middle)
    shown.mouse.down()
    shown.mouse.move(box["x"] + 0.1 * box["width"], middle, steps=8)
    shown.mouse.up()
    assert 5 <= int(handle.input_value()) <= 15 and luminance(shown, 0.25, 0.8) < 15


def test_another_engine_is_chosen_and_an_equal_image_is_called_so(tab, report):
    shown = tab(report)
    first = shown.locator(".prompt").first
    assert first.locator("[data-name]").inner_text() == "onnxruntime"  # the one that differs most
    assert "at most 255 of 255" in first.inner_text() and first.locator("img.map").count() == 1
    first.get_by_role("radio", name="onnxruntime").focus()
    shown.keyboard.press("ArrowRight")
    assert first.locator("[data-name]").inner_text() == "openvino"
    assert "✓ Identical" in first.inner_text() and not first.locator("img.map").is_visible()
    assert shown.locator(".prompt").nth(1).locator("[data-name]").inner_text() == "onnxruntime"
    assert luminance(shown, 0.75, 0.8) > 240


def test_colours_follow_the_system_and_the_button(tab, report):
    light, dark = (tab(report, color_scheme=scheme) for scheme in ("light", "dark"))
    colour = "getComputedStyle(document.body).backgroundColor"
    grounds = [page.evaluate(colour) for page in (light, dark)]
    assert grounds[0] != grounds[1]
    light.get_by_role("button", name="Use the dark colours").click()
    assert light.evaluate(colour) == grounds[1]
    light.get_by_role("button", name="Use the light colours").click()
    assert light.evaluate(colour) == grounds[0]


CONTRAST = """() => {
  const light = (text) => {
    const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = text.match(/[\\d.]+/g).map((v) => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const poor = [];
  for (const one of document.querySelectorAll("h1,h2,p,.note,.lead,.mark,td,th,dt,dd,.legend li,button,small,.value")) {
    if (!one.checkVisibility() || !one.textContent.trim()) continue;
    let ground = one;
    while (ground && getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
    const both = [getComputedStyle(one).color, getComputedStyle(ground).backgroundColor].map(light);
    const ratio = (Math.max(...both) + .05) / (Math.min(...both) + .05);
    if (ratio < 4.5) poor.push(`${one.className || one.tagName} ${ratio.toFixed(2)}`);
  }
  return [...new Set(poor)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_that_wcag_asks_for(tab, report, scheme):
    assert tab(report, color_scheme=scheme).evaluate(CONTRAST) == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("which", ["report", "comparing"])
def test_nothing_overlaps_or_is_cut_off(tab, broken, request, which, width):
    shown = tab(request.getfixturevalue(which), width)
    shown.locator("summary").all()
    for summary in shown.locator("summary").all():
        summary.click()
    assert shown.evaluate(broken) == []


def test_the_search_for_broken_layout_finds_it(tab, broken, tmp_path):
    file = tmp_path / "z.html"
    file.write_text(
        "<p style='position:absolute;top:0;left:0'>one</p><p style='position:absolute;top:4px;left:4px'>two</p>"
        "<p style='position:absolute;top:99px;left:9px;width:50px;overflow:hidden;white-space:nowrap'>very long</p>"
        "<p style='position:absolute;left:385px;top:200px'>outside</p>"
    )
    found = " ".join(tab(file.as_uri(), 390).evaluate(broken))
    assert "one over" in found and "cut" in found and "outside" in found


def test_the_command_is_copied_and_the_json_saved(tab, report):
    shown = tab(report, permissions=["clipboard-read", "clipboard-write"])
    shown.get_by_role("button", name="Copy").click()
    shown.get_by_role("button", name="Copied").or_(shown.get_by_role("button", name="Selected")).wait_for()
    with shown.expect_download() as saved:
        shown.get_by_role("button", name="Save the JSON").click()
    assert json.loads(Path(saved.value.path()).read_text()) == document()


def test_all_controls_are_reached_by_the_keyboard(tab, report):
    shown = tab(report)
    reached = set()
    for _ in range(30):
        shown.keyboard.press("Tab")
        reached.add(
            shown.evaluate("document.activeElement.id || document.activeElement.type || document.activeElement.tagName")
        )
    assert {"theme", "range", "radio", "button", "SUMMARY", "save"} <= reached
