"""IP-Adapter against diffusers' own pipelines: what `load_ip_adapter` and `ip_adapter_image` draw."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import accel as package
from accel import images
from accel.bundle import Bundle
from accel.errors import UserError
from accel.export.pipeline import export_pipeline
from accel.models.pipeline_bundle import open_pipeline
from accel.models.source import open_source
from accel.sampling import noise

ONE_STEP_OF_A_PIXEL = 1 / 255
ENGINES = ("eager", "onnxruntime", "openvino")


@pytest.fixture(scope="module")
def photos():
    """Two pictures, wide and high, in colours and with an alpha channel."""
    rng = np.random.default_rng(3)
    return (
        Image.fromarray(rng.integers(0, 255, (40, 57, 3), np.uint8)),
        Image.fromarray(rng.integers(0, 255, (71, 33, 4), np.uint8), "RGBA"),
    )


class Made(NamedTuple):
    """A pipeline folder, the file of its IP-Adapter, and the bundle of both."""

    source: Path
    file: Path
    bundle: Bundle


@pytest.fixture(scope="module")
def made(request, completed, ip_adapter_maker, tmp_path_factory):
    """`Made` by family and kind, each exported once; text encoders and VAE come from the plain model's bundle."""

    @cache
    def get(family, kind):
        source = request.getfixturevalue(family)
        base = Bundle.open(request.getfixturevalue(f"{family}_bundle"))
        folder = tmp_path_factory.mktemp(f"{family}-{kind}")
        file = ip_adapter_maker(source, folder, kind)
        bundle = export_pipeline(
            open_source(source, ip_adapter=file, image_encoder=folder / "image_encoder"),
            folder / "bundle",
            profile=f"batch=1-2,size={32 if family == 'smallest' else 64}",
            components=("unet",),
            sampler={"name": "euler" if family == "sdxl" else "dpmpp_2m", "steps": 3, "guidance": 5.0},
        )
        return Made(source, file, completed(bundle, base))

    return get


def theirs(made, *, adapter=True, **parts):
    """diffusers' pipeline of a model, with the IP-Adapter loaded by its own method."""
    import diffusers
    from transformers import CLIPVisionModelWithProjection

    xl = (made.source / "text_encoder_2").exists()
    kind = "StableDiffusionXL" if xl else "StableDiffusion"
    cls = getattr(diffusers, f"{kind}{'ControlNet' if parts else ''}Pipeline")
    pipe = cls.from_pretrained(made.source, **parts)
    if not xl:
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if adapter:
        encoder = CLIPVisionModelWithProjection.from_pretrained(made.file.parent / "image_encoder").eval()
        pipe.register_modules(image_encoder=encoder)
        pipe.load_ip_adapter(str(made.file.parent), subfolder="", weight_name=made.file.name)
    return pipe


def draw(pipe, image=None, scale=None, /, guidance=5.0, prompts=1, **more):
    """What diffusers draws from our noise of seeds 5, 6, ..."""
    if scale is not None:
        pipe.set_ip_adapter_scale(scale)
    side = pipe.unet.config.sample_size
    latents = torch.from_numpy(noise.normal([5 + i for i in range(prompts)], 0, (4, side, side)))
    how = dict(num_inference_steps=3, guidance_scale=guidance, latents=latents, output_type="np", **more)
    given = {} if image is None else {"ip_adapter_image": image}
    return pipe(["the cat", "the dog"][:prompts], **how, **given).images


