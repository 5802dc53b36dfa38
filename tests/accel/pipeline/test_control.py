"""T2I-Adapter and ControlNet against diffusers' own pipelines, SD1.5 and SDXL."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import accel
from accel.bundle import Bundle
from accel.cli import main
from accel.errors import UserError
from accel.export.pipeline import export_pipeline
from accel.models.source import open_source
from accel.sampling import noise

ONE_STEP_OF_A_PIXEL = 1 / 255


@pytest.fixture(scope="module")
def edges():
    rows, columns = np.mgrid[0:64, 0:64]
    circle = np.abs(np.hypot(rows - 32, columns - 32) - 20) < 1.5
    return Image.fromarray((circle[..., None] * np.full(3, 255)).astype(np.uint8))


def loud(model):
    """Random weights whose effect on the image can be seen; ControlNets start as zeros."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5 / parameter[0].numel() ** 0.5)
    return model


class Made(NamedTuple):
    """A pipeline folder, the networks that diffusers takes instead of the folder's, and the bundle of both."""

    source: Path
    parts: dict[str, Any]
    bundle: Bundle


def make_controlnet(source):
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(source / "unet")
    # A VAE of three stages makes latents of a quarter of the image, where published ones make an eighth.
    config = dict(ControlNetModel.from_unet(unet).config) | {"conditioning_embedding_out_channels": (8, 16, 16)}
    return loud(ControlNetModel.from_config(config))


def make_adapter(xl):
    from diffusers import T2IAdapter

    return loud(
        T2IAdapter(
            in_channels=3 if xl else 1,
            channels=[8, 16, 16, 16],
            num_res_blocks=1,
            downscale_factor=8 if xl else 4,
            adapter_type="full_adapter_xl" if xl else "full_adapter",
        )
    )


@pytest.fixture(scope="module")
def sdxl_texts(sdxl, tmp_path_factory):
    """SDXL's text encoders and VAE as a bundle."""
    out = tmp_path_factory.mktemp("texts") / "bundle"
    return export_pipeline(sdxl, out, profile="batch=1,size=64", components=("text_encoder", "vae_decoder"))


@pytest.fixture(scope="module")
def few_steps(sdxl, sdxl_texts, completed, tmp_path_factory):
    """SDXL as DMD2 deploys it: the published 4-step UNet file, a canny adapter, a tiny VAE; by the command line."""
    import diffusers

    folder = tmp_path_factory.mktemp("few-steps")
    torch.manual_seed(11)
    unet = diffusers.UNet2DConditionModel.from_pretrained(sdxl / "unet")
    state = {key: (value + 0.01 * torch.randn_like(value)).half() for key, value in unet.state_dict().items()}
    torch.save(state, folder / "dmd2_sdxl_4step_unet_fp16.bin")
    unet.load_state_dict({key: value.float() for key, value in state.items()})
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        scaling_factor=1.0,
    ).eval()
    adapter = make_adapter(xl=True).eval()
    tiny.save_pretrained(folder / "taesdxl")
    adapter.save_pretrained(folder / "t2i-adapter-canny-sdxl")
    command = [
        "export",
        str(sdxl),
        str(folder / "bundle"),
        "--unet",
        str(folder / "dmd2_sdxl_4step_unet_fp16.bin"),
        "--adapter",
        str(folder / "t2i-adapter-canny-sdxl"),
        "--vae",
        str(folder / "taesdxl"),
        "--components",
        "unet,vae_decoder",
        "--profile",
        "batch=1,size=64",
    ]
    assert main(command) == 0
    bundle = completed(Bundle.open(folder / "bundle"), sdxl_texts)
    return Made(sdxl, {"unet": unet, "adapter": adapter, "vae": tiny}, bundle)


@pytest.fixture(scope="module")
def made(request, completed, tmp_path_factory):
    """`Made` by family and kind, each exported once; text encoders and VAE come from the plain model's bundle.

    SDXL's adapter comes with few steps.
    """
    fixture = request.getfixturevalue

    @cache
    def get(family, kind):
        if (family, kind) == ("sdxl", "adapter"):
            return fixture("few_steps")
        folder = tmp_path_factory.mktemp(f"{family}-{kind}")
        source = fixture(family)
        base = fixture("sdxl_texts") if family == "sdxl" else Bundle.open(fixture("sd15_bundle"))
        model = make_controlnet(source) if kind == "controlnet" else make_adapter(xl=False)
        model.save_pretrained(folder / "network")
        bundle = export_pipeline(
            open_source(source, **{kind: folder / "network"}),
            folder / "bundle",
            profile="batch=1,size=64",
            components=("unet",),
            sampler={"name": "dpmpp_2m" if family == "sd15" else "euler", "steps": 4, "guidance": 5.0},
        )
        return Made(source, {kind: model.eval()}, completed(bundle, base))

    return get


