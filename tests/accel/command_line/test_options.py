"""Options that several verbs share."""

from __future__ import annotations

import warnings

import pytest

from accel.command_line.options import add_engine, engine_of
from accel.command_line.parser import Parser, WrongUse, renamed
from accel.errors import Notice


def test_an_old_name_of_an_option_is_read_with_a_note_and_absent_from_the_help():
    parser = Parser()
    parser.add_argument("--size", type=int, choices=(1, 2), default=1)
    parser.add_argument("--fast", action="store_true")
    renamed(parser, "--length", "--size")
    renamed(parser, "--quick", "--fast")
    with pytest.warns(Notice, match="--length is now --size"):
        assert vars(parser.parse_args(["--length", "2"])) == {"size": 2, "fast": False}
    with pytest.warns(Notice, match="--quick is now --fast"):
        assert vars(parser.parse_args(["--quick"])) == {"size": 1, "fast": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vars(parser.parse_args(["--size", "2"])) == {"size": 2, "fast": False}
    with pytest.raises(WrongUse):
        parser.parse_args(["--length", "3"])
    assert "--length" not in parser.format_help() and "--quick" not in parser.format_help()


def test_plan_is_still_read_as_the_key_of_an_engine_file():
    parser = Parser()
    add_engine(parser)
    with pytest.warns(Notice, match="--plan is now --engine-file"):
        assert engine_of(parser.parse_args(["--plan", "0123"])) == ("auto", {"engine_file": "0123"})


def test_an_engine_takes_precision_and_device_behind_its_name():
    parser = Parser()
    add_engine(parser)
    assert engine_of(parser.parse_args(["--engine", "eager:bf16:cpu"])) == ("eager", {"dtype": "bf16", "device": "cpu"})
    assert engine_of(parser.parse_args(["--engine", "openvino", "--precision", "fp16"])) == (
        "openvino",
        {"dtype": "fp16"},
    )
    with pytest.raises(WrongUse, match="unknown variant 'openvino:cuda'"):
        parser.parse_args(["--engine", "openvino:cuda"])
