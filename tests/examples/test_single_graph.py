"""The short programs on a single graph: each draws the same image, in its own language."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from accel.bundle import Bundle
from accel.text.tokenizer import ClipTokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "single_graph"
PROMPT, SEED = "a handwritten seven", 40


def run(*command) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def pythons(single_graph, tmp_path_factory) -> np.ndarray:
    """The image of the program in Python, which loads neither accel nor torch."""
    out = tmp_path_factory.mktemp("python") / "seven.png"
    blocked = (
        "import sys, runpy\nfor name in ('accel', 'torch', 'diffusers', 'transformers'): sys.modules[name] = None\n"
    )
    code = f"{blocked}sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0])"
    run(sys.executable, "-c", code, FOLDER / "draw.py", single_graph, PROMPT, out, SEED)
    return np.asarray(Image.open(out)).astype(int)


def test_python_draws_a_seven(pythons):
    import torch

    from accel.distill.evaluation.digits import load_classifier

    pixels = torch.from_numpy(pythons).permute(2, 0, 1)[None] / 127.5 - 1
    assert pythons.shape == (64, 64, 3) and load_classifier()(pixels).argmax() == 7


def test_node_draws_pythons_image(single_graph, node, pythons, tmp_path):
    run(node, FOLDER / "draw.mjs", single_graph, PROMPT, tmp_path / "seven.ppm", SEED)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "seven.ppm")), pythons)


def test_cpp_draws_pythons_image(single_graph, pythons, tmp_path):
    headers, compiler = os.environ.get("ONNXRUNTIME_INCLUDE", "/usr/include/onnxruntime"), shutil.which("g++")
    if compiler is None or not (Path(headers) / "onnxruntime_c_api.h").is_file():
        pytest.skip("no C++ compiler, or no header of ONNX Runtime: set ONNXRUNTIME_INCLUDE to the folder that has it")
    import onnxruntime

    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(library)
    program = tmp_path / "draw"
    includes = ["-I", headers, "-I", FOLDER.parent / "embed_cpp" / "src"]
    linked = ["-L", tmp_path, "-lonnxruntime", f"-Wl,-rpath,{tmp_path}", "-o", program]
    run(compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", FOLDER / "draw.cpp", *includes, *linked)
    run(program, single_graph / "model.uint8.onnx", single_graph / "tokenizer", PROMPT, tmp_path / "seven.ppm", SEED)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "seven.ppm")), pythons)


PROMPTS = [
    "a handwritten seven",
    "  The CAT's   42 dogs, in 3D!! ",
    "",
    "naïve café ÅNGSTRÖM e\u0301clair",
    "雪の中の狐 🦊",
    "don't we'll I'M",
    "<|endoftext|> and <|startoftext|>",
    "word " * 100,
    "tab\tnewline\nx",
]


def test_the_tokenizer_in_javascript_gives_our_ids(node, tmp_path):
    """Two tokenizers: that of digits, and one over bytes whose every character is a token."""
    folder = Bundle.open("digits/1step-int8").path / "tokenizer"
    script = tmp_path / "ids.mjs"
    module = FOLDER.parent / "browser" / "tokenizer.js"
    script.write_text(
        f"""import {{ readFileSync }} from "node:fs";
import {{ Tokenizer }} from "{module.as_uri()}";
const tokenizer = new Tokenizer(JSON.parse(readFileSync(process.argv[2], "utf8")));
console.log(JSON.stringify(JSON.parse(process.argv[3]).map((prompt) => tokenizer.encode(prompt))));"""
    )
    command = [node, script, folder / "tokenizer.json", json.dumps(PROMPTS)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = ClipTokenizer.from_folder(folder)
    for prompt, ids in zip(PROMPTS, json.loads(done.stdout), strict=True):
        assert ids == ours.encode(prompt)[0].tolist(), prompt