def control_pipeline(family, kind, source, parts):
    import diffusers

    classes = {
        ("sd15", "controlnet"): "StableDiffusionControlNetPipeline",
        ("sd15", "adapter"): "StableDiffusionAdapterPipeline",
        ("sdxl", "controlnet"): "StableDiffusionXLControlNetPipeline",
        ("sdxl", "adapter"): "StableDiffusionXLAdapterPipeline",
    }
    pipe = getattr(diffusers, classes[family, kind]).from_pretrained(source, **parts)
    if family == "sd15":
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference(family, kind, source, parts, image, **options):
    pipe = control_pipeline(family, kind, source, parts)
    image = image.convert("L") if (family, kind) == ("sd15", "adapter") else image
    latents = torch.from_numpy(noise.normal([5], 0, (4, 16, 16)))
    return pipe(
        "the cat",
        image=image,
        num_inference_steps=4,
        guidance_scale=5.0,
        height=64,
        width=64,
        latents=latents,
        output_type="np",
        **options,
    ).images


@pytest.mark.parametrize(("family", "kind"), [("sd15", "controlnet"), ("sd15", "adapter"), ("sdxl", "controlnet")])
def test_a_controlled_image_equals_diffusers(made, edges, family, kind):
    source, parts, bundle = made(family, kind)
    expected = reference(family, kind, source, parts, edges, **{f"{kind}_conditioning_scale": 0.8})
    pipe = accel.load(bundle, engine="onnxruntime")
    found = pipe("the cat", control_image=edges, control_scale=0.8, seed=5, output_type="np").images
    assert np.abs(found - expected).max() < ONE_STEP_OF_A_PIXEL
    without = pipe("the cat", seed=5, output_type="np").images
    assert np.abs(found - without).max() > 3 * ONE_STEP_OF_A_PIXEL, "the control image has an effect"


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_four_steps_with_a_canny_adapter_and_a_tiny_vae_equal_diffusers(few_steps, edges, engine, monkeypatch):
    """The bundle knows steps, timesteps and guidance by itself; the adapter counts for half of the steps."""
    from diffusers import LCMScheduler
    from diffusers.schedulers import scheduling_lcm

    source, parts, bundle = few_steps
    assert bundle.manifest.sampler["timesteps"] == [999, 749, 499, 249]
    pipe = control_pipeline("sdxl", "adapter", source, parts)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    draws = iter((1, 2, 3))
    monkeypatch.setattr(
        scheduling_lcm, "randn_tensor", lambda shape, **_: torch.from_numpy(noise.normal([5], next(draws), shape[1:]))
    )
    expected = pipe(
        "the cat",
        image=edges,
        timesteps=[999, 749, 499, 249],
        guidance_scale=0.0,
        height=64,
        width=64,
        latents=torch.from_numpy(noise.normal([5], 0, (4, 16, 16))),
        adapter_conditioning_scale=0.8,
        adapter_conditioning_factor=0.5,
        output_type="np",
    ).images
    pipe = accel.load(bundle, engine=engine)
    controlled = dict(control_image=edges, control_scale=0.8, seed=5, output_type="np")
    found = pipe("the cat", control_end=0.5, **controlled).images
    error = np.abs(found - expected).max()
    assert expected.std() > 0.01 and error < ONE_STEP_OF_A_PIXEL
    assert np.abs(found - pipe("the cat", **controlled).images).max() > 10 * error, "half of the steps are not all"


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_other_engines_agree(made, edges, engine):
    _, _, bundle = made("sd15", "controlnet")
    images = [
        accel.load(bundle, engine=name)("the cat", control_image=edges, seed=5, output_type="np").images
        for name in ("onnxruntime", engine)
    ]
    assert np.abs(images[0] - images[1]).max() < ONE_STEP_OF_A_PIXEL


def test_without_a_control_image_it_is_the_plain_model(made):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    source, _, bundle = made("sd15", "controlnet")
    pipe = StableDiffusionPipeline.from_pretrained(source)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(noise.normal([5], 0, (4, 16, 16)))
    expected = pipe("the cat", num_inference_steps=4, guidance_scale=5.0, latents=latents, output_type="np").images
    found = accel.load(bundle, engine="onnxruntime")("the cat", seed=5, output_type="np").images
    assert np.abs(found - expected).max() < ONE_STEP_OF_A_PIXEL


