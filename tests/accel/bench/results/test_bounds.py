"""What bounds a network is read from measured rates, and named only where they are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accel.bench.results.bounds import COMPUTE, MEMORY, bounds, limit
from accel.bench.results.verdict import clock

ROOT = Path(__file__).parents[4]


@pytest.fixture
def document() -> dict:
    """A saved result, as a run of today would have it: with the memory's rate and the bytes of each call."""
    found = json.loads((ROOT / "benchmarks/digits.json").read_text())
    for scope in found["work"]["scopes"].values():
        if "inputs" in scope:
            scope["io_bytes"] = 1000
    found["environment"]["bandwidth_bytes_per_s"] = 10e9
    return found


def row(document: dict, name: str) -> dict:
    return next(row for row in document["rows"] if row["variant"] == name)


def test_a_network_below_the_machines_balance_is_bound_by_memory(document):
    one = row(document, "onnxruntime")
    peak = document["environment"]["peak_flop_per_s"][one["dtype"]]
    parts = bounds(document, one)
    assert [part.name for part in parts] == list(document["bundle"]["components"])
    for part in parts:
        assert part.intensity == part.flop / part.bytes and part.balance == peak / 10e9
        assert part.least_s == max(part.flop / peak, part.bytes / 10e9)
        assert part.kind == (COMPUTE if part.flop / peak > part.bytes / 10e9 else MEMORY)
        assert part.share == part.least_s / part.took_s and part.took_s == clock(one, part.name)
    document["environment"]["bandwidth_bytes_per_s"] = 1e3
    assert {part.kind for part in bounds(document, one)} == {MEMORY}
    document["environment"]["bandwidth_bytes_per_s"] = 1e18
    assert {part.kind for part in bounds(document, one)} == {COMPUTE}


def test_the_limit_of_an_image_is_the_sum_of_its_networks_and_no_less_than_its_arithmetic(document):
    one = row(document, "onnxruntime")
    both = limit(document, one)
    assert both == sum(part.calls * part.least_s for part in bounds(document, one))
    document["environment"].pop("bandwidth_bytes_per_s")
    assert bounds(document, one) == [] and 0 < limit(document, one) <= both * (1 + 1e-9)


def test_half_the_bytes_are_moved_in_half_precision(document):
    for part in document["bundle"]["components"].values():
        part["weights_bytes"] = None
    one = row(document, "onnxruntime")
    whole = [part.bytes for part in bounds(document, one)]
    document["environment"]["peak_flop_per_s"]["bfloat16"] = 1e12
    one["dtype"] = "bfloat16"
    assert [part.bytes - 1000 for part in bounds(document, one)] == [(bytes - 1000) / 2 for bytes in whole]


def test_a_network_in_int8_is_bounded_by_the_rate_of_int8(document):
    one, peaks = row(document, "onnxruntime"), document["environment"]["peak_flop_per_s"]
    floating = {part.name: part for part in bounds(document, one)}
    document["bundle"]["components"]["unet"]["int8"] = ["int8: 9 layers"]
    assert "unet" not in [part.name for part in bounds(document, one)]  # its rate was not measured
    assert limit(document, one) is not None
    peaks["int8"] = 4 * peaks[one["dtype"]]
    parts = {part.name: part for part in bounds(document, one)}
    assert parts["unet"].balance == 4 * floating["unet"].balance
    assert parts["unet"].least_s == max(parts["unet"].flop / peaks["int8"], parts["unet"].bytes / 10e9)
    assert parts["vae_decoder"] == floating["vae_decoder"]
    assert {part.name: part for part in bounds(document, row(document, "eager"))}["unet"].balance < parts[
        "unet"
    ].balance
    for other in (["not int8: slower"], ["int8-weight-only: 9 layers"]):
        document["bundle"]["components"]["unet"]["int8"] = other
        assert ("unet" in [part.name for part in bounds(document, one)]) is other[0].startswith("not")


def test_another_device_than_the_one_with_the_rates_has_no_bound(document):
    row(document, "onnxruntime")["scopes"]["image"]["peak_fraction"] = None
    assert (
        bounds(document, row(document, "onnxruntime")) == [] and limit(document, row(document, "onnxruntime")) is None
    )
