"""The verdict says what the figures say, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accel.bench.results import comparison, verdict
from accel.bench.results.bounds import limit
from accel.bench.timing import apart

ROOT = Path(__file__).parents[4]


@pytest.fixture
def document() -> dict:
    return json.loads((ROOT / "benchmarks/digits.json").read_text())


def row(document: dict, name: str) -> dict:
    return next(row for row in document["rows"] if row["variant"] == name)


def test_the_fastest_engine_with_the_same_image_is_named(document):
    assert verdict.sentence(document) == (
        "openvino draws the same image 2.65 times as fast as eager and 1.53 times as fast as torch.compile: "
        "285 ms instead of 755 ms."
    )


def test_a_call_of_several_images_is_called_so(document):
    document["work"]["batch"] = 4
    assert verdict.sentence(document).endswith("285 ms instead of 755 ms a call of 4 images.")


def test_an_image_that_differs_is_not_called_the_same(document):
    row(document, "openvino")["parity"]["image"] |= {"max_abs": 40.0, "psnr": 22.0}
    assert verdict.sentence(document).startswith("onnxruntime draws the same image 2.54 times")
    document["rows"] = [row(document, "eager"), row(document, "openvino")]
    assert verdict.sentence(document).startswith("openvino is 2.65 times as fast as eager")
    assert verdict.sentence(document).endswith("22.0 dB PSNR from eager's.")


@pytest.mark.parametrize(
    ("speedup", "words"),
    [
        (
            {"ratio": 1.02, "low": 0.9, "high": 1.1},
            "the same image about as fast as eager: 1.02 times, with a spread of 0.90 to 1.10",
        ),
        ({"ratio": 0.8, "low": 0.7, "high": 0.9}, "No engine is faster than eager here: openvino, the nearest"),
    ],
)
def test_no_speed_up_is_not_called_one(document, speedup, words):
    document["rows"] = [row(document, "eager"), row(document, "openvino")]
    row(document, "openvino")["scopes"]["image"]["speedup"]["eager"] = speedup
    assert words in verdict.sentence(document)


def test_a_low_precision_is_compared_with_its_own_noise_floor(document):
    assert verdict.likeness(document, row(document, "eager:bf16"))[0] == verdict.NEAR
    row(document, "eager:bf16")["parity"]["image"]["psnr"] -= 10
    assert verdict.likeness(document, row(document, "eager:bf16"))[0] == verdict.DIFFERS
    row(document, "eager:bf16")["parity"]["image"]["finite"] = False
    assert "NaN" in verdict.likeness(document, row(document, "eager:bf16"))[1]


def test_nothing_compiled_is_said_to_be_nothing_to_compare(document):
    document["rows"] = [row(document, "eager"), row(document, "openvino:bf16")]
    assert verdict.sentence(document) == (
        "No compiled engine was measured, so there is nothing to compare (the picture is NaN or infinite)."
    )


def test_the_roofline_is_below_every_time_and_the_parts_make_the_whole(document):
    for one in document["rows"]:
        whole = verdict.clock(one)
        if whole:
            assert 0 < limit(document, one) < whole
            assert sum(verdict.seconds_per_part(document, one).values()) >= whole - 1e-9


def test_int8_is_read_from_the_component_or_from_an_old_note(document):
    assert verdict.int8(document) == []
    document["bundle"]["components"]["unet"]["int8"] = ["not int8: images 12 dB from float32's"]
    assert verdict.int8(document) == [("unet", "rejected", ["not int8: images 12 dB from float32's"])]
    del document["bundle"]["components"]["unet"]["int8"]
    document["notes"].append(
        "unet is int8, and eager rounds as it does; what it measured against float32: int8: 9 layers"
    )
    assert verdict.int8(document) == [("unet", "accepted", ["int8: 9 layers"])]


# Several results


def test_the_same_samples_are_no_difference_and_half_the_time_is_faster():
    samples = [1.0, 1.1, 0.9, 1.05, 0.95]
    same, half = apart(samples, samples), apart(samples, [x / 2 for x in samples])
    assert same.ratio == 1 and same.low < 1 < same.high
    assert half.ratio == pytest.approx(2) and half.low > 1
    assert apart(samples, samples[:3]).low is None and apart([], samples) is None


def test_runs_are_compared_by_variant(document):
    faster = json.loads(json.dumps(document))
    timing = row(faster, "onnxruntime")["scopes"]["image"]["timing"]
    timing["samples_s"] = [x / 2 for x in timing["samples_s"]]
    timing["p50_s"] /= 2
    faster["environment"]["machine"]["packages"]["onnxruntime"] = "9.9"
    faster["rows"] = [one for one in faster["rows"] if one["variant"] != "compile"]
    found = comparison.compare([document, faster], ["x", "x"])
    assert [run["name"] for run in found["runs"]] == ["x (1)", "x (2)"]
    assert found["same_work"] and found["differences"] == {"onnxruntime": ["1.31.1", "9.9"]}
    entries = {variant["variant"]: variant["runs"] for variant in found["variants"]}
    assert entries["compile"][1] is None
    assert entries["onnxruntime"][1]["speedup"]["ratio"] == pytest.approx(2)
    assert comparison.outcome(entries["onnxruntime"][1]["speedup"]) == "faster"
    assert comparison.outcome(entries["eager"][1]["speedup"]) == "no difference"
    assert comparison.sentence(found).startswith(
        "Against x (1), x (2) is faster: onnxruntime (2.00 times); no different"
    )


def test_different_work_is_not_compared(document):
    other = json.loads(json.dumps(document))
    other["work"]["steps"] = 4
    found = comparison.compare([document, other], ["a", "b"])
    assert not found["same_work"] and "steps differ" in comparison.sentence(found)
    assert all(cell == "-" for line in comparison.table(found)[2] for cell in line[3:])


def test_a_variant_that_the_first_run_lacks_has_no_ratio(document):
    first = json.loads(json.dumps(document))
    first["rows"] = [one for one in first["rows"] if one["variant"] != "openvino"]
    found = comparison.compare([first, document, document], ["a", "b", "c"])
    entries = {variant["variant"]: variant["runs"] for variant in found["variants"]}["openvino"]
    assert entries[0] is None and entries[1]["speedup"] is None and entries[2]["speedup"] is None