@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
def test_a_control_network_of_another_family_is_refused_with_both_sides(sd15, sdxl, tmp_path, kind):
    (make_controlnet(sdxl) if kind == "controlnet" else make_adapter(xl=True)).save_pretrained(tmp_path / "network")
    with pytest.raises(UserError, match="another family") as error:
        export_pipeline(open_source(sd15, **{kind: tmp_path / "network"}), tmp_path / "out", components=("unet",))
    assert error.value.fix and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "kind"), [("sd15", "controlnet"), ("sdxl", "adapter")])
def test_a_diffusers_pipeline_runs_on_the_compiled_control_network(made, edges, family, kind):
    """Attached, both the UNet and the control network are the bundle's; detached, the pipeline is as it was."""
    source, parts, bundle = made(family, kind)
    pipe = control_pipeline(family, kind, source, parts)
    guidance = 0.0 if bundle.manifest.sampler["name"] == "dmd2" else 4.0
    options = dict(image=edges, num_inference_steps=2, guidance_scale=guidance, height=64, width=64, output_type="np")

    def draw():
        return pipe("the cat", generator=torch.Generator().manual_seed(1), **options).images

    before = draw()
    with accel.attach(pipe, bundle, engine="onnxruntime") as attached:
        part = "controlnet" if kind == "controlnet" else "t2i_adapter"
        calls, run = [], attached.engines[part].run
        attached.engines[part].run = lambda feeds: calls.append(1) or run(feeds)
        assert np.abs(draw() - before).max() < ONE_STEP_OF_A_PIXEL
        assert calls
    assert np.array_equal(draw(), before)


@pytest.fixture(scope="module")
def several(sd15, sd15_bundle, completed, tmp_path_factory):
    """Two ControlNets that differ in weights, the second one of those that pool what they add."""
    from diffusers import ControlNetModel

    folder = tmp_path_factory.mktemp("several")
    first = make_controlnet(sd15)
    second = ControlNetModel.from_config(dict(first.config) | {"global_pool_conditions": True})
    second.load_state_dict({key: value.flip(0) for key, value in first.state_dict().items()})
    nets = [first.eval(), second.eval()]
    for i, net in enumerate(nets):
        net.save_pretrained(folder / f"net{i}")
    source = open_source(sd15, controlnet=[folder / "net0", folder / "net1"])
    bundle = export_pipeline(
        source,
        folder / "bundle",
        profile="batch=1,size=64",
        components=("unet",),
        sampler={"name": "dpmpp_2m", "steps": 4, "guidance": 5.0},
    )
    return Made(sd15, {"controlnet": nets}, completed(bundle, Bundle.open(sd15_bundle)))


