"""`accel bench`: what it prints and writes, and wrong use."""

from __future__ import annotations

import argparse
import json

import pytest

from accel.commands import bench as command
from accel.errors import UserError


@pytest.fixture(autouse=True)
def _no_second_of_matrices(monkeypatch):
    monkeypatch.setattr("accel.bench.facts._PEAK_SECONDS", 0.01)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_command_line(smallest_bundle, tmp_path, capsys):
    out, page = tmp_path / "bench.json", tmp_path / "bench.html"
    words = [str(smallest_bundle), "--engines", "onnxruntime", "--rounds", "1", "--steps", "1", "--no-memory"]
    assert command.run(arguments(*words, "--json", "-", "--html", str(page))) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["command"] == "accel bench smallest --engines onnxruntime --steps 1 --rounds 1 --no-memory"
    assert str(smallest_bundle.parent) not in json.dumps(document)
    assert "data:image/png" in page.read_text()
    out.write_text(json.dumps(document))
    assert command.run(arguments("--from", str(out))) == 0
    assert "onnxruntime" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["bundle", "--from", "x.json"]])
def test_wrong_use(words):
    with pytest.raises(SystemExit) as exit:
        command.run(arguments(*words))
    assert exit.value.code == 2


def test_output_files_are_checked_before_measuring(tmp_path):
    with pytest.raises(UserError, match="--json"):
        command.run(arguments("no-such-bundle", "--json", str(tmp_path / "nowhere" / "x.json")))
