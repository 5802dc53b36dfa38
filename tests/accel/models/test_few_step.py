"""Few-step models as they are published: known by their names, and sampled as their authors' own examples do."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from accel.assets import resolve
from accel.cli import main
from accel.errors import UserError
from accel.models import few_step, single_file
from accel.models.constants import chosen_sampling, own_sampling
from accel.models.pipeline_bundle import open_pipeline
from accel.models.source import open_source
from accel.pipeline import load
from accel.sampling.samplers import NoiseSchedule, grid, sample, table

# The scheduler configs of SDXL and SD1.5.
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
TRAILING = {"timestep_spacing": "trailing"}
TURBO = SDXL | TRAILING | {"_class_name": "EulerAncestralDiscreteScheduler"}
SD_TURBO = SDXL | TRAILING
LCM = SDXL | {"_class_name": "LCMScheduler", "original_inference_steps": 50}
X0 = TRAILING | {"prediction_type": "sample"}


def trained(steps, guidance=0.0, **more):
    return {"steps": steps, "guidance": guidance} | more


# Published name, scheduler config of the folder, family, and the authors' example: scheduler, its changes, the call.
PUBLISHED = [
    ("dmd2_sdxl_4step_unet_fp16.bin", SDXL, "dmd2", "LCM", {}, trained(4, timesteps=[999, 749, 499, 249])),
    ("dmd2_sdxl_1step_unet_fp16.bin", SDXL, "dmd2", "LCM", {}, trained(1, timesteps=[399])),
    ("sdxl_lightning_2step_unet.safetensors", SDXL, "sdxl-lightning", "EulerDiscrete", TRAILING, trained(2)),
    ("sdxl_lightning_8step_lora.safetensors", SDXL, "sdxl-lightning", "EulerDiscrete", TRAILING, trained(8)),
    ("sdxl_lightning_1step_unet_x0.safetensors", SDXL, "sdxl-lightning-x0", "EulerDiscrete", X0, trained(1)),
    ("Hyper-SDXL-1step-Unet.safetensors", SDXL, "hyper-sdxl-unet", "LCM", {}, trained(1, timesteps=[800])),
    ("Hyper-SD15-1step-lora.safetensors", SDXL, "hyper-sd-1step", "TCD", {}, trained(1, eta=1.0)),
    ("Hyper-SDXL-2steps-lora.safetensors", SDXL, "hyper-sd", "DDIM", TRAILING, trained(2)),
    ("Hyper-SD15-8steps-CFG-lora.safetensors", SDXL, "hyper-sd-cfg", "DDIM", TRAILING, trained(8, 5.0)),
    ("Hyper-SDXL-12steps-CFG-lora.safetensors", SDXL, "hyper-sd-cfg", "DDIM", TRAILING, trained(12, 5.0)),
    ("pcm_sd15_smallcfg_2step_converted.safetensors", SDXL, "pcm", "TCD", TRAILING, trained(2, eta=0.0)),
    ("pcm_sdxl_normalcfg_8step_converted.safetensors", SDXL, "pcm-cfg", "TCD", TRAILING, trained(8, 7.5, eta=0.0)),
    ("pcm_sd15_lcmlike_lora_converted.safetensors", SDXL, "pcm-lcm", "LCM", {}, trained(4)),
    ("TCD-SDXL-LoRA/pytorch_lora_weights.safetensors", SDXL, "tcd", "TCD", {}, trained(4, eta=0.3)),
    ("lcm-lora-sdv1-5/pytorch_lora_weights.safetensors", SDXL, "lcm", "LCM", {}, trained(4, None)),
    ("stabilityai/sdxl-turbo", TURBO, "sdxl-turbo", "EulerAncestralDiscrete", {}, trained(1)),
    ("my-own-copy", TURBO, "sdxl-turbo", "EulerAncestralDiscrete", {}, trained(1)),
    ("sd_xl_turbo_1.0_fp16.safetensors", SDXL, "sdxl-turbo", "EulerAncestralDiscrete", TRAILING, trained(1)),
    ("stabilityai/sd-turbo", SD_TURBO, "sd-turbo", "EulerDiscrete", {}, trained(1)),
    ("my-lcm", LCM, "lcm", "LCM", {}, trained(4, None)),
    ("IDKiro/sdxs-512-0.9", SDXL, "sdxs", "EulerDiscrete", {}, trained(1)),
]


def known(name, config):
    """As a file where it has an ending, else as a folder or hub id."""
    is_file = Path(name).suffix in (".bin", ".safetensors")
    return few_step.recognise(None, [Path(name)] if is_file else [], "base" if is_file else name, config)


@pytest.mark.parametrize("name, config, family, scheduler, change, call", PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_a_published_model_is_sampled_as_its_authors_do(name, config, family, scheduler, change, call, monkeypatch):
    found = known(name, config)
    assert found.family.name == family
    constants = found.family.constants(found.steps, 8.5)
    assert constants["guidance"] == (8.5 if call["guidance"] is None else call["guidance"])
    config = config | dict(found.family.fields)
    constants["name"] = constants["name"] or "euler"  # SDXS: what its folder carries
    schedule = NoiseSchedule.from_scheduler(few_step.scheduler_of(config, constants) or config)
    options = constants.get("options", {})
    made = table(constants["name"], schedule, constants.get("steps"), timesteps=constants.get("timesteps"), **options)

    theirs = getattr(diffusers, f"{scheduler}Scheduler").from_config(config, **change)
    how = {"timesteps": call["timesteps"]} if "timesteps" in call else {"num_inference_steps": call["steps"]}
    theirs.set_timesteps(**how)
    assert list(made.timesteps) == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    x, *noise = (torch.randn(1, 4, 2, 2, generator=generator) for _ in range(20))
    i = 0
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "randn_tensor", lambda *_, **__: noise[i], raising=False)
    y = x * theirs.init_noise_sigma
    for i, t in enumerate(theirs.timesteps):  # noqa: B007 (the noise's)
        said = torch.tanh(0.7 * theirs.scale_model_input(y, t) + float(t) / 1000)
        y = theirs.step(said, t, y, **({"eta": call["eta"]} if "eta" in call else {}), return_dict=False)[0]

    def model(x, t):
        return torch.tanh(0.7 * x + float(t) / 1000)

    grid_of = dict(steps=constants.get("steps"), timesteps=constants.get("timesteps"))
    ours = sample(constants["name"], model, x, schedule, **grid_of, noise=noise.__getitem__, **options)
    assert (ours - y).abs().max() < 1e-5 * y.abs().max()


def test_every_family_is_tried_above():
    assert {row[2] for row in PUBLISHED} == {family.name for family in few_step.FAMILIES}


@pytest.mark.parametrize("name", ["photo-v12-lightning.safetensors", "anime_turbo.safetensors", "style-8step-lora.bin"])
def test_a_name_that_looks_few_step_and_fits_no_family_is_asked_about(name):
    assert known(name, SDXL) is None
    with pytest.raises(UserError, match=name) as error:
        few_step.ask_about([Path(name)], "base", SDXL)
    assert "--few-step sdxl-lightning" in error.value.fix.replace("NAME: one of ", "") or "none" in error.value.fix
    for forced in ("sdxl-lightning", "none"):
        found = few_step.recognise(forced, [Path(name)], "base", SDXL)
        assert (found and found.family.name) == (None if forced == "none" else forced)


@pytest.mark.parametrize(
    "name", ["realisticVision_v51.safetensors", "hyperrealism.safetensors", "stepford.bin", "pcmark"]
)
def test_an_ordinary_name_is_not(name):
    assert known(name, SDXL) is None
    few_step.ask_about([Path(name)], "base", SDXL)


def test_an_unknown_family_is_refused_with_the_known_ones(smallest):
    with pytest.raises(UserError, match="sdxl-lightening") as error:
        open_source(smallest, few_step="sdxl-lightening")
    assert "sdxl-lightning" in error.value.fix


# ------------------------------------------------------------------------------------------------------------- exports


@pytest.fixture(scope="module")
def lightning(smallest, tmp_path_factory):
    file = tmp_path_factory.mktemp("published") / "sdxl_lightning_4step_unet.safetensors"
    state = open_source(smallest).load("unet").state_dict()
    save_file({key: value.half().contiguous() for key, value in state.items()}, file)
    return file


@pytest.fixture
def source_copy(smallest, tmp_path):
    return Path(shutil.copytree(smallest, tmp_path / "source"))


def export(source, out, *more):
    """The exit code, and the manifest."""
    command = ["export", str(source), str(out), "--profile", "static", "--components", "vae_decoder", *map(str, more)]
    code = main(command)
    return code, json.loads((out / "accel.json").read_text()) if code == 0 else None


def test_a_few_step_unet_by_name_is_sampled_so_here_and_by_diffusers(smallest, lightning, tmp_path, capsys):
    code, manifest = export(smallest, tmp_path / "bundle", "--unet", lightning)
    said = capsys.readouterr().err
    assert code == 0 and "sdxl-lightning" in said and lightning.name in said
    kept = {"name": "euler", "steps": 4, "guidance": 0.0, "options": {"timestep_spacing": "trailing"}}
    assert manifest["sampler"] == kept and manifest["source"]["scheduler"] == "PNDMScheduler"
    theirs = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "bundle", subfolder="scheduler")
    theirs.set_timesteps(4)
    assert theirs.timesteps.tolist() == grid("euler", NoiseSchedule.from_folder(tmp_path / "bundle/scheduler"), 4)
    assert json.loads((tmp_path / "bundle/model_index.json").read_text())["scheduler"][1] == "EulerDiscreteScheduler"


def test_a_sampler_in_the_place_of_the_models_own_is_said_and_kept(smallest, tmp_path, capsys):
    code, manifest = export(smallest, tmp_path / "a", "--sampler", "dpmpp_2m", "--sigmas", "karras", "--steps", "9")
    said = capsys.readouterr().err
    assert code == 0 and "PNDMScheduler" in said and "dpmpp_2m" in said
    assert manifest["sampler"] == {"name": "dpmpp_2m", "steps": 9, "guidance": 7.5, "options": {"sigmas": "karras"}}
    assert manifest["source"]["scheduler"] == "PNDMScheduler"


def test_an_lcm_with_guidance_as_an_input_is_guided_as_its_pipeline_is(source_copy):
    def write(path, **change):
        file = source_copy / path
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    write("model_index.json", scheduler=["diffusers", "LCMScheduler"])
    assert own_sampling(open_source(source_copy)).as_dict() == {"name": "lcm", "steps": 4, "guidance": 0.0}
    write("unet/config.json", time_cond_proj_dim=32)
    assert own_sampling(open_source(source_copy)).guidance == 7.5
    write("model_index.json", _class_name="LatentConsistencyModelPipeline")
    assert own_sampling(open_source(source_copy)).guidance == 8.5


def test_an_lcm_lora_on_an_ordinary_unet_is_not_guided(smallest, tmp_path):
    from accel.models.lora import LoraFile

    file = LoraFile(tmp_path / "lcm-lora-sdv1-5" / "pytorch_lora_weights.safetensors", 1.0)
    source = dataclasses.replace(open_source(smallest), loras=(file,))
    assert source.sampler() == {"name": "lcm", "steps": 4, "guidance": 0.0}


def test_a_models_own_scheduler_is_what_is_sampled_with_or_refused_before_the_export(source_copy, tmp_path, capsys):
    file = source_copy / "scheduler/scheduler_config.json"
    assert own_sampling(open_source(source_copy)).sampler == "pndm"

    def become(**change):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        index = json.loads((source_copy / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", json.loads(file.read_text())["_class_name"]]
        (source_copy / "model_index.json").write_text(json.dumps(index))
        return open_source(source_copy)

    assert own_sampling(become(_class_name="UniPCMultistepScheduler")).as_dict()["name"] == "unipc"
    become(_class_name="KDPM2DiscreteScheduler")
    out = tmp_path / "bundle"
    assert export(source_copy, out)[0] != 0 and not out.exists()
    assert "KDPM2DiscreteScheduler" in (said := capsys.readouterr().err) and "--sampler" in said
    assert export(source_copy, out, "--sampler", "euler")[0] == 0
    source = become(
        _class_name="DPMSolverMultistepScheduler", algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
    )
    assert export(source_copy, tmp_path / "two")[0] != 0
    assert "algorithm_type" in capsys.readouterr().err
    assert chosen_sampling(source, "ddim", None, None, {})["name"] == "ddim"


# ------------------------------------------------------------------------------------------------------ the way out


@pytest.mark.parametrize("name", ["1step", "4step", "tiny-1step", "tiny-4step", "4step-int8", "tiny-1step-int8"])
def test_the_shipped_students_carry_the_scheduler_that_diffusers_needs(name):
    folder = Path(resolve(f"digits/{name}"))
    file = folder / "sampler.json"
    own = json.loads(file.read_text()) if file.is_file() else json.loads((folder / "accel.json").read_text())["sampler"]
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", "LCMScheduler"]
    scheduler = diffusers.LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(len(own["timesteps"]))
    assert scheduler.timesteps.tolist() == own["timesteps"]


@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [999, 499], [399], [999]])
def test_diffusers_draws_the_same_with_the_scheduler_that_is_written(timesteps, monkeypatch):
    written = few_step.scheduler_of(SDXL, {"name": "dmd2", "timesteps": timesteps})
    scheduler = diffusers.LCMScheduler.from_config(json.loads(json.dumps(written)))
    scheduler.set_timesteps(len(timesteps))
    assert scheduler.timesteps.tolist() == timesteps
    generator = torch.Generator().manual_seed(0)
    x, *noise = (torch.randn(1, 4, 2, 2, generator=generator) for _ in range(5))
    drawn = iter(noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(drawn))
    y = x
    for t in scheduler.timesteps:
        y = scheduler.step(torch.tanh(0.7 * y + float(t) / 1000), t, y, return_dict=False)[0]
    # Both on the model's own schedule and on the one that is written.
    for config in (SDXL, written):
        ours = sample(
            "dmd2",
            lambda x, t: torch.tanh(0.7 * x + float(t) / 1000),
            x,
            NoiseSchedule.from_scheduler(config),
            timesteps=timesteps,
            noise=noise.__getitem__,
        )
        assert np.allclose(ours, y, atol=1e-5 * float(y.abs().max()))


def test_a_file_that_marks_itself_as_v_prediction_is_sampled_so(tmp_path, smallest):
    weight = torch.zeros(1)
    save_file({"x": weight, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "marked.safetensors")
    marks = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert single_file.marks(tmp_path / "marked.safetensors") == marks
    torch.save({"x": weight, "v_pred": torch.zeros(0)}, tmp_path / "marked.ckpt")
    assert single_file.marks(tmp_path / "marked.ckpt") == {"prediction_type": "v_prediction"}
    for key, value, found in (
        ("modelspec.prediction_type", "v", "v_prediction"),
        ("modelspec.predict_key", "epsilon", "epsilon"),
        ("modelspec.title", "v", None),
    ):
        save_file({"x": weight}, tmp_path / "spec.safetensors", metadata={key: value})
        assert single_file.marks(tmp_path / "spec.safetensors").get("prediction_type") == found
    state = open_source(smallest).load("unet").state_dict()
    save_file(dict(state) | {"v_pred": torch.zeros(0)}, tmp_path / "unet.safetensors")
    assert open_source(smallest, unet=tmp_path / "unet.safetensors").scheduler()["prediction_type"] == "v_prediction"


# ------------------------------------------------------------------------------------------------------ whole pictures


def lora_of(unet, file):
    """A LoRA of every attention query and feed-forward input, in kohya's names, as published ones are."""
    generator, state = torch.Generator().manual_seed(2), {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "ff.net.0.proj")):
            key = f"lora_unet_{name.replace('.', '_')}"
            state[f"{key}.lora_down.weight"] = torch.randn(4, module.in_features, generator=generator) * 0.2
            state[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 4, generator=generator) * 0.2
            state[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(state, file)


def published(base, name, config, folder):
    """The pipeline folder, and the UNet file or LoRA beside it, in the layout in which such a model is published."""
    is_file = Path(name).suffix in (".bin", ".safetensors")
    source = Path(shutil.copytree(base, folder / ("base" if is_file else Path(name).name)))
    (source / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((source / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (source / "model_index.json").write_text(json.dumps(index))
    if not is_file:
        return source, None, None
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    unet = diffusers.UNet2DConditionModel.from_pretrained(source / "unet")
    if "lora" in name.lower() or "pcm" in name:
        lora_of(unet, file)
        return source, None, file
    state = {key: (value * 1.01).half().contiguous() for key, value in unet.state_dict().items()}
    torch.save(state, file) if file.suffix == ".bin" else save_file(state, file)
    return source, file, None


@pytest.mark.parametrize("name, config, family, scheduler, change, call", PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_a_published_model_draws_what_its_authors_example_draws(
    name, config, family, scheduler, change, call, smallest, sdxl, tmp_path
):
    xl = "xl" in name.lower() or family == "sdxl-turbo"
    source, file, lora = published(sdxl if xl else smallest, name, config, tmp_path)
    opened = open_source(source, loras=[lora] if lora else [], unet=file)
    ours = load(open_pipeline(opened), "eager")

    theirs = diffusers.DiffusionPipeline.from_pretrained(source, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(theirs.scheduler.config, **change)
    if file is not None:
        state = torch.load(file) if file.suffix == ".bin" else load_file(file)
        theirs.unet.load_state_dict({key: value.float() for key, value in state.items()})
    if lora is not None:
        theirs.load_lora_weights(lora.parent, weight_name=lora.name)
    own = {"timesteps": call["timesteps"]} if "timesteps" in call else {"num_inference_steps": call["steps"]}
    own |= {"eta": call["eta"]} if "eta" in call else {}
    with torch.no_grad():
        expected = theirs(
            "the cat", guidance_scale=call["guidance"] or 0.0, **own, generator=torch.manual_seed(5), output_type="np"
        ).images
    made = ours("the cat", generator=torch.manual_seed(5), output_type="np").images
    assert made.std() > 0.01 and np.abs(made - expected).max() < 1 / 255
