"""Every command of README and docs runs, on models as small as they come, or says what it needs that is not here."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from accel.cli import main
from accel.trt import library

_spec = importlib.util.spec_from_file_location("docs_of_accel", Path(__file__).with_name("test_docs.py"))
_docs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_docs)

# What stands in a command for something of the reader's, or of the hub's, and which of the folders here it is.
STANDS_FOR = {
    "MODEL": "model",
    "BASE": "model",
    "M": "model",
    "my-tiny": "model",
    "warm": "sdxl",
    "SDXL": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "model",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "photos/": "photos",
    "dog-photos/": "photos",
    "captions/": "photos",
    "FOLDER": "photos",
    "D": "photos",
    "laion-aesthetics-6.5/": "photos",
    "laion-art/": "photos",
    "my-bundle": "bundle",
    "BUNDLE": "bundle",
    "my-sdxl": "sdxl-bundle",
    "out/edm-digits": "edm",
    "out/edm-student": "edm",
    "out/edm-bundle": "edm-bundle",
}
# The tutorial is typed as a whole, on the digits: tests/test_tutorial.py.
COMMANDS = [entry for entry in _docs.COMMANDS if entry[0] != "docs/tutorial.md"]
KEPT = Path(__file__).parents[1] / "benchmarks/digits.json"  # a result of accel bench, under whatever name a page has
OF_THE_OUTPUT = ("--out", "-o")
# What makes a command as short as it can be: the last mention of an option counts.
SHORTER = {
    "run": "--steps 2 --threads 1",
    "bench": "--rounds 2 --engine eager --engine onnxruntime --prompt cat",
    "evaluate": "--images 4",
    "doctor": "--fast",
    "distill": "--train-steps 1 --resolution 64 --batch 1 --accumulation 1 --warmup 0 --sample-every 0 --log none "
    "--mixed-precision no --optimizer adamw --threads 1",
}
# The same of a method of training, and of what is exported: profiles of the shared bundles, whose graphs are there.
OF_THE_FIRST = {
    ("distill", "regress"): "--pair-count 2 --pair-steps 2",
    ("distill", "dreambooth"): "--class-images 2",
    ("export", "model"): "--profile batch=1-4,size=64-128",
    ("export", "sdxl"): "--profile batch=1-2,height=64,width=64-96",
}
# The same of an option that a command has.
OF_THE_OPTION = {"--min-size": "--min-size 1", "--data-images": "--data-images 2 --data-steps 1"}
NEEDS = {
    "dmd2_sdxl_": "DMD2's published weights; tests/accel/models/test_few_step.py reads files of their layout",
    "distill ssd-1b": "SDXL at its full depth; tests/distill/training/test_buckets.py trains one in miniature",
    "out/emoji": "the emoji model, hours of training; tests/distill/emoji trains one for two steps and evaluates it",
    "studio ": "a person before a browser; tests/browser/test_studio.py drives it",
    "run user/name": "a hub; tests/accel/commands/share/test_push.py has one",
    "serve ": "somebody to end it; tests/accel/serving and tests/accel/commands/test_serve.py start it",
    "--protocol imagenet64": "EDM's statistics and Inception; tests/distill/evaluation/test_imagenet64.py has others",
    "--model out/edm-digits": "a teacher of 8 px; tests/distill/edm/test_teacher.py trains and distils it",
    "bk-sdm-coco30k": "30,000 images of COCO, and Inception's weights",
    "build": "an NVIDIA GPU, or minutes; tests/export/aoti/test_build.py builds on the CPU",
    "demo --web": "somebody to look at it; tests/examples/test_browser.py looks at it in Chromium",
    "--engine tensorrt --prompt": "an NVIDIA GPU",
    "--offload model": "an NVIDIA GPU; tests/accel/engines/offloading counts what is copied on a fake one",
    "--adapter": "an adapter from the hub; tests/accel/pipeline/test_control.py exports one of its layout",
    "--controlnet": "a ControlNet from the hub; tests/accel/pipeline/test_control.py exports one of its layout",
    "--ip-adapter": "an IP-Adapter from the hub; tests/accel/pipeline/test_image_prompts.py exports one of its layout",
    "--image-prompt": "an IP-Adapter from the hub; tests/accel/pipeline/test_image_prompts.py draws with one",
    "--control ": "a ControlNet from the hub; tests/accel/pipeline/test_control.py draws with one of its layout",
}
SLOW = (
    "--precision int8",
    "--precision int4",
    "--precision fp8",
    "--precision auto",
    "--engine tensorrt-rtx --build",
    "fp16 --engine tensorrt-rtx",
    "my-sdxl --precision fp16",  # minutes on an old processor; its profile and SDXL in fp16 have tests of their own
    "digits out/digits-bundle",  # as the tutorial exports it
)


def _marks(command: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if any(words in command for words in SLOW) else []


def _needs(command: str) -> str | None:
    """What a command needs that is not here; None where it runs."""
    if "--engine aoti --device cpu --components" in command:  # one network takes seconds, all of them minutes
        return None
    if "--provider tensorrt-rtx" in command:
        return "an RTX card"
    if "--engine tensorrt-rtx" in command:  # builds without a GPU
        if command.startswith("run "):
            return "an RTX card"
        return None if library.installed("tensorrt-rtx") else "the extra tensorrt-rtx"
    return next((reason for part, reason in NEEDS.items() if part in command), None)


def here(command: str) -> list[str]:
    """The command on what the folder has, and short."""
    verb, *words = shlex.split(command, comments=True)
    for i, word in enumerate(words):
        if i == 0 or words[i - 1] not in OF_THE_OUTPUT:
            words[i] = STANDS_FOR.get(word, word)
    if verb == "export":
        words[1] = "made"
    more = [SHORTER.get(verb, ""), OF_THE_FIRST.get((verb, words[0] if words else ""), "")]
    more += [shorter for option, shorter in OF_THE_OPTION.items() if option in words]
    return [verb, *words, *shlex.split(" ".join(more))]


@pytest.fixture
def reader(tmp_path, monkeypatch, request, command, images_of):
    """A folder with what the command reads, in which it runs."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    if command.startswith("tune "):
        monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    images_of(tmp_path / "photos", count=4, size=(64, 64))
    rows = [json.loads(line) | {"aesthetic": 8} for line in Path("photos/metadata.jsonl").read_text().splitlines()]
    Path("photos/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, mode in (("photo.png", "RGB"), ("hole.png", "L")):
        Image.new(mode, (64, 64), "white").save(name)
    Path("prompts.txt").write_text("a cat\na dog\n")
    for name in ("before", "after", "laptop", "server", "workstation"):
        shutil.copy(KEPT, f"{name}.json")
    if "--lora" in command:
        write_loras(request.getfixturevalue("sd15"))
    if "--embedding" in command:
        write_embedding(32)
    fixtures = {"model": "sd15", "sdxl": "sdxl", "bundle": "sd15_bundle", "sdxl-bundle": "sdxl_bundle"}
    fixtures |= {"edm": "edm", "edm-bundle": "edm_bundle"}
    for name in set(here(command)) & set(fixtures):
        shutil.copytree(request.getfixturevalue(fixtures[name]), name)


def write_embedding(width: int) -> None:
    """A file of textual inversion."""
    from safetensors.numpy import save_file

    save_file({"<toy>": np.ones((2, width), np.float32)}, "toy.safetensors")


def write_loras(model: Path) -> None:
    """Two LoRA files for a layer of the model's UNet: a folder of diffusers', and a file."""
    from safetensors.numpy import load_file, save_file

    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    out, into = load_file(model / "unet/diffusion_pytorch_model.safetensors")[f"{layer}.weight"].shape
    Path("my-lora").mkdir()
    for file in ("my-lora/pytorch_lora_weights.safetensors", "style.safetensors"):
        parts = {"lora_A": np.ones((2, into), np.float32), "lora_B": np.ones((out, 2), np.float32)}
        save_file({f"unet.{layer}.{part}.weight": value for part, value in parts.items()}, file)


@pytest.mark.parametrize(
    ("page", "command"),
    [pytest.param(*entry, marks=_marks(entry[1])) for entry in COMMANDS],
    ids=[f"{page}: {command}" for page, command in COMMANDS],
)
def test_a_command_of_a_page_runs(page, command, request, capsys):
    if reason := _needs(command):
        pytest.skip(f"needs {reason}")
    request.getfixturevalue("reader")
    code = main(here(command))
    assert code == 0, capsys.readouterr().err
