"""The tutorial, typed from top to bottom: one folder, one reader, the digits."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from accel.cli import main

PAGE = Path(__file__).parents[1] / "docs/tutorial.md"


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr("accel.bench.facts._PEAK_SECONDS", 0.01)


@pytest.mark.usefixtures("_quick")
def test_the_tutorial_does_what_it_says(tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    typed = 0
    for language, text in blocks():
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            assert words[0] == "accel"
            assert main(words[1:]) == 0, (line, capsys.readouterr().err)
            typed += 1
    assert typed == 9
    seven, compiled, int8 = (np.asarray(Image.open(f"{name}.png"), float) for name in ("seven", "compiled", "int8"))
    assert abs(seven - compiled).max() <= 1  # "shows the same seven"
    assert 0 < abs(seven - int8).mean() < 10
    assert Path("three.png").is_file() and "draws the same image" in Path("bench.html").read_text()
