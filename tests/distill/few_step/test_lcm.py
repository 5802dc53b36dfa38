"""Consistency distillation: a step against the paper's formula, resume, and results that diffusers and accel run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from accel.distill import recipes, registry, settings
from accel.distill.data import rng
from accel.distill.data.encoders import Encoders, encoded
from accel.distill.data.examples import Examples, loader
from accel.distill.few_step import lcm
from accel.distill.few_step.lcm import LCM
from accel.distill.run import execute
from accel.distill.sources.open_data import open_data
from accel.errors import UserError
from accel.models.lora import WEIGHT_NAME
from accel.models.source import open_source
from accel.sampling.noise_schedule import NoiseSchedule
from accel.sampling.samplers import grid

UNET = Path("unet/diffusion_pytorch_model.safetensors")


def recipe(model: Path, **fields) -> settings.LCMRecipe:
    common: dict = dict(
        model=str(model),
        data="digits",
        resolution=64,
        random_flip=False,
        cache="none",
        steps=4,
        batch=2,
        learning_rate=1e-3,
        ema=0.9,
        checkpoint_every=2,
        sample_every=0,
        log="none",
    )
    return recipes.changed(settings.LCMRecipe(), **common | fields)


def method(model: Path, **fields) -> LCM:
    made = LCM(recipe(model, **fields), Encoders(open_source(model)))
    made.place(torch.device("cpu"), torch.float32)
    return made


def batch_of(made: LCM, size: int = 4) -> dict:
    how = dict(seed=0, resolution=64, center_crop=True, random_flip=False, size_conditioning=made.encoders.sdxl)
    return encoded(next(loader(Examples(open_data("digits"), **how), batch=size)), made.encoders)


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("loss", ["huber", "l2"])
def test_a_loss_is_the_papers_formula(sd15, kind, loss):
    """Algorithm 1 with DDIM, in float64 numpy, from the same predictions of two linear networks."""
    made = method(sd15, guidance=3.0, guidance_high=9.0, loss=loss, skip=30)
    object.__setattr__(made.process.schedule, "prediction_type", kind)
    # Predictions that tell prompts, timesteps and networks apart, instead of a UNet's.
    made.teacher = Linear(0.4)
    made.networks["unet"].module = Linear(0.7)
    batch = batch_of(made)
    ours, terms = made.loss(made.phases[0], batch, 0)

    index, seed = batch["index"], made.recipe.seed
    alphas = np.asarray(made.process.schedule.alphas_cumprod, np.float64)
    mean, std = (batch[name].double().numpy() for name in ("latent_mean", "latent_std"))
    x0 = mean + std * rng.normal(seed, index, "posterior", mean.shape[1:]).numpy()
    eps = rng.normal(seed, index, "noise", mean.shape[1:]).double().numpy()
    empty = made.encoders.prompts([""] * len(index))["context"]
    errors = []
    for row in range(len(index)):
        t = int(rng.integers(seed, [index[row]], "timestep", 1, 1000))
        s = max(t - 30, 0)
        w = float(rng.uniform(seed, [index[row]], "scale", 3.0, 9.0)) - 1  # the paper's w
        a, a_s = alphas[t], alphas[s]
        x_t = np.sqrt(a) * x0[row] + np.sqrt(1 - a) * eps[row]
        with_text, without = (
            parts(Linear(0.4).said(x_t, t, context[row]), x_t, a, kind) for context in (batch["context"], empty)
        )
        x0_hat, eps_hat = ((1 + w) * one - w * other for one, other in zip(with_text, without, strict=True))
        x_s = np.sqrt(a_s) * x0_hat + np.sqrt(1 - a_s) * eps_hat

        def f(x, level, context=batch["context"][row]):
            said = Linear(0.7).said(x, level, context)
            scaled = level / 0.1
            c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
            return c_skip * x + c_out * parts(said, x, alphas[level], kind)[0]

        d = f(x_t, t) - f(x_s, s)
        errors.append(np.mean(np.sqrt(d**2 + 1e-6) - 1e-3) if loss == "huber" else np.mean(d**2))
    assert ours.item() == pytest.approx(np.mean(errors), rel=1e-5) and terms["consistency"] is ours


class Linear(torch.nn.Module):
    """A network that says c x + cos(t) + the mean of the context."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor), requires_grad=False)

    def forward(self, x, t, context, added_cond_kwargs=None, return_dict=False):
        rows = t.double().cos() + context.double().mean((1, 2))
        return ((self.factor * x.double() + rows.view(-1, 1, 1, 1)).to(x.dtype),)

    def said(self, x, t, context):
        return float(self.factor) * x + np.cos(float(t)) + float(context.double().mean())


