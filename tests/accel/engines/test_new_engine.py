"""A new engine touches two places: its module, and its line in the table. Everything else knows it from there."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

import accel
from accel import bench
from accel.bundle import Bundle
from accel.cli import main
from accel.engines import choose, eager, select
from accel.engines.base import Status
from accel.errors import UserError
from accel.parity import relative_l2


@pytest.fixture(autouse=True)
def toy(monkeypatch, fakes):
    """The engine `toy`: an importable module, and a line in `ENGINES` after onnxruntime's."""
    module = fakes("toy_engine")
    monkeypatch.setitem(sys.modules, "toy_engine", module)
    before = select.ENGINES
    names = list(before.items())
    at = list(before).index("onnxruntime") + 1
    table = dict([*names[:at], ("toy", "toy_engine"), *names[at:]])
    for other in list(sys.modules.values()):  # the table is imported by name
        if getattr(other, "ENGINES", None) is before:
            monkeypatch.setattr(other, "ENGINES", table)
    return module


def test_its_tensors_are_those_of_the_other_engines(smallest_bundle):
    ids = np.arange(77, dtype=np.int64)[None] % 50
    ours = accel.load_engine(smallest_bundle, "text_encoder", "toy")(input_ids=ids)
    theirs = accel.load_engine(smallest_bundle, "text_encoder", "onnxruntime")(input_ids=ids)
    assert relative_l2(ours["last_hidden_state"], theirs["last_hidden_state"]) < 1e-4


def test_run_makes_the_same_image(smallest_bundle, tmp_path, capsys):
    images = {}
    for engine in ("toy", "onnxruntime"):
        out = tmp_path / f"{engine}.png"
        words = ["--prompt", "the cat", "--steps", "1", "--width", "32", "--height", "32", "--json", "--out", str(out)]
        assert main(["run", str(smallest_bundle), "--engine", engine, *words]) == 0
        assert engine in json.loads(capsys.readouterr().out)["engines"]["unet"]
        images[engine] = np.asarray(Image.open(out)).astype(int)
    assert abs(images["toy"] - images["onnxruntime"]).max() <= 1


def test_bench_measures_it(smallest_bundle, capsys, monkeypatch):
    monkeypatch.setattr("accel.bench.facts._PEAK_SECONDS", 0.01)
    words = ["--engines", "toy,toy:cpu", "--steps", "1", "--rounds", "1", "--no-memory", "--json", "-"]
    assert main(["bench", str(smallest_bundle), *words, "--width", "32", "--height", "32"]) == 0
    rows = {row["variant"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["toy"]["status"] == "measured" and rows["toy"]["parity"]["unet"]["relative_l2"] < 1e-4
    assert rows["toy:cpu"]["description"] == "toy, cpu, fp32" and rows["toy:cpu"]["dtype"] == "float32"


def test_the_default_benchmark_has_its_variants():
    assert [v.name for v in bench.chosen(None) if v.engine == "toy"] == ["toy", "toy:fp16"]
    assert bench.parse("toy:fp16:cpu").options == {"dtype": "fp16", "device": "cpu"}
    with pytest.raises(UserError, match="one of: toy, toy:fp32, toy:fp16, toy:cpu"):
        bench.parse("toy:gpu")


def test_inspect_and_doctor_say_whether_it_runs(smallest_bundle, capsys, monkeypatch, toy):
    for words in (["doctor", "--fast", "--json"], ["inspect", str(smallest_bundle), "--no-verify", "--json"]):
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out)["engines"]["toy"]["ok"] is True
    monkeypatch.setattr(toy, "find_spec", lambda name: None)
    assert main(["doctor", "--fast"]) == 0
    assert "no   toy           onnxruntime is not installed\n" in capsys.readouterr().out


def test_help_names_it_with_the_options_that_it_takes(capsys):
    for verb in ("run", "evaluate", "bench"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "eager, compile, aoti, toy, onnxruntime, openvino, tensorrt" in text
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "the bundle's own (eager, compile, aoti, toy, openvino)" in text
    assert "CPU threads (onnxruntime, openvino)" in text


def test_auto_takes_it_in_the_order_of_the_table_and_only_where_it_says_so(smallest_bundle, monkeypatch, toy):
    component = Bundle.open(smallest_bundle).component("unet")
    usable = {"toy", "compile", "eager"}
    monkeypatch.setattr(select, "status", lambda name: Status(name in usable, name))
    assert choose("auto", component) == "toy"
    assert choose("auto", component, device="cuda") == "eager"  # of its facts, `auto` names the CPU alone
    usable |= {"onnxruntime"}
    assert choose("auto", component) == "onnxruntime"
    usable -= {"onnxruntime", "toy"}
    assert choose("auto", component) == "eager" and "compile" in usable and eager.FACTS.auto
    with pytest.raises(UserError, match="unknown engine 'toys'\n.*did you mean toy.*onnxruntime"):
        select.facts("toys")
