"""Height and width as inputs: the pipeline's image at every size, and an error outside the profile."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import accel
from accel.bundle import Bundle
from accel.bundle.shape_profiles import Range
from accel.cli import main
from accel.export.pipeline import export_pipeline
from accel.export.single_graph import export
from accel.export.single_graph.sizes import Sizes
from accel.parity import psnr
from accel.sampling import counter_noise
from accel.text.tokenizer import ClipTokenizer


@pytest.fixture(scope="module")
def bundle(smallest_bundle) -> Bundle:
    """Guidance, four steps of a multistep sampler; batch 1-4, 32 to 64 px."""
    return Bundle.open(smallest_bundle)


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sized") / "graph"
    export.write(bundle, out, size=True)
    return out


@pytest.fixture(scope="module")
def onnxruntime(folder):
    session = export.onnxruntime_session(str(folder / "model.onnx"))
    return lambda feeds: session.run(None, feeds)[0]


def compiled(folder: Path):
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    model = pytest.importorskip("openvino").Core().compile_model(folder / "model.onnx", "CPU", hint)
    return lambda feeds: model(feeds)[0]


@pytest.fixture(scope="module")
def openvino(folder):
    return compiled(folder)


@pytest.fixture
def openvino_anew(folder):
    """After an error OpenVINO's CPU plugin fails for sizes within the profile too."""
    return compiled(folder)


@pytest.fixture(scope="module")
def pipe(bundle):
    with accel.load(bundle, "onnxruntime", threads=1) as pipe:
        yield pipe


def feeds(bundle: Bundle, height: int, width: int, images: int = 2) -> dict[str, np.ndarray]:
    ids = ClipTokenizer.from_folder(bundle.path / "tokenizer")(["the cat", ""])
    repeated = {name: np.repeat(row, images, axis=0) for name, row in (("", ids[:1]), ("negative_", ids[1:]))}
    made = {f"{name}input_ids": value for name, value in repeated.items()}
    made |= {name: np.array([side], np.int32) for name, side in (("height", height), ("width", width))}
    return made | {"seed": np.arange(5, 5 + images, dtype=np.int32)}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("height", "width", "images"), [(32, 32, 1), (32, 64, 2), (64, 40, 1), (64, 64, 4)])
def test_every_size_draws_the_pipelines_image(engine, height, width, images, bundle, pipe, request):
    drawn = request.getfixturevalue(engine)(feeds(bundle, height, width, images))
    seeds, scale = list(range(5, 5 + images)), bundle.manifest.pipeline["vae_scale"]
    shape = (4, height // scale, width // scale)
    expected = pipe(
        ["the cat"] * images,
        latents=counter_noise.normal(seeds, 0, shape),
        renoise=lambda i: counter_noise.normal(seeds, i + 1, shape),
        output_type="np",
    ).images
    assert drawn.shape == (images, height, width, 3)
    assert np.abs(drawn - (expected * 255).round()).max() <= 1


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino_anew"])
@pytest.mark.parametrize(
    ("height", "width", "images", "name"),
    [
        (24, 32, 1, "height_has_to_be_32_to_64_in_steps_of_8"),
        (36, 32, 1, "height_has_to_be_32_to_64_in_steps_of_8"),
        (32, 72, 1, "width_has_to_be_32_to_64_in_steps_of_8"),
        (32, 32, 5, "images_has_to_be_1_to_4"),
    ],
)
def test_what_is_outside_the_profile_is_an_error(engine, height, width, images, name, bundle, request):
    with pytest.raises(Exception, match=name):
        request.getfixturevalue(engine)(feeds(bundle, height, width, images))


def test_what_is_written(folder, bundle):
    record = json.loads((folder / "single_graph.json").read_text())
    assert [spec["name"] for spec in record["inputs"]][-3:] == ["seed", "height", "width"]
    assert record["outputs"][0]["shape"] == ["images", "height", "width", 3]
    assert record["profile"]["height"] == {"min": 32, "opt": 32, "max": 64, "multiple": 8}
    assert record["profile"]["images"] == {"min": 1, "opt": 1, "max": 4, "multiple": 1}
    assert record["parity"]["sizes"] == [[32, 32], [32, 64]] and record["parity"]["largest_of_255"] <= 1
    assert {node.domain for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node} == {""}


def test_sizes_that_are_compared_are_the_usual_one_and_one_that_is_not_square():
    sides = {"height": Range(64, 64, 128, 64), "width": Range(64, 64, 64)}
    assert Sizes(sides, 8, given=True).drawn == [(64, 64), (128, 64)]
    sides = {"height": Range(256, 512, 1024, 64), "width": Range(256, 512, 1024, 64)}
    assert Sizes(sides, 8, given=True).drawn == [(512, 512), (256, 1024)]


def test_sdxl_is_told_the_size_that_it_draws(sdxl_bundle, tmp_path):
    record = export.write(Bundle.open(sdxl_bundle), tmp_path / "graph", size=True)
    assert record["parity"]["sizes"] == [(64, 64), (64, 96)] and record["parity"]["largest_of_255"] <= 1


def test_a_bundle_of_one_size_is_refused(tmp_path, capsys):
    words = ["export", "digits/1step-int8", str(tmp_path / "graph"), "--target", "single-graph", "--size-input"]
    assert main(words) == 1
    told = capsys.readouterr().err
    assert "this bundle has one size, 64 x 64" in told and "--profile size=64-128" in told
    assert not (tmp_path / "graph").exists()


def test_the_option_is_for_one_graph(smallest_bundle, tmp_path, capsys):
    assert main(["export", str(smallest_bundle), str(tmp_path / "out"), "--size-input"]) == 1
    assert "--size-input is for one graph" in capsys.readouterr().err


@pytest.mark.slow
def test_the_digits_in_int8(tmp_path):
    """Two graphs, one for ONNX Runtime; each size in its own noise."""
    bundle = export_pipeline("digits/1step", tmp_path / "digits", profile="digits-dynamic", precision="int8")
    record = export.write(bundle, tmp_path / "graph", size=True)
    assert record["graphs"] == ["model.onnx", "model.uint8.onnx"] and record["parity"]["sizes"] == [(64, 64), (64, 128)]
    ids = ClipTokenizer.from_folder(bundle.path / "tokenizer")(["a handwritten seven"])
    given = {"input_ids": ids, "seed": np.array([3], np.int32)}
    given |= {name: np.array([side], np.int32) for name, side in (("height", 128), ("width", 64))}
    drawn = export.onnxruntime_session(str(tmp_path / "graph/model.uint8.onnx"), export.OFF_FOR_INT8).run(None, given)[
        0
    ]
    with accel.load(bundle, "onnxruntime", threads=1) as pipe:
        noise = counter_noise.normal([3], 0, (4, 16, 8))
        expected = pipe("a handwritten seven", latents=noise, output_type="np").images * 255
    assert psnr(drawn.astype(np.float32), expected, 255.0) > 30
