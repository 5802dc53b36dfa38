"""The command that made a bundle, kept in its manifest."""

from __future__ import annotations

import argparse
import re
import shlex

from ..bundle import Bundle
from ..bundle.manifest import MANIFEST
from ..files import read_json, write_json

_NOT_OF_THE_BUNDLE = ("--overwrite", "--json", "-q", "--quiet", "-v", "--verbose")


def remembering(bundle: Bundle, args: argparse.Namespace) -> Bundle:
    """The bundle with the command in its manifest, for its card: without folders of this machine, or where it went."""
    words, skip = [], False
    for word in args.typed:
        if skip or word in _NOT_OF_THE_BUNDLE or word == args.folder:
            skip = False
        elif word in ("-o", "--out"):
            skip = True
        elif not word.startswith("--out="):
            words.append(re.sub(r"(?:^|(?<==))[/~.][^=]*/", "", word))
    at = bundle.path / MANIFEST
    data = read_json(at, "the manifest")
    data["source"]["command"] = shlex.join(["accel", *words, "--out", "my-bundle"])
    write_json(at, data)
    return Bundle.open(bundle.path)
