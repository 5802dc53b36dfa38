"""`accel bench`: what it prints and writes, and wrong use."""

from __future__ import annotations

import argparse
import json

import pytest

from accel.command_line.parser import Parser, WrongUse
from accel.commands import bench as command
from accel.errors import Notice, UserError


@pytest.fixture(autouse=True)
def _no_second_of_matrices(monkeypatch):
    monkeypatch.setattr("accel.bench.facts._PEAK_SECONDS", 0.01)


def arguments(*words: str) -> argparse.Namespace:
    parser = Parser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_command_line(smallest_bundle, tmp_path, capsys):
    out, page = tmp_path / "bench.json", tmp_path / "bench.html"
    words = [str(smallest_bundle), "--engine", "onnxruntime", "--rounds", "1", "--steps", "1", "--no-memory"]
    assert command.run(arguments(*words, "--json", "--out", str(out), "-o", str(page))) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(out.read_text())
    assert document["command"] == "accel bench smallest --engine onnxruntime --steps 1 --rounds 1 --no-memory"
    assert str(smallest_bundle.parent) not in json.dumps(document)
    assert "data:image/png" in page.read_text()
    assert command.run(arguments("--from", str(out))) == 0
    shown = capsys.readouterr().out
    assert "onnxruntime" in shown and max(map(len, shown.splitlines())) <= 80
    assert command.run(arguments("--from", str(out), "--full")) == 0
    assert "Same image? Against eager fp32" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["bundle", "--from", "x.json"]])
def test_wrong_use(words):
    with pytest.raises(WrongUse, match="accel bench"):
        command.run(arguments(*words))


def test_output_files_are_checked_before_measuring(tmp_path):
    there = tmp_path / "there.html"
    there.write_text("mine")
    for file, problem in {
        tmp_path / "nowhere" / "x.json": "cannot write",
        tmp_path / "x.txt": "json or .html",
        there: "exists already",
    }.items():
        with pytest.raises(UserError, match=problem):
            command.run(arguments("no-such-bundle", "--out", str(file)))
    assert there.read_text() == "mine"


def test_the_old_spelling_of_the_files_is_read_with_a_note(tmp_path):
    with pytest.warns(Notice, match="is now --out"), pytest.raises(UserError, match="cannot write"):
        command.run(arguments("no-such-bundle", "--json", str(tmp_path / "nowhere" / "x.json")))


def test_json_is_a_switch_also_before_the_model():
    with pytest.raises(UserError, match="no such folder: no-such-bundle"):
        command.run(arguments("--json", "no-such-bundle"))
