"""A pipeline with a safety checker draws diffusers' images, the black ones included, on every engine."""

from __future__ import annotations

import json
import shutil
import warnings

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import accel
from accel.bundle import Bundle, finalize
from accel.errors import Notice, UserError
from accel.models.source import open_source
from accel.pipeline import opened
from accel.safety import SafetyChecker
from accel.safety.preprocessing import FILE

FOUND = [True, True, False, False, False, False]
pytestmark = pytest.mark.filterwarnings("ignore::accel.errors.Notice")


def is_theirs(output, drawn) -> bool:
    """Whether an output is diffusers' own: the same verdicts, and the same pixels within 1/255, black ones exactly."""
    black = np.array(drawn.nsfw_content_detected)
    assert drawn.images[~black].std() > 0.01
    same = np.abs(output.images - drawn.images).max() < 1 / 255 and (output.images[black] == 0).all()
    return output.nsfw_content_detected == drawn.nsfw_content_detected == FOUND and bool(same)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_pipeline_folder_equals_diffusers(checked, drawn, call, low_memory):
    with accel.load(checked, "eager", low_memory=low_memory) as pipe:
        with pytest.warns(Notice, match="images 1, 2 of 6 are black: the safety checker rejected") as said:
            output = pipe(**call, output_type="np")
    assert is_theirs(output, drawn) and output.seconds["safety_checker"] > 0
    assert "2 of them black" in repr(output) and output.rejected == 2
    assert any(warning.filename == __file__ for warning in said)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_a_bundle_equals_diffusers_on_every_engine(checked_bundle, drawn, call, engine):
    """In two chunks of at most four images."""
    pipe = accel.load(checked_bundle, engine)
    output = pipe(**call, sampler="pndm", output_type="np")
    assert is_theirs(output, drawn)
    assert "safety_checker" in pipe.engines.descriptions and "safety_checker" in repr(pipe)