def ours(pipe, image=None, scale=1.0, guidance=5.0, prompt="the cat", **more):
    how = dict(seed=5, guidance_scale=guidance, output_type="np")
    return pipe(prompt, ip_adapter_image=image, ip_adapter_scale=scale, **how | more).images


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_image_is_diffusers_at_every_scale_with_and_without_guidance(made, photos, family, engine):
    case = made(family, "plain")
    reference, pipe = theirs(case), package.load(case.bundle, engine)
    for scale, guidance, image in (
        (0, 5.0, photos[0]),
        (0.6, 5.0, photos[0]),
        (1.0, 5.0, photos[1]),
        (0.6, 0.0, photos[1]),
        (1.0, 0.0, [list(photos)]),
        (0.6, 5.0, [list(photos)]),
    ):
        found = ours(pipe, image, scale, guidance)
        error = np.abs(found - draw(reference, image, scale, guidance)).max()
        assert error < ONE_STEP_OF_A_PIXEL, (scale, guidance)
        effect = np.abs(found - ours(pipe, guidance=guidance)).max()
        assert effect > 3 * ONE_STEP_OF_A_PIXEL if scale else effect == 0, (scale, guidance)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_resampler_of_plus_and_its_hidden_states_equal_diffusers(made, photos, engine):
    case = made("smallest", "plus")
    assert case.bundle.component("image_encoder").outputs[0].name == "hidden_states.2"
    reference, pipe = theirs(case), package.load(case.bundle, engine)
    for scale, guidance, image in ((0.6, 5.0, photos[0]), (1.0, 0.0, [list(photos)]), (1.0, 5.0, [list(photos)])):
        error = np.abs(ours(pipe, image, scale, guidance) - draw(reference, image, scale, guidance)).max()
        assert error < ONE_STEP_OF_A_PIXEL, (scale, guidance)


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_a_folder_runs_with_an_adapter_without_an_export(smallest, ip_adapter_maker, photos, tmp_path, kind):
    file = ip_adapter_maker(smallest, tmp_path, kind)
    bundle = open_pipeline(open_source(smallest, ip_adapter=file, image_encoder=tmp_path / "image_encoder"))
    found = ours(package.load(bundle, "eager"), photos[0], 0.6, sampler="dpmpp_2m", steps=3)
    expected = draw(theirs(Made(smallest, file, bundle)), photos[0], 0.6)
    assert np.abs(found - expected).max() < ONE_STEP_OF_A_PIXEL


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_picture_it_is_the_plain_model(made, engine):
    case = made("sd15", "plain")
    found = ours(package.load(case.bundle, engine))
    assert np.abs(found - draw(theirs(case, adapter=False))).max() < ONE_STEP_OF_A_PIXEL


def test_a_list_has_one_picture_for_each_image(made, photos):
    pipe = package.load(made("smallest", "plus").bundle, "onnxruntime")
    both = ours(pipe, list(photos), 0.6, prompt=["the cat", "the dog"])
    reference = theirs(made("smallest", "plus"))
    for i, photo in enumerate(photos):  # diffusers shows one picture to all images of a call
        assert np.abs(both[i] - draw(reference, photo, 0.6, prompts=2)[i]).max() < ONE_STEP_OF_A_PIXEL
    one = ours(pipe, photos[0], 0.6, prompt=["the cat", "the dog"])
    assert np.abs(one[1] - both[1]).max() > ONE_STEP_OF_A_PIXEL and np.array_equal(one[0], both[0])
    more = ours(pipe, photos[0], 0.6, num_images_per_prompt=3)  # more than this bundle makes at once
    assert np.abs(more[0] - one[0]).max() < ONE_STEP_OF_A_PIXEL


def test_pictures_may_be_files_and_arrays(made, photos, tmp_path):
    pipe = package.load(made("smallest", "plus").bundle, "onnxruntime")
    photos[0].save(tmp_path / "photo.png")
    pixels = np.asarray(photos[0])
    expected = ours(pipe, photos[0])
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for image in (str(tmp_path / "photo.png"), tmp_path / "photo.png", pixels, tensor, [photos[0]], [[photos[0]]]):
        assert np.array_equal(ours(pipe, image), expected)


def test_with_low_memory_and_in_half_precision(made, photos, completed, smallest_bundle, tmp_path):
    case = made("smallest", "plus")
    expected = ours(package.load(case.bundle, "onnxruntime"), photos[0], 0.6)
    spared = package.load(case.bundle, "onnxruntime", low_memory=True)
    assert np.array_equal(ours(spared, photos[0], 0.6), expected) and not spared.engines._loaded
    source = open_source(case.source, ip_adapter=case.file, image_encoder=case.file.parent / "image_encoder")
    half = export_pipeline(source, tmp_path / "half", profile="batch=1,size=32", precision="fp16", components=("unet",))
    specs = {spec.name: spec.dtype for spec in half.component("unet").inputs}
    assert specs["image_embeds"] == specs["ip_adapter_scale"] == "float16"
    half = completed(half, Bundle.open(smallest_bundle))
    for engine in ("eager", "onnxruntime"):
        found = ours(package.load(half, engine), photos[0], 0.6, sampler="dpmpp_2m", steps=3)
        assert np.abs(found - expected).max() < 0.05, engine
    with pytest.raises(UserError, match="2 image prompts together, where smallest takes 1"):
        ours(package.load(half, "onnxruntime"), [list(photos)])


