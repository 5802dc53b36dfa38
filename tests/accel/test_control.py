"""T2I-Adapter and ControlNet against diffusers' own pipelines, SD1.5 and SDXL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import accel
from accel import noise
from accel.cli import main
from accel.errors import UserError
from accel.export.pipeline import export_pipeline
from accel.source import open_source

ONE_STEP_OF_A_PIXEL = 1 / 255
COMPONENTS = ("text_encoder", "unet", "vae_decoder")


@pytest.fixture(scope="module")
def edges():
    rows, columns = np.mgrid[0:64, 0:64]
    circle = np.abs(np.hypot(rows - 32, columns - 32) - 20) < 1.5
    return Image.fromarray((circle[..., None] * np.full(3, 255)).astype(np.uint8))


def loud(model):
    """Random weights whose effect on the picture can be seen; ControlNets start as zeros."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5 / parameter[0].numel() ** 0.5)
    return model


@pytest.fixture(scope="module")
def made(sd15, sdxl, tmp_path_factory):
    """(source, folder of the control network, bundle) by family and kind, each exported once."""
    from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel

    cache = {}
    sources = {"sd15": sd15, "sdxl": sdxl}

    def get(family, kind):
        if (family, kind) in cache:
            return cache[family, kind]
        folder = tmp_path_factory.mktemp(f"{family}-{kind}")
        source = sources[family]
        unet = UNet2DConditionModel.from_pretrained(source / "unet")
        if kind == "controlnet":
            model = ControlNetModel.from_unet(unet, conditioning_channels=3)
            # A VAE of three stages makes latents of a quarter of the picture, where published ones make an eighth.
            config = dict(model.config) | {"conditioning_embedding_out_channels": (8, 16, 16)}
            model = ControlNetModel.from_config(config)
        else:
            xl = family == "sdxl"
            channels = [8, 16, 16, 16]
            model = T2IAdapter(
                in_channels=3 if xl else 1, channels=channels, num_res_blocks=1, downscale_factor=8 if xl else 4,
                adapter_type="full_adapter_xl" if xl else "full_adapter",
            )  # fmt: skip
        loud(model).save_pretrained(folder / "network")
        parts = {"controlnet" if kind == "controlnet" else "adapter": folder / "network"}
        bundle = export_pipeline(
            open_source(source, **parts), folder / "bundle", profile="batch=1-2,size=64", components=COMPONENTS,
            sampler={"name": "dpmpp_2m" if family == "sd15" else "euler", "steps": 4, "guidance": 5.0},
        )  # fmt: skip
        cache[family, kind] = source, folder / "network", bundle
        return cache[family, kind]

    return get


