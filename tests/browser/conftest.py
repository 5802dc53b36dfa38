"""Headless Chromium. Where it or playwright is missing the tests skip, and docs/reports.md says how to have them."""

from __future__ import annotations

import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def chromium():
    """A browser of playwright's, closed after each file: its event loop would be in the way of others."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs Chromium: apt install chromium, or CHROMIUM=/path/to/it")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    """Opens an address in a window of a width, and fails the test for any error of its script or request elsewhere."""
    contexts, errors = [], []

    def opened(address: str, width: int = 1280, **options):
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: _allowed(request.url, address) or errors.append(request.url))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


def _allowed(url: str, address: str) -> bool:
    origin = "/".join(address.split("/")[:3])
    return url.startswith((origin, origin.replace("http", "ws"), "data:", "blob:"))


# What a reader would call broken: a window that scrolls sideways, text that leaves its window, words over words.
BROKEN = """() => {
  const wrong = [], width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) wrong.push(`scrolls to ${document.documentElement.scrollWidth}`);
  const boxes = [];
  for (const one of document.querySelectorAll("h1,h2,h3,p,li>span,dt,dd,strong,button,figcaption,label>span,code")) {
    const box = one.getBoundingClientRect();
    const seen = one.checkVisibility({ visibilityProperty: true, opacityProperty: true });
    const shown = seen && box.width > 1 && box.height > 1;
    if (!shown || !one.textContent.trim() || one.closest(".scroll, [aria-hidden=true]")) continue;
    const name = `${one.tagName} ${one.textContent.trim().slice(0, 40)}`;
    if (box.left < -1 || box.right > width + 1) wrong.push(`${name}: ${box.left} to ${box.right}`);
    const style = getComputedStyle(one), hides = style.overflowX !== "visible" && style.display !== "inline";
    if (hides && one.scrollWidth > one.clientWidth + 1) wrong.push(`${name}: cut`);
    boxes.push([one, name, [...one.getClientRects()]]);  // words that go over two lines have two
  }
  const meet = (p, q) => Math.min(p.right, q.right) - Math.max(p.left, q.left) > 2
    && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 2;
  boxes.forEach(([a, name, first], i) => {
    for (const [b, other, second] of boxes.slice(i + 1)) {
      if (a.contains(b) || b.contains(a)) continue;
      if (first.some((p) => second.some((q) => meet(p, q)))) wrong.push(`${name} over ${other}`);
    }
  });
  return wrong;
}"""


@pytest.fixture
def broken():
    """The program that looks for what is cut off or overlaps, for `page.evaluate`."""
    return BROKEN