def parts(said, x_t, a, kind):
    """x_0 and eps that a prediction means."""
    if kind == "epsilon":
        return (x_t - np.sqrt(1 - a) * said) / np.sqrt(a), said
    return np.sqrt(a) * x_t - np.sqrt(1 - a) * said, np.sqrt(1 - a) * x_t + np.sqrt(a) * said


def test_the_boundary_is_that_of_lcmscheduler():
    scheduler, t = LCMScheduler(), torch.tensor([0, 1, 19, 500, 999])
    wanted = [scheduler.get_scalings_for_boundary_condition_discrete(float(level)) for level in t]
    assert torch.allclose(torch.stack(lcm.boundary(t), 1), torch.tensor(wanted, dtype=torch.float64), atol=1e-12)
    assert [c.item() for c in lcm.boundary(t[:1])] == [1, 0]


def test_a_solver_step_is_diffusers_ddim(sd15):
    from diffusers import DDIMScheduler

    made = method(sd15)
    config = made.encoders.source.config("scheduler")
    scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -20))
    torch.manual_seed(0)
    x_t, said = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for t in (999, 499, 19):  # to 0 from the last one: set_alpha_to_one is false
        ours = lcm.ddim(made.process, said, x_t, torch.tensor([t]), torch.tensor([max(t - 20, 0)]))
        assert torch.allclose(ours, scheduler.step(said, t, x_t).prev_sample, atol=1e-5)


def test_the_teachers_own_end_has_no_error(sd15):
    """Where noise is as good as gone the target is the input itself: f(x, 0) = x."""
    made = method(sd15)
    x = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        assert torch.equal(made.consistent(x, torch.tensor([0, 0]), made.family.conditions(batch_of(made, 2))), x)