def control_pipeline(family, kind, source, network):
    import diffusers

    classes = {
        ("sd15", "controlnet"): "StableDiffusionControlNetPipeline",
        ("sd15", "adapter"): "StableDiffusionAdapterPipeline",
        ("sdxl", "controlnet"): "StableDiffusionXLControlNetPipeline",
        ("sdxl", "adapter"): "StableDiffusionXLAdapterPipeline",
    }
    if kind == "controlnet":
        part = {"controlnet": diffusers.ControlNetModel.from_pretrained(network)}
    else:
        part = {"adapter": diffusers.T2IAdapter.from_pretrained(network)}
    pipe = getattr(diffusers, classes[family, kind]).from_pretrained(source, **part)
    if family == "sd15":
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference(family, kind, source, network, image, **options):
    pipe = control_pipeline(family, kind, source, network)
    image = image.convert("L") if (family, kind) == ("sd15", "adapter") else image
    latents = torch.from_numpy(noise.normal([5], 0, (4, 16, 16)))
    return pipe(
        "the cat", image=image, num_inference_steps=4, guidance_scale=5.0, height=64, width=64, latents=latents,
        output_type="np", **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_controlled_picture_equals_diffusers(made, edges, family, kind):
    source, network, bundle = made(family, kind)
    name = "controlnet_conditioning_scale" if kind == "controlnet" else "adapter_conditioning_scale"
    expected = reference(family, kind, source, network, edges, **{name: 0.8})
    pipe = accel.load(bundle, engine="onnxruntime")
    found = pipe("the cat", control_image=edges, control_scale=0.8, seed=5, output_type="np").images
    assert np.abs(found - expected).max() < ONE_STEP_OF_A_PIXEL
    without = pipe("the cat", seed=5, output_type="np").images
    assert np.abs(found - without).max() > 3 * ONE_STEP_OF_A_PIXEL, "the control picture has an effect"


def test_an_adapter_for_half_of_the_steps_equals_diffusers(made, edges):
    source, network, bundle = made("sdxl", "adapter")
    expected = reference(
        "sdxl", "adapter", source, network, edges, adapter_conditioning_scale=0.8, adapter_conditioning_factor=0.5
    )
    found = accel.load(bundle, engine="openvino")(
        "the cat", control_image=edges, control_scale=0.8, control_end=0.5, seed=5, output_type="np"
    ).images
    assert np.abs(found - expected).max() < ONE_STEP_OF_A_PIXEL


@pytest.mark.parametrize("engine", ["eager", "openvino"])
def test_other_engines_agree(made, edges, engine):
    _, _, bundle = made("sd15", "controlnet")
    pictures = [
        accel.load(bundle, engine=name)("the cat", control_image=edges, seed=5, output_type="np").images
        for name in ("onnxruntime", engine)
    ]
    assert np.abs(pictures[0] - pictures[1]).max() < ONE_STEP_OF_A_PIXEL


def test_without_a_control_picture_it_is_the_plain_model(made):
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
def test_a_control_network_of_another_family_is_refused_with_both_sides(made, sd15, sdxl, tmp_path, kind):
    _, network, _ = made("sdxl", kind)
    part = {"controlnet" if kind == "controlnet" else "adapter": network}
    with pytest.raises(UserError, match="another family") as error:
        export_pipeline(open_source(sd15, **part), tmp_path / "out", components=("unet",))
    assert error.value.fix and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "kind"), [("sd15", "controlnet"), ("sdxl", "adapter")])
def test_a_diffusers_pipeline_runs_on_the_compiled_control_network(made, edges, family, kind):
    """Attached, both the UNet and the control network are the bundle's; detached, the pipeline is as it was."""
    source, network, bundle = made(family, kind)
    pipe = control_pipeline(family, kind, source, network)
    options = dict(image=edges, num_inference_steps=2, guidance_scale=4.0, height=64, width=64, output_type="np")

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


@pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
def test_a_controlled_unet_on_tensorrt_runs_step_by_step(made, edges, tensorrt, with_plan_of_unet):
    """What is added differs from step to step, so there is no graph of the whole loop to replay."""
    theirs, ours = with_plan_of_unet(made("sd15", "controlnet")[2].path)
    for options in (dict(control_image=edges), dict(control_image=edges, control_end=0.5), {}):
        found, expected = (
            pipe("the cat", steps=2, seed=5, output_type="latent", **options).latents for pipe in (ours, theirs)
        )
        assert np.abs(found - expected).max() < 1e-4, options


def test_a_folder_that_is_no_control_network_is_refused(sd15):
    with pytest.raises(UserError, match="UNet2DConditionModel"):
        open_source(sd15, controlnet=sd15 / "unet")


def test_the_command_line_runs_canny_on_a_picture(made, tmp_path, edges):
    pytest.importorskip("skimage")
    _, _, bundle = made("sd15", "controlnet")
    edges.save(tmp_path / "photo.png")
    command = ["run", str(bundle.path), "--prompt", "the cat", "--control", str(tmp_path / "photo.png"), "--canny"]
    assert main([*command, "--engine", "onnxruntime", "--steps", "2", "--out", str(tmp_path / "out.png")]) == 0
    assert Image.open(tmp_path / "out.png").size == (64, 64)


def test_a_controlled_bundle_is_benched_with_its_control_network(made):
    from accel import bench

    _, _, bundle = made("sd15", "controlnet")
    result = bench.measure(bundle, [bench.parse("onnxruntime")], bench.Settings(rounds=1, memory=False))
    (row,) = result.document.as_dict()["rows"]
    assert {"controlnet", "unet", "vae_decoder"} <= set(row["scopes"])
    assert row["scopes"]["controlnet"]["timing"] is not None
    assert row["parity"]["image"]["max_abs"] < 1