@pytest.fixture(scope="module")
def stripes():
    return Image.fromarray((np.mgrid[0:64, 0:64][1][..., None] // 8 % 2 * np.full(3, 255)).astype(np.uint8))


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_several_controlnets_at_once_equal_diffusers(several, edges, stripes, engine):
    """Each has its image, its scale, and the share of the steps that it counts for."""
    source, parts, bundle = several
    assert {"controlnet", "controlnet_1"} <= set(bundle.manifest.components)
    pipe = control_pipeline("sd15", "controlnet", source, parts)
    expected = pipe(
        "the cat",
        image=[edges, stripes],
        num_inference_steps=4,
        guidance_scale=5.0,
        latents=torch.from_numpy(noise.normal([5], 0, (4, 16, 16))),
        controlnet_conditioning_scale=[0.8, 0.5],
        control_guidance_end=[1.0, 0.5],
        output_type="np",
    ).images
    pipe = accel.load(bundle, engine=engine)
    given = dict(control_image=[edges, stripes], seed=5, output_type="np")
    found = pipe("the cat", control_scale=[0.8, 0.5], control_end=[1.0, 0.5], **given).images
    assert np.abs(found - expected).max() < ONE_STEP_OF_A_PIXEL
    alone = pipe("the cat", control_scale=[0.8, 0.0], **given).images
    assert np.abs(found - alone).max() > 3 * ONE_STEP_OF_A_PIXEL, "the second one has an effect"


def test_a_diffusers_pipeline_runs_on_several_compiled_controlnets(several, edges, stripes):
    source, parts, bundle = several
    pipe = control_pipeline("sd15", "controlnet", source, parts)

    def draw():
        images = dict(image=[edges, stripes], controlnet_conditioning_scale=[0.8, 0.5], num_inference_steps=2)
        return pipe("the cat", generator=torch.Generator().manual_seed(1), output_type="np", **images).images

    before = draw()
    with accel.attach(pipe, bundle, engine="onnxruntime") as attached:
        assert {"controlnet", "controlnet_1"} <= set(attached.engines)
        assert np.abs(draw() - before).max() < ONE_STEP_OF_A_PIXEL
    assert np.array_equal(draw(), before)


def test_a_pipeline_folder_with_several_controlnets_is_read_as_diffusers_saves_it(several, edges, stripes, tmp_path):
    source, parts, bundle = several
    control_pipeline("sd15", "controlnet", source, parts).save_pretrained(tmp_path / "pipeline")
    call = dict(control_image=[edges, stripes], control_scale=[0.8, 0.5], seed=5, steps=2, output_type="np")
    found = accel.load(tmp_path / "pipeline", engine="eager")("the cat", guidance_scale=5.0, **call).images
    assert np.abs(found - accel.load(bundle, engine="eager")("the cat", **call).images).max() < ONE_STEP_OF_A_PIXEL


def test_a_wrong_number_of_control_images_is_refused(several, made, edges):
    pipe = accel.load(several.bundle, engine="onnxruntime", low_memory=True)
    for call, words in (
        (dict(control_image=edges), "1 control_image for 2 control networks: controlnet, controlnet_1"),
        (dict(control_image=[edges] * 3), "3 control_image for 2"),
        (dict(control_image=[edges] * 2, control_scale=[0.5]), "1 control_scale for 2"),
    ):
        with pytest.raises(UserError, match=words) as error:
            pipe("the cat", **call)
        assert "one for each" in error.value.fix
    one = accel.load(made("sd15", "controlnet").bundle, engine="onnxruntime", low_memory=True)
    with pytest.raises(UserError, match="2 control_scale for 1 control network: controlnet"):
        one("the cat", control_image=edges, control_scale=[1.0, 2.0])


def test_more_than_three_controlnets_are_refused(sd15):
    with pytest.raises(UserError, match="4 ControlNets at once") as error:
        open_source(sd15, controlnet=[sd15] * 4)
    assert "at most 3" in error.value.fix


@pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
def test_a_controlled_unet_on_tensorrt_runs_step_by_step(made, edges, tensorrt, with_engine_file_of_unet):
    """What is added differs from step to step, so there is no graph of the whole loop to replay."""
    theirs, ours = with_engine_file_of_unet(made("sd15", "controlnet")[2].path)
    for options in (dict(control_image=edges), dict(control_image=edges, control_end=0.5), {}):
        found, expected = (
            pipe("the cat", steps=2, seed=5, output_type="latent", **options).latents for pipe in (ours, theirs)
        )
        assert np.abs(found - expected).max() < 1e-4, options


def test_a_folder_that_is_no_control_network_is_refused(sd15):
    with pytest.raises(UserError, match="UNet2DConditionModel"):
        open_source(sd15, controlnet=sd15 / "unet")


def test_the_command_line_runs_canny_on_an_image(made, tmp_path, edges):
    pytest.importorskip("skimage")
    _, _, bundle = made("sd15", "controlnet")
    edges.save(tmp_path / "photo.png")
    command = ["run", str(bundle.path), "--prompt", "the cat", "--control", str(tmp_path / "photo.png"), "--canny"]
    assert main([*command, "--engine", "onnxruntime", "--steps", "2", "--out", str(tmp_path / "out.png")]) == 0
    assert Image.open(tmp_path / "out.png").size == (64, 64)


@pytest.mark.parametrize(("family", "kind"), [("sd15", "controlnet"), ("sdxl", "adapter")])
def test_a_controlled_bundle_is_benched_with_its_control_network(made, edges, tmp_path, capsys, family, kind):
    bundle, document = made(family, kind).bundle, tmp_path / "bench.json"
    edges.save(tmp_path / "edges.png")
    command = ["bench", str(bundle.path), "--engines", "onnxruntime", "--rounds", "1", "--no-memory"]
    assert main([*command, "--control", str(tmp_path / "edges.png"), "--json", str(document)]) == 0
    (row,) = json.loads(document.read_text())["rows"]
    part = "controlnet" if kind == "controlnet" else "t2i_adapter"
    assert {part, "unet", "vae_decoder"} <= set(row["scopes"])
    assert row["scopes"][part]["timing"] is not None
    assert row["parity"]["image"]["max_abs"] < 1


@pytest.mark.parametrize(("controlled", "words"), [(True, "no such image"), (False, "no T2I-Adapter or ControlNet")])
def test_a_control_image_that_cannot_be_benched_is_told_at_once(made, sd15_bundle, capsys, controlled, words):
    bundle = made("sd15", "controlnet").bundle.path if controlled else sd15_bundle
    assert main(["bench", str(bundle), "--engines", "onnxruntime", "--control", "missing.png"]) == 1
    assert words in capsys.readouterr().err
