"""`accel report`: results of any age as a page, a table or data, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from accel.cli import main

OLD = Path(__file__).parents[4] / "benchmarks"


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(OLD / "digits.json", "before.json")
    shutil.copy(OLD / "sd15-tiny-256.json", "after.json")
    return tmp_path


def test_one_result_is_a_sentence_and_a_table_and_a_page(results, capsys):
    assert main(["report", "before.json", "--out", "x.html"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("openvino draws the same image 2.65 times as fast as eager")
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    assert main(["report", "x.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("before.json").read_text())


def test_several_are_compared(results, capsys):
    assert main(["report", "before.json", "after.json", "before.json", "--out", "x.html"]) == 0
    shown = capsys.readouterr().out
    assert "before (1)" in shown and "before (3)" in shown and "x.html: the page" in shown
    assert "<html" in Path("x.html").read_text()
    assert main(["report", "before.json", "after.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "accel-report/1" and not found["same_work"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.json"], "missing"),
        (["before.json", "--out", "x.txt"], "written as .html"),
        (["before.json", "--out", "nowhere/x.html"], "cannot write a file there"),
        (["before.json", "--out", "there.html"], "exists already"),
        (["other.json"], "not a benchmark result"),
        (["damaged.json"], "is damaged"),
    ],
)
def test_what_is_wrong_is_said(results, capsys, words, message):
    Path("there.html").write_text("mine")
    Path("other.json").write_text("{}")
    broken = json.loads(Path("before.json").read_text())
    del broken["work"]["steps"]
    Path("damaged.json").write_text(json.dumps(broken))
    assert main(["report", *words]) == 1
    assert message in capsys.readouterr().err and Path("there.html").read_text() == "mine"
