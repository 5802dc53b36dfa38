"""The verbs of the command line, each a module of this folder that is imported when it is used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ..command_line.options import add_general
from ..command_line.parser import Parser

VERBS = {
    "doctor": "check which engines run on this machine, and how to fix the others",
    "demo": "export, run and compare the small models in this package: end to end, offline, about a minute",
    "export": "export a diffusers pipeline to a bundle of checked ONNX graphs that every engine and app can load",
    "build": "build engine files of a bundle: TensorRT for this GPU or RTX cards, AOTInductor for this machine",
    "trust": "trust engine files that somebody else built",
    "distill": "train a small or few-step student of a pipeline, fine-tune one, or train a LoRA",
    "run": "make images from prompts, with a bundle on any engine or with a pipeline as it is",
    "serve": "serve models over HTTP with OpenAI's and A1111's API; requests share UNet calls step by step",
    "bench": "measure speed, memory and image differences of the engines, eager against compiled, in one table",
    "report": "show results of bench as a page or table, and compare runs and machines with each other",
    "studio": "compare two engines by eye on one prompt, in a browser on this machine",
    "tune": "find the fastest engine for each network of a bundle on this machine, and let `auto` take it",
    "evaluate": "measure the image quality of a model by a named protocol (FID, CLIP score, prompt accuracy)",
    "inspect": "show what a bundle contains, whether it is intact and whether it runs here",
    "push": "put a bundle on the Hugging Face hub, with a card of what it is and what was measured",
    "list": "list the models, recipes, profiles, protocols, samplers and engines that there are by name",
    "completion": "print a script that completes accel's verbs and options in your shell",
}
# Verbs that lie in a folder of this one.
_FOLDERS = {"report": "show", "studio": "show", "tune": "measure", "push": "share"}


def verb(name: str) -> tuple[ModuleType, Parser]:
    """The module of a verb and its parser."""
    path = f"{_FOLDERS[name]}.{name}" if name in _FOLDERS else name
    module = import_module(f"accel.commands.{path}")
    parser = Parser(prog=f"accel {name}", description=VERBS[name], example=module.EXAMPLE)
    module.add_arguments(parser)
    add_general(parser)
    return module, parser