def test_a_lora_draws_with_the_adapter_as_in_diffusers(made, photos, tmp_path):
    from safetensors.torch import save_file

    case = made("smallest", "plus")
    pipe, reference = package.load(case.bundle, "onnxruntime"), theirs(case)
    torch.manual_seed(2)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    outer, inner = reference.unet.get_submodule(layer).weight.shape
    parts = {"lora_A": torch.randn(4, inner), "lora_B": torch.randn(outer, 4)}
    save_file({f"unet.{layer}.{part}.weight": value for part, value in parts.items()}, tmp_path / "lora.safetensors")
    without = ours(pipe, photos[0], 0.6)
    pipe.set_loras(tmp_path / "lora.safetensors")
    found = ours(pipe, photos[0], 0.6)
    reference.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    assert np.abs(found - draw(reference, photos[0], 0.6)).max() < ONE_STEP_OF_A_PIXEL
    assert np.abs(found - without).max() > ONE_STEP_OF_A_PIXEL


def test_a_controlnet_and_an_adapter_work_together(small, ip_adapter_maker, photos, tmp_path):
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(small / "unet")
    config = dict(ControlNetModel.from_unet(unet).config) | {"conditioning_embedding_out_channels": (8, 16, 16)}
    torch.manual_seed(4)
    controlnet = ControlNetModel.from_config(config)
    with torch.no_grad():
        for parameter in controlnet.parameters():  # those that add to the UNet start as zeros
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5 / parameter[0].numel() ** 0.5)
    controlnet.save_pretrained(tmp_path / "controlnet")
    file = ip_adapter_maker(small, tmp_path)
    more = dict(ip_adapter=file, image_encoder=tmp_path / "image_encoder", controlnet=tmp_path / "controlnet")
    bundle = open_pipeline(open_source(small, **more))
    shown = photos[0].resize((64, 64))
    pipe = package.load(bundle, "eager")
    found = ours(pipe, photos[1], 0.6, control_image=shown, sampler="dpmpp_2m", steps=3)
    expected = draw(theirs(Made(small, file, bundle), controlnet=controlnet.eval()), photos[1], 0.6, image=shown)
    assert np.abs(found - expected).max() < ONE_STEP_OF_A_PIXEL
    assert np.abs(found - ours(pipe, photos[1], 0.6, sampler="dpmpp_2m", steps=3)).max() > ONE_STEP_OF_A_PIXEL


def test_a_diffusers_pipeline_runs_on_the_compiled_adapter(made, photos):
    case = made("smallest", "plus")
    pipe = theirs(case)
    before, both = draw(pipe, photos[0], 0.6), draw(pipe, [list(photos)], 0.3)
    with package.attach(pipe, case.bundle, engine="onnxruntime") as attached:
        calls, run = [], attached.engines["image_encoder"].run
        attached.engines["image_encoder"].run = lambda feeds: calls.append(1) or run(feeds)
        assert np.abs(draw(pipe, photos[0], 0.6) - before).max() < ONE_STEP_OF_A_PIXEL
        assert np.abs(draw(pipe, [list(photos)], 0.3) - both).max() < ONE_STEP_OF_A_PIXEL
        assert calls
        next(it for it in pipe.unet.attn_processors.values() if hasattr(it, "scale")).scale[0] = 0.9
        with pytest.raises(UserError, match="other scales in some blocks"):
            draw(pipe, photos[0])
        with pytest.raises(UserError, match="unload_ip_adapter"):
            pipe.unload_ip_adapter()
    assert np.array_equal(draw(pipe, photos[0], 0.6), before)


def test_attaching_says_which_side_has_no_adapter(made, smallest_bundle, ip_adapter_maker, photos, tmp_path):
    case = made("smallest", "plus")
    plain = theirs(case, adapter=False)
    before = draw(plain)
    with package.attach(plain, case.bundle, engine="onnxruntime"):
        assert np.abs(draw(plain) - before).max() < ONE_STEP_OF_A_PIXEL
    with pytest.raises(UserError, match="bundle was exported without one"):
        package.attach(theirs(case), smallest_bundle, engine="onnxruntime")
    other = ip_adapter_maker(case.source, tmp_path)
    with pytest.raises(UserError, match="have different weights"):
        package.attach(theirs(Made(case.source, other, case.bundle)), case.bundle, engine="onnxruntime")
    two = theirs(case, adapter=False)
    two.register_modules(image_encoder=theirs(case).image_encoder)
    two.load_ip_adapter(str(case.file.parent), subfolder="", weight_name=[case.file.name] * 2)
    with pytest.raises(UserError, match="2 IP-Adapters"):
        package.attach(two, case.bundle, engine="onnxruntime")


