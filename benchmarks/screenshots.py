"""The pictures of the documentation that show a page: each on a desk (1280 px) and on a phone (390 px), side by side.

    make docs && python benchmarks/screenshots.py --report benchmarks/report-example.json docs/

writes report.png, studio.png and site.png. It needs playwright, a Chromium, and for the studio .venv-studio (`make
studio` makes it). `--report` may also be a page that `accel bench --out bench.html` wrote, which has the images too.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
WIDTHS, HEIGHT = (1280, 390), 900
MARGIN, LARGEST = 24, 150_000
_SIDEWAYS = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


def free_port() -> int:
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        return at.getsockname()[1]


def shots(browser: Any, address: str, ready: Callable[[Any], None] = lambda page: None) -> list[Image.Image]:
    """The top of a page at each width."""
    found = []
    for width in WIDTHS:
        page = browser.new_page(viewport={"width": width, "height": HEIGHT})
        page.goto(address)
        ready(page)
        assert not page.evaluate(_SIDEWAYS), f"{address} scrolls sideways at {width} px"
        found.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        page.close()
    return found


def beside(images: list[Image.Image]) -> Image.Image:
    width = sum(image.width for image in images) + MARGIN * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), "#8a8f98")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + MARGIN
    return sheet


def save(sheet: Image.Image, path: Path) -> None:
    """As PNG with as many colours as fit into the limit."""
    for colours in (256, 128, 64, 32):
        sheet.quantize(colours).save(path, optimize=True)
        if path.stat().st_size <= LARGEST:
            print(f"{path}: {path.stat().st_size:,} bytes, {colours} colours")
            return
    raise SystemExit(f"{path} has {path.stat().st_size:,} bytes (at most {LARGEST:,})")


def report(browser: Any, source: Path) -> Image.Image:
    if source.suffix != ".json":
        return beside(shots(browser, source.absolute().as_uri()))
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "report.html"
        command = [sys.executable, "-m", "accel", "report", source.absolute(), "--out", page, "-q"]
        subprocess.run(command, check=True, cwd=ROOT)
        return beside(shots(browser, page.as_uri()))


def studio(browser: Any) -> Image.Image:
    port = free_port()
    python = ROOT / ".venv-studio/bin/python"
    command = [python, "-m", "accel", "studio", "digits/4step-int8", "--engine", "onnxruntime,openvino"]
    command += ["--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(address, process)

        def draw(page: Any) -> None:
            page.locator("#go").wait_for(timeout=60_000)
            page.locator("#prompts textarea").fill("a handwritten seven")
            for _ in range(2):  # the first call of an engine is slower than the others
                page.locator("#go").click()
                page.locator("#status", has_text="of the pixels differ").wait_for(timeout=60_000)
                page.wait_for_timeout(1000)

        return beside(shots(browser, address, draw))
    finally:
        process.terminate()
        process.wait(30)


def site(browser: Any) -> Image.Image:
    handler = functools.partial(_Quiet, directory=ROOT / "out/docs")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made = beside(shots(browser, f"http://127.0.0.1:{server.server_port}/tutorial.html"))
        server.shutdown()
    return made


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def _wait(address: str, process: subprocess.Popen[Any]) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.3)
    raise SystemExit(f"nothing answers at {address}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks/report-example.json")
    parser.add_argument("--only", choices=("report", "studio", "site"), action="append")
    args = parser.parse_args()
    wanted = args.only or ("report", "studio", "site")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        makers = {
            "report": lambda: report(browser, args.report),
            "studio": lambda: studio(browser),
            "site": lambda: site(browser),
        }
        for name in wanted:
            save(makers[name](), args.out / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