def test_every_form_of_output_has_the_verdicts(checked, drawn, call):
    pipe = accel.load(checked, "eager")
    images, nsfw = pipe(**call, return_dict=False)
    assert nsfw == FOUND and [image.getextrema() == ((0, 0),) * 3 for image in images] == FOUND
    output = pipe(**call, output_type="pt")
    assert output.nsfw_content_detected == FOUND and (output.images[:2] == 0).all()
    output = pipe(**call, output_type="latent")  # which nobody looks at, as in diffusers
    assert output.nsfw_content_detected is None and not (output.images[0] == 0).all()
    assert pipe(**call, output_type="latent", return_dict=False)[1] is None
    alone = call | {"prompt": call["prompt"][2], "latents": call["latents"][2:3]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert pipe(**alone).nsfw_content_detected == [False]
    alone = call | {"prompt": call["prompt"][0], "latents": call["latents"][:1]}
    with pytest.warns(Notice, match="the image is black"):
        assert pipe(**alone).nsfw_content_detected == [True]


def test_other_sizes_are_checked_too(checked, call):
    reference = diffusers.StableDiffusionPipeline.from_pretrained(checked)
    reference.set_progress_bar_config(disable=True)
    shape = dict(height=48, width=80, latents=torch.randn(6, 4, 12, 20, generator=torch.manual_seed(4)))
    expected = reference(**call | shape, output_type="np")
    output = accel.load(checked, "eager")(**call | shape, output_type="np")
    assert output.nsfw_content_detected == expected.nsfw_content_detected
    assert np.abs(output.images - expected.images).max() < 1 / 255


@pytest.mark.parametrize("off", [False, None])
def test_it_can_be_switched_off(checked, checked_bundle, drawn, call, off):
    for model in (checked, checked_bundle):
        pipe = accel.load(model, "eager", safety_checker=off)
        output = pipe(**call, sampler="pndm", output_type="np")
        assert output.nsfw_content_detected is None and "safety_checker" not in pipe.engines
        assert (output.images[:2].std(axis=(1, 2, 3)) > 0.01).all()
        assert np.abs(output.images[2:] - drawn.images[2:]).max() < 1 / 255
        assert pipe(**call, return_dict=False)[1] is None


def test_it_is_switched_off_as_in_diffusers(checked, call):
    pipe = accel.load(checked, "eager")
    pipe.safety_checker = None
    assert pipe(**call).nsfw_content_detected is None


@pytest.mark.parametrize("value", [1, "no", object()])
def test_what_is_no_switch_is_one_sentence(checked, checked_bundle, value):
    for model in (checked, checked_bundle, checked_bundle.path):
        with pytest.raises(UserError, match="invalid safety_checker"):
            accel.load(model, "eager", safety_checker=value)


def test_a_bundle_without_one_has_no_verdicts(smallest_bundle):
    pipe = accel.load(smallest_bundle, "onnxruntime", threads=1)
    output = pipe("the cat", seed=0, steps=1)
    assert pipe.safety_checker is None and output.nsfw_content_detected is None
    assert pipe("the cat", seed=0, steps=1, return_dict=False)[1] is None


def test_a_pipeline_that_is_compiled_on_the_way_keeps_it(checked, checked_bundle, call, monkeypatch):
    asked = []
    monkeypatch.setattr("accel.loading.loader.compiled", lambda model, export: asked.append(export) or checked_bundle)
    call["sampler"] = "pndm"
    assert accel.load(checked, "onnxruntime")(**call).nsfw_content_detected == FOUND
    assert accel.load(checked, "onnxruntime", safety_checker=False)(**call).nsfw_content_detected is None
    assert [made.get("safety_checker") for made in asked] == [True, None]


def test_it_stays_float32_when_the_others_do_not(checked):
    pipe = accel.load(checked, "eager", dtype="bf16")
    assert "bfloat16" in pipe.engines["unet"].description
    assert "float32" in pipe.engines["safety_checker"].description


def test_an_attached_pipeline_keeps_its_own(checked, checked_bundle, drawn, call):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(checked)
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.safety_checker
    with accel.attach(pipeline, checked_bundle, "onnxruntime") as attached:
        assert "safety_checker" not in attached.engines and pipeline.safety_checker is own
        four = {"prompt": call["prompt"][:4], "latents": call["latents"][:4]}  # as many as the bundle takes at once
        made = pipeline(**call | four, output_type="np")
    assert made.nsfw_content_detected == FOUND[:4] and np.abs(made.images - drawn.images[:4]).max() < 1 / 255


def test_no_torch_is_needed_for_it(checked_bundle):
    """`tests/accel/test_layers.py` has the whole of it: here the modules that the checker adds."""
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from accel.bundle import Bundle\n"
        "from accel.safety import SafetyChecker\n"
        "checker = SafetyChecker.of(Bundle.open(sys.argv[1]))\n"
        "from accel.engines import load_engine\n"
        "import numpy as np\n"
        "engine = load_engine(sys.argv[1], 'safety_checker', 'onnxruntime')\n"
        "print(checker(engine, np.zeros((2, 3, 40, 48), np.float32)))\n"
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, checked_bundle.path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().startswith("["), done.stderr


# ------------------------------------------------------------------------------------------------ what files ask for


def test_the_published_layout_is_read(checked, checked_copy):
    """Pickled half-precision weights with one level more in their names, and the config of its time."""
    folder = checked_copy / "safety_checker"
    state = load_file(folder / "model.safetensors")
    named = {name.replace("vision_model.", "vision_model.vision_model.", 1): value for name, value in state.items()}
    named["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save({name: value.half() for name, value in named.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    old = {"num_beams": 1, "max_length": 20, "top_p": 1.0, "prune_heads": {}, "torch_dtype": None, "problem_type": None}
    config |= {"vision_config_dict": dict(config["vision_config"]), "torch_dtype": "float32"}
    config |= {key: config[key] | old for key in ("vision_config", "text_config")}
    (folder / "config.json").write_text(json.dumps(config))
    own, read = (open_source(path).load("safety_checker").state_dict() for path in (checked, checked_copy))
    assert list(own) == list(read) and all((own[name] - read[name]).abs().max() < 2e-3 for name in own)


WITHOUT = "safety_checker=False"


def refused(folder, match: str) -> None:
    """It is refused with a way out, which works."""
    with pytest.raises(UserError, match=match) as error:
        accel.load(folder, "eager")
    assert WITHOUT in error.value.fix
    assert "safety_checker" not in accel.load(folder, "eager", safety_checker=False).engines


def test_a_folder_whose_checker_cannot_be_run_is_refused_with_the_way_out(checked_copy, edit_json):
    index = checked_copy / "model_index.json"
    edit_json(index, safety_checker=["my_package", "MyChecker"])
    refused(checked_copy, "my_package.MyChecker, which needs that package's code")
    edit_json(index, safety_checker=["stable_diffusion", "StableDiffusionPipeline"])
    refused(checked_copy, "StableDiffusionPipeline of stable_diffusion, which is not supported")
    edit_json(
        index, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], feature_extractor=[None, None]
    )
    refused(checked_copy, "a safety checker and no feature extractor")
    edit_json(index, feature_extractor=["transformers", "CLIPImageProcessor"])
    edit_json(checked_copy / FILE, crop_size=48)
    refused(checked_copy, "48 x 48 pixels, and the safety checker's network takes 32 x 32")
    edit_json(checked_copy / FILE, crop_size=32, resample=99)
    refused(checked_copy, "resample is 99")
    (checked_copy / FILE).unlink()
    refused(checked_copy, "feature extractor's config")
    shutil.rmtree(checked_copy / "safety_checker")
    refused(checked_copy, "safety_checker config")


# ---------------------------------------------------------------------------------------------------- hostile bundles


@pytest.mark.parametrize(
    "config", [{"size": {"shortest_edge": 1 << 30}}, {"crop_size": 64}, {"image_std": [0, 0, 0]}, {"do_magic": True}]
)
def test_a_bundle_with_other_preprocessing_is_refused(checked_bundle_copy, edit_json, config):
    edit_json(checked_bundle_copy / FILE, **config)
    with pytest.raises(UserError, match=r"preprocessor_config.json.*(bytes|sha256)"):
        accel.load(checked_bundle_copy, "onnxruntime", threads=1)
    finalize(checked_bundle_copy, Bundle.open(checked_bundle_copy).manifest)  # and with digests that match
    with pytest.raises(UserError, match="preprocessor_config.json"):
        accel.load(checked_bundle_copy, "onnxruntime", threads=1)
    assert accel.load(checked_bundle_copy, "onnxruntime", threads=1, safety_checker=False)("the cat", steps=1).images


def test_a_bundle_without_its_preprocessing_is_refused(checked_bundle_copy):
    (checked_bundle_copy / FILE).unlink()
    finalize(checked_bundle_copy, Bundle.open(checked_bundle_copy).manifest)
    with pytest.raises(UserError, match="preprocessor_config.json is not listed"):
        accel.load(checked_bundle_copy, "onnxruntime", threads=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda own: own["inputs"][0].update(name="sample"),
        lambda own: own["inputs"][0].update(shape=["images", 3, 1 << 20, 1 << 20]),
        lambda own: own["inputs"][0].update(shape=["images", 3, 32, 64]),
        lambda own: own["inputs"][0].update(shape=["images", 3, "images", "images"]),
        lambda own: own["inputs"][0].update(dtype="float16"),
        lambda own: own["outputs"].pop(),
        lambda own: own["outputs"][0].update(shape=["images", "images"]),
        lambda own: own["outputs"][0].update(shape=[1, 3]),
        lambda own: own["outputs"][0].update(dtype="int64"),
    ],
)
def test_a_network_of_other_tensors_is_no_checker(checked_bundle_copy, edit_manifest, change):
    edit_manifest(checked_bundle_copy, lambda data: change(data["components"]["safety_checker"]))
    with pytest.raises(UserError):
        accel.load(checked_bundle_copy, "onnxruntime", threads=1)
    with pytest.raises(UserError):
        SafetyChecker.of(opened(checked_bundle_copy))
