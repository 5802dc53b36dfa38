"""A folder that any web server can serve: the page of `examples/browser`, ONNX Runtime Web and a single graph."""

from __future__ import annotations

import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import accel
from accel.errors import UserError
from accel.files import cache_dir, exclusive, read_json

PAGE = Path(accel.__file__).parents[1] / "examples" / "browser"
FILES = ("index.html", "page.js", "single_graph.js", "tokenizer.js")
# Bundles of the runtime and the WebAssembly that each loads.
RUNTIME = (
    "ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.bundle.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)


def copy_page(folder: Path) -> None:
    """Copy the page and its runtime into a folder, where the graph is put too.

    Raises:
        UserError: without a checkout, and without npm where the runtime is not there yet.
    """
    if not (PAGE / "index.html").is_file():
        raise UserError(
            "the page is in a checkout alone, in examples/browser", "git clone accel, and run it from there"
        )
    runtime = _runtime()
    for name in FILES:
        shutil.copyfile(PAGE / name, folder / name)
    (folder / "ort").mkdir()
    for name in RUNTIME:
        shutil.copyfile(runtime / name, folder / "ort" / name)


def _runtime() -> Path:
    """The files of ONNX Runtime Web: beside the page (`npm install`), or in accel's cache, where npm puts them once."""
    version = read_json(PAGE / "package.json", "package.json")["dependencies"]["onnxruntime-web"]
    cache = cache_dir() / "browser" / version
    for place in (PAGE, cache):
        if (found := place / "node_modules" / "onnxruntime-web" / "dist").is_dir():
            return found
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm is not installed, and it brings ONNX Runtime Web", "install Node.js, which npm comes with")
    cache.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(cache):
        cache.mkdir(exist_ok=True)
        shutil.copyfile(PAGE / "package.json", cache / "package.json")
        command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cache)
    if done.returncode:
        shutil.rmtree(cache, ignore_errors=True)
        fix = f"run it again, or by hand: npm install --prefix {PAGE}"
        raise UserError(f"npm could not install onnxruntime-web {version}: {done.stderr.strip()[-300:]}", fix)
    return cache / "node_modules" / "onnxruntime-web" / "dist"


class _Handler(SimpleHTTPRequestHandler):
    """Files, with the headers that let WebAssembly use threads; no log."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *args: object) -> None:
        pass


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of the folder for this machine alone; `server_port` says where, for port 0.

    Raises:
        UserError: for a port that is taken.
    """
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise UserError(
            f"port {port} cannot be used ({error.strerror})", "choose another --port; 0 takes a free one"
        ) from None
