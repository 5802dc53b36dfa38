"""The loop: exact resume, the same run in any layout, a teacher that stays out of it, and stops that cost nothing."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from accel.distill import recipes, run, settings
from accel.distill.methods import kd
from accel.distill.methods.kd import Denoising
from accel.distill.run import execute
from accel.distill.training import checkpoints
from accel.errors import UserError

UNET = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def images(twelve_images) -> Path:
    return twelve_images


def tiny(source: Path, images: Path, **fields) -> settings.DistillationRecipe:
    common: dict = dict(
        model=str(source),
        data=str(images),
        resolution=64,
        cache="none",
        steps=6,
        batch=4,
        learning_rate=1e-3,
        ema=0.9,
        checkpoint_every=2,
        sample_every=0,
        log="none",
        caption_dropout=0.3,
        seed=7,
    )
    return recipes.changed(recipes.tiny(), **common | fields)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]


def flags(recipe: settings.Recipe) -> list[str]:
    given = []
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if field.name == "student" or value == getattr(recipes.tiny(), field.name):
            continue
        name = field.name.replace("_", "-")
        given += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}={value}"]
    return given


def start(recipe: settings.Recipe, out: Path, *launcher: str) -> subprocess.Popen:
    command = [*(launcher or [sys.executable, "-m"]), "accel", "distill", "tiny", "--out", str(out), *flags(recipe)]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def straight(sd15, images, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "out"
    torch.set_num_threads(1)
    assert not execute(tiny(sd15, images), out).stopped
    return out


def same_weights(first: Path, second: Path) -> bool:
    ours, theirs = load_file(first), load_file(second)
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_result_is_a_pipeline_with_averaged_weights(straight):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(straight)
    assert len(pipeline.unet.up_blocks) == 3 and pipeline.unet.mid_block is None
    newest = checkpoints.all_of(straight.with_name("out-run"))[-1]
    assert same_weights(straight / UNET, newest / "unet_ema" / UNET.name)
    assert not same_weights(straight / UNET, newest / UNET)
    assert {path.stat().st_mode & 0o777 for path in straight.rglob("*") if path.is_file()} == {0o644}
    record = json.loads((straight / "training.json").read_text())
    assert record["steps"] == 6 and record["recipe"]["student"] == "tiny"


def test_a_killed_run_goes_on_to_the_same_weights(straight, sd15, images, tmp_path):
    recipe, out = tiny(sd15, images), tmp_path / "out"
    process = start(recipe, out)
    log = tmp_path / "out-run" / "losses.jsonl"
    while process.poll() is None and (not log.is_file() or len(log.read_text().splitlines()) < 3):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not out.exists() and 2 < len(lines(tmp_path / "out-run")) < 6
    done = start(recipe, out)
    assert done.communicate()[1] is not None and done.returncode == 0
    assert same_weights(out / UNET, straight / UNET)
    newest, wanted = (checkpoints.all_of(path)[-1] for path in (tmp_path / "out-run", straight.with_name("out-run")))
    assert same_weights(newest / UNET, wanted / UNET)
    ours, theirs = lines(tmp_path / "out-run"), lines(straight.with_name("out-run"))
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]


def test_ctrl_c_ends_after_a_step_with_a_checkpoint(sd15, images, tmp_path):
    process = start(tiny(sd15, images, steps=500, checkpoint_every=1000), tmp_path / "out")
    log = tmp_path / "out-run" / "losses.jsonl"
    while process.poll() is None and (not log.is_file() or len(log.read_text().splitlines()) < 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from there" in error
    newest = checkpoints.all_of(tmp_path / "out-run")[-1]
    assert json.loads((newest / "state.json").read_text())["step"] == len(lines(tmp_path / "out-run"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", ["in a step", "while writing a checkpoint"])
def test_an_error_costs_no_checkpoint(straight, sd15, images, tmp_path, monkeypatch, moment):
    """The run breaks in its fifth step, or in the middle of its second checkpoint; then it goes on exactly."""
    calls = []
    target = (Denoising, "loss") if moment == "in a step" else (checkpoints, "_write_network")

    def breaks(real):
        def wrapper(*args, **options):
            calls.append(1)
            if len(calls) == (5 if moment == "in a step" else 4):
                raise RuntimeError("the power went off")
            return real(*args, **options)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(*target, breaks(getattr(*target)))
        with pytest.raises(RuntimeError, match="power"):
            execute(tiny(sd15, images), tmp_path / "out")
    assert len(checkpoints.all_of(tmp_path / "out-run")) == (2 if moment == "in a step" else 1)
    execute(tiny(sd15, images), tmp_path / "out")
    assert same_weights(tmp_path / "out" / UNET, straight / UNET)


LAYOUTS = {"two micro-batches": dict(batch=2, accumulation=2), "four micro-batches": dict(batch=1, accumulation=4)}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_accumulation_gives_the_gradients_of_the_joint_batch(straight, sd15, images, tmp_path, layout):
    execute(tiny(sd15, images, steps=6, checkpoint_every=100, **layout), tmp_path / "out")
    first, wanted = lines(tmp_path / "out-run")[0], lines(straight.with_name("out-run"))[0]
    for name in ("loss", "task", "output", "feature", "grad_norm"):
        assert first[name] == pytest.approx(wanted[name], rel=1e-5), name


SHARDED = """
import sys, torch
from pathlib import Path
from accel.distill import recipes, run, settings
torch.set_num_threads(1)
run.execute(recipes.changed(recipes.tiny(), **eval(sys.argv[1])), Path(sys.argv[2]), overwrite=True)
"""


def test_fsdp2_gives_the_weights_of_one_process_also_on_resume(sd15, images, tmp_path, torchrun):
    recipe = tiny(sd15, images, batch=2, sample_every=2, sample_steps=1, sample_prompts="the cat")
    out = tmp_path / "out"
    for steps in (2, 4):
        said = torchrun(SHARDED, repr(dataclasses.asdict(recipe) | {"steps": steps}), out, sharded=True)
    assert "goes on at step 2" in said
    execute(tiny(sd15, images, steps=4), tmp_path / "one")
    ours, theirs = load_file(out / UNET), load_file(tmp_path / "one" / UNET)
    assert set(ours) == set(theirs)
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-4) for name in ours)


def test_the_teacher_stays_as_it_was_and_out_of_everything(sd15, images, tmp_path):
    from diffusers import UNet2DConditionModel

    from accel.distill.data.encoders import Encoders
    from accel.models.source import open_source

    method = kd.Distillation(tiny(sd15, images), Encoders(open_source(sd15)))
    teacher = UNet2DConditionModel.from_pretrained(sd15 / "unet").state_dict()
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())
    learns = {id(p) for network in method.networks.values() for p in network.module.parameters()}
    assert not learns & {id(parameter) for parameter in method.teacher.parameters()}
    assert all(torch.equal(value, teacher[name]) for name, value in method.teacher.unet.state_dict().items())
    execute(tiny(sd15, images, steps=2), tmp_path / "out")
    (newest,) = checkpoints.all_of(tmp_path / "out-run")
    student = sum(tensor.numel() for tensor in load_file(newest / UNET).values())
    assert student == sum(parameter.numel() for parameter in method.unet.parameters())
    moments = torch.load(newest / "optimizer-unet.pt", weights_only=True)["state"]
    assert len(moments) == len(list(method.unet.parameters()))
    assert sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) < 4 * 4 * student + 2_000_000


def test_a_checkpoints_network_loads_in_diffusers(straight):
    from diffusers import UNet2DConditionModel

    newest = checkpoints.all_of(straight.with_name("out-run"))[-1]
    for name in ("unet", "unet_ema"):
        assert UNet2DConditionModel.from_pretrained(newest / name).mid_block is None


def test_rotation_keeps_the_newest(sd15, images, tmp_path):
    execute(tiny(sd15, images, steps=5, checkpoint_every=1, keep=2), tmp_path / "out")
    assert [path.name for path in checkpoints.all_of(tmp_path / "out-run")] == ["step-000004", "step-000005"]


def test_a_loss_that_is_not_finite_names_the_step_and_the_images(sd15, images, tmp_path, monkeypatch):
    real = Denoising.loss

    def loss(self, phase, batch, step):
        total, terms = real(self, phase, batch, step)
        return (total * float("nan") if step == 3 else total), terms

    monkeypatch.setattr(Denoising, "loss", loss)
    with pytest.raises(UserError) as caught:
        execute(tiny(sd15, images), tmp_path / "out")
    assert "step 4" in caught.value.message and ".png" in caught.value.message
    assert "step-000002, is intact" in caught.value.message
    tensors = load_file(checkpoints.all_of(tmp_path / "out-run")[-1] / UNET)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def steep(monkeypatch, at: int) -> None:
    """The square root of zero: a finite loss with a gradient that is not, in one step."""
    real = Denoising.loss

    def loss(self, phase, batch, step):
        total, terms = real(self, phase, batch, step)
        zero = next(self.unet.parameters()).flatten()[0] * 0
        return (total + zero.sqrt() if step == at else total), terms

    monkeypatch.setattr(Denoising, "loss", loss)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(sd15, images, tmp_path, monkeypatch):
    steep(monkeypatch, at=3)
    with pytest.raises(UserError, match="the gradient of phase unet is not finite at step 4.*step-000003, is intact"):
        execute(tiny(sd15, images, checkpoint_every=1), tmp_path / "out")
    newest = checkpoints.all_of(tmp_path / "out-run")[-1]
    assert newest.name == "step-000003"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(newest / UNET).values())


def scaled(monkeypatch, **options) -> None:
    """Loss scaling as float16 on a GPU has it, on this machine."""
    made = run.accelerator_for

    def accelerator_for(recipe, folder):
        accelerator = made(recipe, folder)
        accelerator.scaler = torch.amp.GradScaler("cpu", **options)
        return accelerator

    monkeypatch.setattr(run, "accelerator_for", accelerator_for)


def test_the_loss_scale_of_float16_goes_on_where_it_was(sd15, images, tmp_path, monkeypatch):
    scaled(monkeypatch, init_scale=4.0, growth_interval=2)

    def scale(step: int) -> float:
        state = tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "state.json"
        return json.loads(state.read_text())["scaler"]["scale"]

    execute(tiny(sd15, images, steps=2, accumulation=2, batch=2), tmp_path / "first", tmp_path / "run")
    assert scale(2) == 8
    execute(tiny(sd15, images, steps=4, accumulation=2, batch=2), tmp_path / "second", tmp_path / "run")
    assert scale(4) == 16


def test_an_overflow_of_float16_skips_updates_and_not_more(straight, sd15, images, tmp_path, monkeypatch):
    scaled(monkeypatch, init_scale=4.0)
    steep(monkeypatch, at=0)
    recipe = tiny(sd15, images, steps=2, checkpoint_every=1, ema=0.0, lr_schedule="linear")
    execute(recipe, tmp_path / "out")
    from diffusers import UNet2DConditionModel

    from accel.distill.methods.students import make_student

    begin = make_student(UNet2DConditionModel.from_pretrained(sd15 / "unet"), "tiny").state_dict()
    first, second = (load_file(path / UNET) for path in checkpoints.all_of(tmp_path / "out-run"))
    assert all(torch.equal(first[name], begin[name]) for name in begin)
    assert not all(torch.equal(second[name], begin[name]) for name in begin)
    logged = lines(tmp_path / "out-run")
    assert logged[0]["grad_norm"] is None and logged[1]["grad_norm"] > 0
    assert [line["lr"] for line in logged] == [1e-3, 5e-4]


def test_float16_that_overflows_at_any_scale_is_an_error(sd15, images, tmp_path, monkeypatch):
    scaled(monkeypatch, init_scale=0.5)
    steep(monkeypatch, at=0)
    with pytest.raises(UserError, match="the gradient of phase unet is not finite"):
        execute(tiny(sd15, images), tmp_path / "out")


@pytest.mark.parametrize("at", [UNET, Path("optimizer-unet.pt")], ids=["in the weights", "in the moments"])
def test_a_full_disk_is_told_and_costs_no_checkpoint(sd15, images, tmp_path, monkeypatch, at):
    """A limit on the size of files stands for it: the system refuses the write in the same places."""
    real = checkpoints.write

    def write(folder, step, **state):
        if step == 4:
            size = (checkpoints.all_of(folder)[-1] / at).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, resource.RLIM_INFINITY))
        try:
            return real(folder, step, **state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", write)
        with pytest.raises(UserError, match="cannot be written: .*; the ones before it are intact"):
            execute(tiny(sd15, images), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out-run" / "checkpoints").iterdir()] == ["step-000002"]
    assert execute(tiny(sd15, images), tmp_path / "out").steps == 6


def test_what_killed_runs_left_is_removed_and_never_read(sd15, images, tmp_path):
    left = tmp_path / "run" / "checkpoints" / ".step-000099.partial"
    left.mkdir(parents=True)
    (left / "rng-0.pt").write_bytes(b"half")
    execute(tiny(sd15, images, steps=2), tmp_path / "out", tmp_path / "run")
    assert [path.name for path in left.parent.iterdir()] == ["step-000002"]


def test_a_run_that_is_further_than_asked_for_is_no_result(sd15, images, tmp_path):
    execute(tiny(sd15, images, steps=2), tmp_path / "first", tmp_path / "run")
    with pytest.raises(UserError, match="is at step 2 already, 1 are asked for"):
        execute(tiny(sd15, images, steps=1), tmp_path / "second", tmp_path / "run")


def test_the_averages_of_a_turn_that_comes_seldom_go_on_where_they_were(sd15, images, tmp_path, monkeypatch):
    """Their decay warms up with the number of updates."""
    made = Denoising.__init__

    def seldom(self, *args):
        made(self, *args)
        self.phases = (dataclasses.replace(self.phases[0], every=2),)

    monkeypatch.setattr(Denoising, "__init__", seldom)
    execute(tiny(sd15, images, steps=9, checkpoint_every=3), tmp_path / "straight")
    for steps in (3, 9):
        execute(tiny(sd15, images, steps=steps, checkpoint_every=3), tmp_path / f"{steps}", tmp_path / "run")
    assert same_weights(tmp_path / "9" / UNET, tmp_path / "straight" / UNET)


def test_other_settings_in_the_same_run_folder_are_refused_by_name(straight, sd15, images, tmp_path):
    folder = straight.with_name("out-run")
    with pytest.raises(UserError, match=r"learning_rate was 0.001, is now 0.002"):
        execute(tiny(sd15, images, steps=8, learning_rate=2e-3), tmp_path / "out", folder)
    with pytest.raises(UserError, match=r"global_batch was 4, is now 8"):
        execute(tiny(sd15, images, batch=8), tmp_path / "out", folder)
    with pytest.raises(UserError, match=r"cached was False, is now True"):
        execute(tiny(sd15, images, cache=str(tmp_path / "cache")), tmp_path / "out", folder)


def test_the_same_global_batch_may_be_divided_otherwise_on_resume(sd15, images, tmp_path):
    execute(tiny(sd15, images, steps=2), tmp_path / "first", tmp_path / "run")
    again = tiny(sd15, images, steps=4, batch=2, accumulation=2)
    assert execute(again, tmp_path / "second", tmp_path / "run").steps == 4


def test_a_damaged_checkpoint_says_so(sd15, images, tmp_path):
    execute(tiny(sd15, images, steps=2), tmp_path / "first", tmp_path / "run")
    weights = checkpoints.all_of(tmp_path / "run")[-1] / UNET
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        execute(tiny(sd15, images, steps=4), tmp_path / "second", tmp_path / "run")


def test_sample_grids_and_tensorboard(sd15, images, tmp_path):
    pytest.importorskip("tensorboard")
    recipe = tiny(
        sd15, images, steps=2, sample_every=1, sample_steps=2, sample_prompts="the cat|the dog", log="tensorboard"
    )
    execute(recipe, tmp_path / "out")
    first, second = (Image.open(tmp_path / f"out-run/samples/step-{n:06d}.png").convert("RGB") for n in (1, 2))
    assert first.size == second.size and first.tobytes() != second.tobytes()
    assert list((tmp_path / "out-run").rglob("events.out.tfevents.*"))


def test_sdxl_to_vega_and_min_snr_and_offset_noise(sdxl, images, tmp_path):
    recipe = recipes.changed(
        recipes.vega(),
        model=str(sdxl),
        data=str(images),
        resolution=64,
        cache="none",
        steps=2,
        batch=2,
        accumulation=1,
        checkpoint_every=2,
        sample_every=0,
        log="none",
        snr_gamma=5.0,
        offset_noise=0.05,
        input_perturbation=0.1,
        mixed_precision="no",
        gradient_checkpointing=True,
    )
    execute(recipe, tmp_path / "out")
    from diffusers import StableDiffusionXLPipeline

    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "out").unet.mid_block.attentions is not None
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "out-run"))


def test_gradient_checkpointing_changes_no_gradient(straight, sd15, images, tmp_path):
    execute(tiny(sd15, images, checkpoint_every=100, gradient_checkpointing=True), tmp_path / "out")
    first, wanted = lines(tmp_path / "out-run")[0], lines(straight.with_name("out-run"))[0]
    assert first["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


def test_mixed_precision_trains_with_a_half_precision_teacher(sd15, images, tmp_path):
    execute(tiny(sd15, images, steps=2, mixed_precision="bf16"), tmp_path / "out")
    assert all(np.isfinite(line["feature"]) for line in lines(tmp_path / "out-run"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / UNET).values()} == {torch.float32}


BAD = {
    "no model": (dict(model=""), "no --model"),
    "precision": (dict(mixed_precision="int4"), "invalid mixed_precision: .int4."),
    "schedule": (dict(lr_schedule="wavy"), "invalid lr_schedule: .wavy. .expected one of: constant, linear"),
    "optimizer": (dict(optimizer="lion"), "invalid optimizer"),
    "eight bits": (dict(optimizer="adamw8bit"), "bitsandbytes"),
    "log": (dict(log="paper"), "unknown log"),
    "attention": (dict(attention="flash-attn"), "flash-attn"),
    "xformers": (dict(attention="xformers"), "xformers"),
    "name": (dict(attention="magic"), "invalid attention"),
    "ema": (dict(ema=2.0), "invalid ema: 2.0 .expected a finite number >= 0 and < 1"),
    "resolution": (dict(resolution=60), "not a multiple of 32"),
    "features": (dict(features="some"), "invalid features"),
    "weights": (dict(task_weight=0.0, output_weight=0.0, feature_weight=0.0), "all loss weights are 0"),
    "teacher": (dict(teacher_dtype="int8"), "invalid teacher_dtype"),
    "data": (dict(data="nowhere"), "nowhere"),
    "saved": (dict(save_dtype="int8"), "invalid save_dtype"),
    "keep": (dict(keep=-1), "invalid keep: -1 .expected an integer >= 0"),
    "interval": (dict(checkpoint_every=0), "invalid checkpoint_every: 0 .expected an integer >= 1"),
    "batch": (dict(batch=0), "invalid batch: 0"),
    "accumulation": (dict(accumulation=0), "invalid accumulation: 0"),
    "seed": (dict(seed=-1), "invalid seed: -1"),
    "rate": (dict(learning_rate=float("nan")), "invalid learning_rate: nan"),
    "beta": (dict(beta2=1.0), "invalid beta2: 1.0"),
    "clipping": (dict(max_grad_norm=0.0), "invalid max_grad_norm: 0.0 .expected a finite number > 0"),
    "layers": (dict(student="vega"), "made of SDXL"),
}


@pytest.mark.parametrize(("fields", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_honoured_is_an_error_for_people(sd15, images, tmp_path, fields, words):
    """And before the cache is made, which may take hours."""
    with pytest.raises(UserError, match=words):
        execute(tiny(sd15, images, **{"cache": "auto"} | fields), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_refused_at_the_start(sd15, images, tmp_path):
    recipe, file, other = tiny(sd15, images, data="nowhere"), tmp_path / "file", tmp_path / "other"
    file.write_text("mine")
    other.mkdir()
    (other / "mine").write_text("mine")
    for out, run_folder, words in (
        (tmp_path / "out", tmp_path / "out" / "run", "lies in the result"),
        (tmp_path / "out", tmp_path / "out", "lies in the result"),
        (tmp_path / "out", file / "run", "is a file"),
        (file / "out", tmp_path / "run", "is a file"),
        (other, None, "not something accel wrote"),
    ):
        with pytest.raises(UserError, match=words):
            execute(recipe, out, run_folder, overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "other"]


def test_two_runs_never_share_a_folder(sd15, images, tmp_path, monkeypatch):
    real = Denoising.loss

    def loss(self, phase, batch, step):
        with pytest.raises(UserError, match="another process is writing"):
            execute(tiny(sd15, images), tmp_path / "other", tmp_path / "run")
        return real(self, phase, batch, step)

    monkeypatch.setattr(Denoising, "loss", loss)
    assert execute(tiny(sd15, images, steps=1), tmp_path / "out", tmp_path / "run").steps == 1


def test_the_teacher_is_told_the_sizes_that_the_student_is_told(sdxl, images, tmp_path, monkeypatch):
    """1023 pixels are 1024 in bfloat16, and another embedding."""
    from accel.distill.data import examples

    seen = []
    real = kd.Distillation._teach

    def teach(self, *args):
        hook = self.teacher.unet.add_time_proj.register_forward_hook(lambda module, ids, out: seen.append(ids[0]))
        made = real(self, *args)
        hook.remove()
        return made

    monkeypatch.setattr(kd.Distillation, "_teach", teach)
    monkeypatch.setattr(examples, "time_ids", lambda *args: [1023, 1021, 3, 5, 64, 64])
    recipe = recipes.changed(
        recipes.vega(),
        model=str(sdxl),
        data=str(images),
        resolution=64,
        cache="none",
        steps=1,
        batch=1,
        accumulation=1,
        sample_every=0,
        log="none",
        mixed_precision="bf16",
    )
    execute(recipe, tmp_path / "out")
    assert [ids.tolist() for ids in seen] == [[1023, 1021, 3, 5, 64, 64]]


def test_samples_are_decoded_outside_of_autocast(sd15, images, tmp_path, monkeypatch):
    """SDXL's VAE overflows in float16. The UNet runs under it."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    seen = []

    def watched(real):
        def wrapper(self, *args, **options):
            seen.append((type(self).__name__, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return real(self, *args, **options)

        return wrapper

    monkeypatch.setattr(AutoencoderKL, "decode", watched(AutoencoderKL.decode))
    monkeypatch.setattr(UNet2DConditionModel, "forward", watched(UNet2DConditionModel.forward))
    recipe = tiny(sd15, images, steps=1, sample_every=1, sample_steps=1, mixed_precision="bf16")
    execute(recipe, tmp_path / "out")
    assert seen[-2:] == [("UNet2DConditionModel", False, True), ("AutoencoderKL", False, False)]


def test_an_existing_result_is_not_replaced_unasked(straight, sd15, images):
    before = (straight / UNET).stat().st_mtime_ns
    with pytest.raises(UserError, match="exists already"):
        execute(tiny(sd15, images), straight)
    assert (straight / UNET).stat().st_mtime_ns == before


def test_an_option_is_never_taken_for_another_one(capsys):
    """--lr is what others call --learning-rate; as an abbreviation it would be --lr-schedule."""
    from accel.cli import main

    assert main(["distill", "tiny", "--model", "digits", "--data", "digits", "--out", "nowhere", "--lr", "1"]) == 2
    assert "unknown option '--lr'" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_networks_give_the_same_losses(straight, sd15, images, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    execute(tiny(sd15, images, steps=2, lr_schedule="constant", compile=True), tmp_path / "out")
    for ours, wanted in zip(lines(tmp_path / "out-run"), lines(straight.with_name("out-run")), strict=False):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
