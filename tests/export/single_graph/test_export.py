"""One graph draws what the pipeline draws: samplers, guidance, SDXL, engines; and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import accel
from accel.bundle import Bundle
from accel.cli import main
from accel.errors import UserError
from accel.export.pipeline import export_pipeline
from accel.export.single_graph import export, refusals, tokenizer
from accel.export.single_graph.compose import Job, compose
from accel.export.single_graph.merge import gather_weights
from accel.export.single_graph.sizes import of_bundle
from accel.export.single_graph.steps import check
from accel.models.weight_files import read_header
from accel.pipeline.request import latent_size
from accel.pipeline.sampling_plan import plan
from accel.sampling import counter_noise
from accel.text.tokenizer import ClipTokenizer


@pytest.fixture(scope="module")
def guided(smallest_bundle, tmp_path_factory) -> Path:
    """A float model with guidance, in four steps of a multistep sampler."""
    out = tmp_path_factory.mktemp("guided") / "graph"
    export.write(Bundle.open(smallest_bundle), out)
    return out


def feeds(bundle: Bundle, texts: list[str], seeds: list[int]) -> dict[str, np.ndarray]:
    tokenizer = ClipTokenizer.from_folder(bundle.path / "tokenizer")
    made = {"input_ids": tokenizer(texts), "negative_input_ids": tokenizer(["blurry"] * len(texts))}
    return made | {"seed": np.array(seeds, np.int32)}


def expected(bundle: Bundle, texts: list[str], seeds: list[int], **call) -> np.ndarray:
    """The pipeline's images with the graph's noise, uint8 values [N, H, W, 3]."""
    with accel.load(bundle, "onnxruntime", threads=1) as pipe:
        shape = (4, *latent_size(bundle.manifest, None, None, None))
        images = pipe(
            texts,
            negative_prompt=["blurry"] * len(texts),
            latents=counter_noise.normal(seeds, 0, shape),
            renoise=lambda i: counter_noise.normal(seeds, i + 1, shape),
            output_type="np",
            **call,
        ).images
    return (images * 255).round()


@pytest.mark.parametrize("count", [1, 3])
def test_onnxruntime_and_openvino_draw_the_pipelines_images(guided, smallest_bundle, count):
    bundle, texts, seeds = Bundle.open(smallest_bundle), ["the cat", "a dog", "the"][:count], [3, 2**31 - 1, 5][:count]
    wanted = expected(bundle, texts, seeds)
    inputs = feeds(bundle, texts, seeds)
    (drawn,) = export.onnxruntime_session(str(guided / "model.onnx")).run(None, inputs)
    assert drawn.dtype == np.uint8 and np.abs(drawn - wanted).max() <= 1
    openvino = pytest.importorskip("openvino")
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(guided / "model.onnx", "CPU", hint)
    assert np.abs(compiled(inputs)[0] - wanted).max() <= 1


def test_a_float16_bundle_draws_its_pipelines_images(smallest, tmp_path):
    sampler = {"name": "dpmpp_2m", "steps": 2, "guidance": 5}
    bundle = export_pipeline(
        smallest, tmp_path / "fp16", precision="fp16", profile="batch=1-2,size=32", sampler=sampler
    )
    export.write(bundle, tmp_path / "graph")
    model = onnx.load(tmp_path / "graph" / "model.onnx", load_external_data=False)
    kinds = [tensor.data_type for tensor in model.graph.initializer]
    assert kinds.count(onnx.TensorProto.FLOAT16) > len(kinds) / 2
    texts, seeds = ["the cat", "a dog"], [3, 5]
    inputs = feeds(bundle, texts, seeds)
    (drawn,) = export.onnxruntime_session(str(tmp_path / "graph" / "model.onnx")).run(None, inputs)
    assert np.abs(drawn - expected(bundle, texts, seeds)).max() <= 2  # both round, in another order of fusions


def test_what_is_written(guided, smallest_bundle):
    record = json.loads((guided / "single_graph.json").read_text())
    assert [spec["name"] for spec in record["inputs"]] == ["input_ids", "negative_input_ids", "seed"]
    assert record["outputs"][0]["name"] == "image" and record["outputs"][0]["dtype"] == "uint8"
    assert record["parity"]["largest_of_255"] <= 1 and record["bundle"] == Bundle.open(smallest_bundle).digest
    for name, entry in record["files"].items():
        assert (guided / name).stat().st_size == entry["bytes"]
    model = onnx.load(guided / "model.onnx", load_external_data=False)
    (loop,) = [node for node in model.graph.node if node.op_type == "Loop"]
    calls = [
        node for node in loop.attribute[0].g.node if node.op_type == "Conv" and "unet/conv_in.weight" in node.input
    ]
    assert len(calls) == 1  # whatever the number of steps
    assert {node.domain for node in model.graph.node} == {""}


def test_weights_are_there_once_as_they_were(guided, smallest_bundle):
    from safetensors.numpy import load_file

    merged = load_file(guided / "weights.safetensors")
    for component in ("text_encoder", "unet", "vae_decoder"):
        own = load_file(smallest_bundle / component / "model.safetensors")
        found = {name: value for name, value in merged.items() if name.startswith(f"{component}/")}
        assert found and all(np.array_equal(value, own[name.partition("/")[2]]) for name, value in found.items())
    length, header = read_header(guided / "weights.safetensors")
    assert (8 + length) % 64 == 0
    assert all(entry["data_offsets"][0] % 4 == 0 for name, entry in header.items() if name != "__metadata__")


SAMPLERS = {
    "dmd2": {},
    "lcm": {},
    "tcd": {"eta": 0.4},
    "ddim": {"eta": 0.7},
    "ddpm": {},
    "euler": {},
    "euler_ancestral": {},
    "heun": {},
    "lms": {},
    "pndm": {},
    "deis": {},
    "unipc": {},
    "dpmpp_3m": {},
    "dpmpp_2m_sde": {},
    "dpmpp_3s": {},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_the_pipelines(name, smallest_bundle, tmp_path):
    bundle, options = Bundle.open(smallest_bundle), SAMPLERS[name]
    guidance = 0.0 if name in ("dmd2", "lcm", "tcd") else 4.0
    call = dict(sampler=name, steps=4, guidance_scale=guidance, **options)
    chosen = plan(bundle.manifest, bundle.noise_schedule(), name, 4, None, guidance, None, options)
    job = Job(bundle, chosen, of_bundle(bundle.manifest), 1)
    model = compose(job)
    sources = {part: bundle.file(bundle.component(part).weights) for part in ("text_encoder", "unet", "vae_decoder")}
    gather_weights([model], sources, tmp_path / "weights.safetensors")
    onnx.save(model, tmp_path / "model.onnx")
    inputs = {
        key: value for key, value in feeds(bundle, ["the cat"], [11]).items() if key in {s.name for s in job.inputs}
    }
    (drawn,) = export.onnxruntime_session(str(tmp_path / "model.onnx")).run(None, inputs)
    assert np.abs(drawn - expected(bundle, ["the cat"], [11], **call)).max() <= 1


def test_sdxl_has_two_encoders_and_its_sizes(sdxl_bundle, tmp_path):
    record = export.write(Bundle.open(sdxl_bundle), tmp_path / "graph")
    assert record["parity"]["largest_of_255"] <= 1
    assert {spec["name"] for spec in record["inputs"]} >= {"input_ids", "input_ids_2", "seed"}


def test_the_command_writes_int8_for_every_engine(tmp_path, capsys):
    out = tmp_path / "digits"
    assert main(["export", "digits/4step-int8", str(out), "--target", "single-graph"]) == 0
    told = capsys.readouterr().out
    assert "model.onnx, model.uint8.onnx" in told and "input_ids, seed to an image" in told
    assert main(["export", "digits/4step-int8", str(out), "--target", "single-graph"]) == 1  # it is there already
    assert main(["export", "digits/4step-int8", str(out), "--target", "single-graph", "--overwrite", "--json"]) == 0
    parity = json.loads(capsys.readouterr().out)["parity"]
    assert parity["psnr"] is None or parity["psnr"] > 30


def test_an_image_that_differs_is_refused_and_nothing_is_left(smallest_bundle, tmp_path, monkeypatch):
    real = export._drawn
    monkeypatch.setattr(export, "_drawn", lambda graph, job: ([image // 2 for image in real(graph, job)[0]], {}))
    with pytest.raises(UserError, match="differ from the pipeline's"):
        export.write(Bundle.open(smallest_bundle), tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(smallest_bundle, tmp_path):
    def stop(stage: str, done: float) -> None:
        if stage == "drawing with the graph":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.write(Bundle.open(smallest_bundle), tmp_path / "graph", progress=stop)
    assert list(tmp_path.iterdir()) == []


def _with_input(name: str):
    spec = {"name": name, "dtype": "float32", "shape": [1]}
    return lambda data: data["components"]["unet"]["inputs"].append(spec)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data["components"].pop("vae_decoder"), "no graph of its vae_decoder"),
        (_with_input("image_embeds"), "IP-Adapter"),
        (_with_input("down_block_0"), "takes down_block_0 too"),
        (lambda data: data["profile"].update(vae_tile=512), "tiles"),
    ],
)
def test_what_needs_more_than_a_prompt_is_refused(smallest_bundle, tmp_path, edit_manifest, change, reason):
    copy = Path(shutil.copytree(smallest_bundle, tmp_path / "bundle"))
    edit_manifest(copy, change)
    with pytest.raises(UserError, match=reason) as caught:
        export.write(Bundle.open(copy), tmp_path / "graph")
    assert caught.value.fix and not (tmp_path / "graph").exists()


def test_a_controlnet_is_refused(smallest_bundle):
    bundle = Bundle.open(smallest_bundle)
    parts = dict(bundle.manifest.components) | {"controlnet": bundle.component("unet")}
    with pytest.raises(UserError, match="has a controlnet, which is shown an image"):
        refusals.check(replace(bundle, manifest=replace(bundle.manifest, components=parts)))


def test_dynamic_thresholding_is_refused(smallest_bundle):
    bundle = Bundle.open(smallest_bundle)
    chosen = plan(bundle.manifest, bundle.noise_schedule(), None, None, None, None, None)
    from accel.sampling.linear import Clip

    with pytest.raises(UserError, match="quantile"):
        check(replace(chosen.table, clip=Clip(1.0, 0.995)), "dpmpp_2m")
    with pytest.raises(UserError, match="loop of its own"):
        check(None, "mine")


PROMPTS = ["a handwritten seven", "  The CAT's   42 dogs,\tin 3D!! ", "", "word " * 100, "don't, WE'LL; (x:1.3) ~#@"]
PROMPTS += ["naïve café ÅNGSTRÖM", "雪の中の狐 🦊"]


def test_text_is_the_input_with_the_tokenizer_of_onnxruntime_extensions(smallest_bundle, guided, tmp_path):
    pytest.importorskip("onnxruntime_extensions")
    bundle = Bundle.open(smallest_bundle)
    record = export.write(bundle, tmp_path / "text", text=True)
    assert [spec["name"] for spec in record["inputs"]] == ["prompt", "negative_prompt", "seed"]
    seeds = np.arange(len(PROMPTS), dtype=np.int32)
    ids = feeds(bundle, PROMPTS, seeds.tolist())
    (expected,) = export.onnxruntime_session(str(guided / "model.onnx")).run(None, ids)
    session = export.onnxruntime_session(str(tmp_path / "text" / "model.onnx"), (), tokenizer.library())
    texts = {"prompt": np.array(PROMPTS, object), "negative_prompt": np.array(["blurry"] * len(PROMPTS), object)}
    drawn = session.run(None, texts | {"seed": seeds})[0]
    assert np.array_equal(drawn, expected)