def test_what_does_not_fit_a_call_is_refused_before_any_network_runs(made, smallest_bundle, photos, tmp_path):
    pipe = package.load(made("smallest", "plus").bundle, "onnxruntime", low_memory=True)
    (tmp_path / "text.png").write_text("no image")
    for image, words in (
        (list(photos), "2 image prompts for 1 images"),
        ([[photos[0]] * 5], "5 image prompts together, where smallest takes 1 to 4"),
        ([[]], "0 image prompts together"),
        (7, "invalid ip_adapter_image"),
        (tmp_path / "text.png", "is not an image"),
        (tmp_path / "none.png", "no such image"),
    ):
        with pytest.raises(UserError, match=words) as error:
            ours(pipe, image)
        assert error.value.fix
    with pytest.raises(UserError, match="2 and 1 image prompts|1 and 2 image prompts"):
        ours(pipe, [[photos[0]], list(photos)], prompt=["the cat", "the dog"])
    for scale in (float("nan"), "strong", None):
        with pytest.raises(UserError, match="invalid ip_adapter_scale"):
            ours(pipe, photos[0], scale)
    with pytest.raises(UserError, match=r"ip_adapter_image_embeds is something that only diffusers"):
        pipe("the cat", ip_adapter_image_embeds=[torch.zeros(2, 1, 24)])
    with pytest.raises(UserError, match="exported without IP-Adapter"):
        ours(package.load(smallest_bundle, "onnxruntime", low_memory=True), photos[0])
    assert not pipe.engines.descriptions


def test_the_command_line_exports_and_runs_an_image_prompt(
    smallest, smallest_bundle, completed, ip_adapter_maker, photos, accel, refused, tmp_path
):
    file = ip_adapter_maker(smallest, tmp_path, "plus")
    photos[0].save(tmp_path / "photo.png")
    how = ["--ip-adapter", file, "--image-encoder", tmp_path / "image_encoder", "--profile", "batch=1-2,size=32"]
    how += ["--components", "unet", "--sampler", "dpmpp_2m", "--steps", "3", "--guidance", "5"]
    assert accel("export", smallest, tmp_path / "bundle", *how)[0] == 0
    bundle = completed(Bundle.open(tmp_path / "bundle"), Bundle.open(smallest_bundle))
    kept = bundle.manifest.source["parts"]
    assert kept["ip_adapter"]["name"] == file.name and kept["image_encoder"]["name"] == "image_encoder"
    assert "image_encoder" not in json.loads((bundle.path / "model_index.json").read_text())
    run = ["run", bundle.path, "--prompt", "the cat", "--seed", "5", "--engine", "onnxruntime"]
    prompt = ["--image-prompt", tmp_path / "photo.png", "--image-prompt-scale", "0.6"]
    assert accel(*run, *prompt, "--out", tmp_path / "out.png")[0] == 0
    expected = ours(package.load(bundle, "onnxruntime"), photos[0], 0.6)[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), (expected * 255).round().astype(np.uint8))
    assert "no such file" in refused(*run, "--image-prompt", tmp_path / "none.png", "--out", tmp_path / "b.png")
    plain = ["run", smallest_bundle, *run[2:], *prompt, "--out", tmp_path / "c.png"]
    assert "--ip-adapter FILE" in refused(*plain)


@pytest.mark.parametrize("size", [(57, 40), (33, 71), (28, 28), (9, 30), (640, 481)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_pictures_are_prepared_as_transformers_does(size, mode):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rng = np.random.default_rng(1)
    shape = (size[1], size[0], *({"RGB": (3,), "RGBA": (4,), "L": (), "P": (3,)}[mode]))
    picture = Image.fromarray(rng.integers(0, 255, shape, np.uint8)).convert(mode)
    if mode == "P":
        picture.info["transparency"] = 3
    for side in (28, 224):
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        expected = processor(picture, return_tensors="np").pixel_values[0]
        found = images.clip_pixels(picture, side)
        assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
def test_an_image_prompt_on_tensorrt(made, photos, tensorrt, with_engine_file_of_unet):
    """Also the whole loop as one CUDA graph, with pictures and without."""
    plain, fast = with_engine_file_of_unet(made("smallest", "plus").bundle.path)
    for image in (photos[0], [list(photos)], None):
        found, expected = (ours(pipe, image, 0.6, output_type="latent") for pipe in (fast, plain))
        assert np.abs(found - expected).max() < 1e-3
