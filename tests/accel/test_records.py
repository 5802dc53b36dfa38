"""JSON objects to frozen dataclasses: what is read, and what an error names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from accel import records


@dataclass(frozen=True)
class Limits:
    low: int
    high: int | None = None


@dataclass(frozen=True)
class Part:
    name: str
    shape: tuple[int | str, ...]
    limits: Mapping[str, Limits]
    scale: float = 1.0
    ready: bool = False
    note: str | None = None
    more: Any = None


WHOLE = {
    "name": "unet",
    "shape": [1, "batch"],
    "limits": {"batch": {"low": 1, "high": 4}},
    "scale": 2,
    "ready": True,
    "note": None,
    "more": [{}],
    "later": "a key of another version",
}


def test_a_record_comes_back_from_its_json():
    found = records.read(Part, WHOLE, "part")
    assert found == Part("unet", (1, "batch"), {"batch": Limits(1, 4)}, 2, True, None, [{}])
    assert records.read(Part, json.loads(json.dumps(asdict(found))), "part") == found
    assert records.read(Part, {"name": "x", "shape": [], "limits": {}}, "part") == Part("x", (), {})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"name": 7}, "part: name: expected a string, got 7"),
        ({"shape": "12"}, "part: shape: expected a list, got '12'"),
        ({"shape": [1, None]}, "part: shape.1: expected an integer, got None"),
        ({"limits": {"batch": {"low": "x"}}}, "part: limits.batch.low: expected an integer, got 'x'"),
        ({"limits": {"batch": {"low": True}}}, "part: limits.batch.low: expected an integer, got True"),
        ({"limits": {"batch": {"low": 1.0}}}, "part: limits.batch.low: expected an integer, got 1.0"),
        ({"limits": {"batch": {}}}, "part: limits.batch.low: missing"),
        ({"limits": []}, "part: limits: expected a JSON object, got []"),
        ({"scale": "2"}, "part: scale: expected a number, got '2'"),
        ({"ready": 1}, "part: ready: expected true or false, got 1"),
        ({"note": 7}, "part: note: expected a string, got 7"),
    ],
)
def test_an_error_names_the_path_and_the_value(changes, error):
    with pytest.raises(ValueError) as caught:
        records.read(Part, WHOLE | changes, "part")
    assert str(caught.value) == error


def test_what_is_no_object_at_all_is_named():
    with pytest.raises(ValueError, match=r"^part: expected a JSON object, got \[\]$"):
        records.read(Part, [], "part")


def test_a_dict_of_kinds_checks_the_keys_that_an_object_must_have():
    part = {"name": str}
    kind = {"size": {"low": int}, "parts": list[part], "files": Mapping[str, {"bytes": int}]}
    whole = {"size": {"low": 1}, "parts": [{"name": "a"}], "files": {"x": {"bytes": 1}}}
    assert records.read(kind, whole | {"other": 1}, "object") == whole
    for changes, error in (
        ({"size": {}}, "object: size.low: missing"),
        ({"parts": ["a"]}, "object: parts.0: expected a JSON object, got 'a'"),
        ({"files": {"x": {"bytes": "1"}}}, "object: files.x.bytes: expected an integer, got '1'"),
    ):
        with pytest.raises(ValueError, match=f"^{error}"):
            records.read(kind, whole | changes, "object")