@pytest.mark.parametrize(("fields", "bases"), [({}, 2), (dict(rank=2), 1)])
def test_only_the_student_learns(sd15, fields, bases):
    made = method(sd15, **fields)
    lists = [part.modules() for part in (made.student, made.teacher)]
    assert len({id(getattr(part, "network", part)) for part in (made.student, made.teacher)}) == bases, lists
    made.loss(made.phases[0], batch_of(made), 0)[0].backward()
    learnt = {name: p.grad for name, p in made.student.named_parameters() if "lora_A" not in name}
    assert all(grad is not None and grad.abs().max() > 0 for name, grad in learnt.items() if "lora_B" in name)
    assert sum(grad is not None and bool(grad.abs().max() > 0) for grad in learnt.values()) > 0.9 * len(learnt)
    assert all(p.grad is None for p in made.teacher.parameters() if not p.requires_grad)
    assert not list(made.teacher.parameters()) or not any(p.requires_grad for p in made.teacher.parameters())


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("fields", [dict(rank=2), dict(skip=100)])
def test_a_resumed_run_gives_the_same_weights(sd15, tmp_path, fields):
    torch.set_num_threads(1)
    execute(recipe(sd15, **fields), tmp_path / "straight")

    class Dies(LCM):
        def loss(self, phase, batch, step):
            if step == 3:
                raise RuntimeError("the power went off")
            return super().loss(phase, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accel.distill.few_step.lcm.LCM", Dies)
        with pytest.raises(RuntimeError, match="power"):
            execute(recipe(sd15, **fields), tmp_path / "resumed")
    execute(recipe(sd15, **fields), tmp_path / "resumed")
    file = WEIGHT_NAME if "rank" in fields else UNET
    ours, theirs = load_file(tmp_path / "resumed" / file), load_file(tmp_path / "straight" / file)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = [json.loads(line) for line in (tmp_path / "straight-run/losses.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(np.isfinite(line["consistency"]) for line in lines)


def test_training_makes_the_student_consistent(sd15, tmp_path):
    torch.set_num_threads(1)
    given = recipe(sd15, steps=40, batch=8, learning_rate=3e-3, guidance=2.0, ema=0.0, checkpoint_every=100)
    execute(given, tmp_path / "out")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out-run/losses.jsonl").read_text().splitlines()]
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:8])


def test_a_result_runs_in_diffusers_and_in_a_bundle(sd15, tmp_path):
    """At the same timesteps, also where the model came from DMD2, whose LCMScheduler has another grid."""
    import accel
    from accel.export.pipeline import export_pipeline

    model = Path(shutil.copytree(sd15, tmp_path / "model"))
    path = model / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"original_inference_steps": 1000}))
    given = recipe(model, steps=2, sample_every=2, sample_prompts="the cat", few_steps=5)
    execute(given, tmp_path / "out")
    assert (tmp_path / "out-run/samples/step-000002.png").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert type(pipeline.scheduler) is LCMScheduler
    pipeline.scheduler.set_timesteps(5)
    export_pipeline(tmp_path / "out", tmp_path / "bundle", profile="batch=1,size=64")
    bundle = accel.load(tmp_path / "bundle", engine="eager")
    assert bundle.bundle.manifest.sampler == {"name": "lcm", "steps": 5, "guidance": 0.0}
    schedule = NoiseSchedule.from_scheduler(open_source(tmp_path / "out").scheduler())
    assert grid("lcm", schedule, 5) == pipeline.scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
    assert bundle("the cat", seed=0, output_type="np").images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_lora_loads_into_diffusers_and_says_how_it_is_sampled(sd15, tmp_path, form):
    torch.set_num_threads(1)
    execute(recipe(sd15, rank=2, alpha=1.0, lora_format=form, learning_rate=1e-2, few_steps=2), tmp_path / "out")
    pipeline = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "out")
    pipeline.fuse_lora()
    source = open_source(sd15, loras=[tmp_path / "out" / WEIGHT_NAME])
    fused = source.load("unet")
    sample = (torch.randn(2, 4, 16, 16), torch.tensor([5, 700]), torch.randn(2, 7, fused.config.cross_attention_dim))
    with torch.no_grad():
        theirs, plain = pipeline.unet(*sample).sample, open_source(sd15).load("unet")(*sample).sample
        assert torch.allclose(fused(*sample).sample, theirs, atol=1e-4)
        assert not torch.allclose(plain, theirs, atol=1e-3)
    found = source.sampler()
    assert (found["name"], found["steps"], found["guidance"]) == ("lcm", 2, 0.0)
    assert open_source(sd15, loras=[tmp_path / "out" / WEIGHT_NAME], few_step="none").sampler() is None


def test_sdxl_learns_with_the_sizes_of_inference(sdxl, tmp_path):
    execute(recipe(sdxl, rank=2, steps=1), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHT_NAME).is_file()
    made = method(sdxl)
    assert made.family.conditions(batch_of(made, 1))[1]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]


def test_a_learning_rate_of_its_own_for_a_lora(sd15):
    encoders = Encoders(open_source(sd15))
    for fields, wanted in (({}, 1e-6), (dict(rank=4), 1e-4), (dict(learning_rate=0.5), 0.5)):
        given = recipes.changed(settings.LCMRecipe(), **fields)
        assert lcm.completed(given, encoders).learning_rate == wanted
    assert registry.recipe("lcm-lora-sdxl").rank == 64


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(skip=1000), "invalid skip: 1000 .expected an integer >= 1 and <= 999"),
        (dict(few_steps=0), "invalid few_steps: 0"),
        (dict(few_steps=51), "invalid few_steps: 51"),
        (dict(rank=2, teacher_dtype="bfloat16"), "shares its weights"),
        (dict(rank=-1), "invalid rank -1"),
        (dict(guidance=7.0, guidance_high=6.0), "from 7 to 6, which is lower"),
    ],
)
def test_what_cannot_be_is_said(sd15, fields, said):
    with pytest.raises(UserError, match=said):
        method(sd15, **fields)


def test_a_unet_that_takes_the_guidance_as_an_input_is_refused(sd15, tmp_path):
    other = Path(shutil.copytree(sd15, tmp_path / "other"))
    config = json.loads((other / "unet/config.json").read_text())
    (other / "unet/config.json").write_text(json.dumps(config | {"time_cond_proj_dim": 8}))
    with pytest.raises(UserError, match="takes the guidance scale as an input"):
        method(other)
    with pytest.raises(UserError, match="takes the guidance scale as an input"):
        method(sd15, teacher=str(other))
