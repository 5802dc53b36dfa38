"""DMD2: its gradient against the closed form, its steps against LCMScheduler, what learns and what does not."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from accel.distill import recipes, registry, settings
from accel.distill.data.encoders import Encoders, encoded
from accel.distill.data.examples import Examples, loader
from accel.distill.diffusion.process import Diffusion
from accel.distill.few_step import shared_lora
from accel.distill.few_step.dmd2 import DMD2, matching_gradient, matching_loss, timesteps_of
from accel.distill.run import execute
from accel.distill.sources.open_data import open_data
from accel.distill.training import checkpoints
from accel.distill.training.method import OptimizerPhase
from accel.errors import UserError
from accel.models.lora import WEIGHT_NAME, fuse, lora_file
from accel.models.source import open_source
from accel.sampling.noise_schedule import NoiseSchedule
from accel.sampling.samplers import dmd2_timesteps

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
UNET = Path("unet/diffusion_pytorch_model.safetensors")


def diffusion(kind: str) -> Diffusion:
    return Diffusion(NoiseSchedule.from_config(SD | {"prediction_type": kind}))


def recipe(model: Path, **fields) -> settings.DMD2Recipe:
    common: dict = dict(
        model=str(model),
        data="digits",
        resolution=64,
        random_flip=False,
        cache="none",
        steps=4,
        batch=2,
        ratio=2,
        learning_rate=1e-4,
        ema=0.9,
        checkpoint_every=2,
        sample_every=0,
        log="none",
    )
    return recipes.changed(settings.DMD2Recipe(), **common | fields)


def method(model: Path, **fields) -> DMD2:
    made = DMD2(recipe(model, **fields), Encoders(open_source(model)))
    made.place(torch.device("cpu"), torch.float32)
    return made


def batch_of(made: DMD2, size: int = 2) -> dict:
    examples = Examples(
        open_data("digits"),
        seed=0,
        resolution=64,
        center_crop=True,
        random_flip=False,
        size_conditioning=made.encoders.sdxl,
    )
    return encoded(next(loader(examples, batch=size)), made.encoders)


# ------------------------------------------------------------------------------------------------------------ equations


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_x0_undoes_the_forward_process(kind):
    process = diffusion(kind)
    torch.manual_seed(0)
    x0, eps, t = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 499, 998, 999])
    x_t = process.add_noise(x0.double(), eps.double(), t)
    back = process.x0(process.target(x0.double(), eps.double(), t), x_t, t)
    assert back.dtype == torch.float64 and torch.allclose(back, x0.double(), atol=1e-10)
    reference = DDPMScheduler(**SD).add_noise(x0, eps, t)
    assert torch.allclose(x_t.float(), reference, atol=1e-5)


def test_the_gradient_of_the_matching_loss_is_the_closed_form():
    """d loss / d x = (mu_fake - mu_real) / mean|x - mu_real| / (b c h w), per sample; no gradient goes elsewhere."""
    torch.manual_seed(0)
    x, real, fake = (torch.randn(3, 4, 8, 8, requires_grad=True) for _ in range(3))
    gradient = matching_gradient(x.detach(), real, fake).detach()
    matching_loss(x, gradient).backward()
    for row in range(3):
        scale = (x[row] - real[row]).abs().mean()
        wanted = (fake[row] - real[row]) / scale / x.numel()
        assert torch.allclose(x.grad[row], wanted, rtol=1e-4, atol=1e-8)


def test_following_the_gradient_brings_two_gaussians_together():
    """G(z) = z + shift, data N(2, 1): both scores are known in closed form, and the shift must find 2."""
    process = diffusion("sample")
    shift = torch.zeros(1, requires_grad=True)
    generator = torch.Generator().manual_seed(0)

    def mean(x_t, a, centre):  # E[x_0 | x_t] for x_0 ~ N(centre, 1)
        return centre + a.sqrt() * (x_t - a.sqrt() * centre)

    optimizer = torch.optim.SGD([shift], lr=0.5)
    for _ in range(200):
        x = torch.randn(64, 1, 1, 1, generator=generator) + shift
        t = torch.randint(20, 981, (64,), generator=generator)
        x_t = process.add_noise(x.detach(), torch.randn(x.shape, generator=generator), t).double()
        a = process.alpha_bar(t).view(-1, 1, 1, 1)
        gradient = matching_gradient(x.detach(), mean(x_t, a, 2.0), mean(x_t, a, shift.item())).float()
        optimizer.zero_grad()
        matching_loss(x, gradient).backward()
        optimizer.step()
    assert shift.item() == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize(
    ("count", "steps"),
    [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249]), (8, [999, 874, 749, 624, 499, 374, 249, 124])],
)
def test_steps_are_the_published_ones(count, steps):
    assert dmd2_timesteps(count, one_step=999) == steps


def test_a_number_that_does_not_divide_gives_that_many_steps():
    assert len(dmd2_timesteps(3)) == 3 and len(dmd2_timesteps(7)) == 7


@pytest.mark.parametrize("fields", [dict(timesteps="399"), dict(timesteps="999,749,499,249"), dict(few_steps=2)])
def test_timesteps_by_name(fields):
    wanted = {"399": (399,), "999,749,499,249": (999, 749, 499, 249), "": (999, 499)}[fields.get("timesteps", "")]
    assert timesteps_of(recipes.changed(settings.DMD2Recipe(), **fields), 1000) == wanted


@pytest.mark.parametrize(
    "fields",
    [
        dict(timesteps="249,999"),
        dict(timesteps="a"),
        dict(timesteps="1000"),
        dict(few_steps=0),
        dict(timesteps="500,500"),
        dict(few_steps=2000),
    ],
)
def test_timesteps_that_cannot_be_are_errors_for_people(fields):
    with pytest.raises(UserError, match="step"):
        timesteps_of(recipes.changed(settings.DMD2Recipe(), **fields), 1000)


# ------------------------------------------------------------------------------------------------------------ generator


def test_backward_simulation_is_lcm_schedulers_sampling(sd15, monkeypatch):
    """G's images in training are the ones it will draw: LCMScheduler with the same timesteps and the same noise."""
    made = method(sd15)
    batch = batch_of(made)
    with torch.no_grad():
        ours = made.draw(batch, [3, 3])
    scheduler = LCMScheduler.from_config(open_source(sd15).config("scheduler"))
    scheduler.set_timesteps(timesteps=[999, 749, 499, 249])
    noises = iter([made.normal(batch, "renoise", number) for number in range(3)])
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(noises))
    latents = made.normal(batch, "noise")
    with torch.no_grad():
        for t in scheduler.timesteps:
            said = made.generator(latents, t, batch["context"]).sample
            latents = scheduler.step(said, t, latents, return_dict=False)[0]
    assert torch.allclose(ours, latents, atol=2e-4)


def test_only_the_last_call_of_the_generator_has_a_gradient(sd15):
    made = method(sd15)
    batch = batch_of(made)
    calls = []
    made.generator.register_forward_hook(lambda module, given, out: calls.append(torch.is_grad_enabled()))
    assert made.draw(batch, [2, 2]).requires_grad
    assert calls == [False, False, True]


def test_a_batch_of_all_steps_is_those_of_one_step_put_together(sd15):
    """And an image's last call, and no other, has a gradient."""
    made = method(sd15)
    batch = batch_of(made, 8)
    last = made.last(batch, 0)
    assert last == [0, 1, 2, 3, 0, 1, 2, 3]
    calls = []
    made.generator.register_forward_pre_hook(
        lambda module, given: calls.append((int(given[1][0]), len(given[0]), torch.is_grad_enabled()))
    )
    together = made.draw(batch, last)
    assert calls == [
        (999, 2, True),
        (999, 6, False),
        (749, 2, True),
        (749, 4, False),
        (499, 2, True),
        (499, 2, False),
        (249, 2, True),
    ]
    for number in range(4):
        alone = made.draw(batch, [number] * 8)
        rows = [row for row, step in enumerate(last) if step == number]
        assert torch.allclose(together[rows], alone[rows], atol=1e-4)


def test_one_step_a_batch_is_the_same_for_all_processes(sd15):
    made = method(sd15, mixed_steps=False)
    batch = batch_of(made, 4)
    steps = [made.last(batch, step) for step in range(30)]
    assert all(len(set(last)) == 1 for last in steps) and {last[0] for last in steps} == {0, 1, 2, 3}
    assert made.last(batch | {"index": [7, 8]}, 3) == made.last(batch, 3)[:2]


def test_smaller_micro_batches_do_not_turn_mixed_steps_off_on_resume():
    def compared(**fields):
        return checkpoints.settings(recipes.changed(settings.DMD2Recipe(), model="m", data="d", **fields), 1)

    whole = compared(few_steps=4, batch=8)
    assert compared(few_steps=4, batch=4, accumulation=2) == whole
    assert compared(few_steps=4, batch=2, accumulation=4) != whole
    assert compared(timesteps="999,499", batch=2, accumulation=4)["mixed_steps"]


def test_the_critic_is_told_which_step_drew_an_image(sd15):
    made = method(sd15)
    batch = batch_of(made, 8)
    with torch.no_grad():
        made.critic.step_embedding[2] += 1
        x_t, t = torch.randn(8, 4, 16, 16), torch.full((8,), 500)
        conditions = made.family.conditions(batch)
        told = made.critic.score(x_t, t, conditions, made.last(batch, 0))
        plain = made.critic._family.call(made.critic.network, x_t, t, conditions)
    differs = [not torch.allclose(one, other, atol=1e-5) for one, other in zip(told, plain, strict=True)]
    assert differs == [False, False, True, False] * 2
    assert (
        method(sd15, step_aware=False).critic.step_embedding is None
        and method(sd15, few_steps=1).critic.step_embedding is None
    )


def test_without_backward_simulation_the_generator_learns_on_noised_images(sd15):
    made = method(sd15, backward_simulation=False)
    batch = batch_of(made)
    seen = []
    made.generator.register_forward_pre_hook(lambda module, given: seen.append(given))
    made.draw(batch, [2, 2])
    ((x_t, t, *_),) = seen
    assert t.tolist() == [499, 499]
    clean = batch["latent_mean"]
    a = made.process.alpha_bar(t)[0]
    # What is left after taking the image away is noise of the right size.
    noise = (x_t - a.sqrt().float() * clean) / (1 - a).sqrt().float()
    assert noise.std().item() == pytest.approx(1.0, abs=0.1)


# -------------------------------------------------------------------------------------------------------- who may learn


def gradients(module: torch.nn.Module) -> dict[str, bool]:
    return {name: p.grad is not None and bool((p.grad != 0).any()) for name, p in module.named_parameters()}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_each_turn_reaches_its_own_network_and_no_other(family, request):
    made = method(request.getfixturevalue(family))
    batch = batch_of(made)
    generator, critic = made.phases
    total, terms = made.loss(generator, batch, 0)
    total.backward()
    assert all(gradients(made.generator).values())
    assert not any(gradients(made.critic).values()) and not any(gradients(made.teacher).values())
    assert set(terms) == {"matching", "adversarial", "gradient", "lag"}
    made.generator.zero_grad(set_to_none=True)
    total, terms = made.loss(critic, batch, 0)
    total.backward()
    assert all(gradients(made.critic).values())
    assert not any(gradients(made.generator).values()) and not any(gradients(made.teacher).values())
    assert set(terms) == {"denoising", "discriminator", "accuracy"}


def test_the_critic_learns_on_the_images_of_the_generators_turn(sd15, monkeypatch):
    made = method(sd15)
    batch = batch_of(made)
    made.loss(made.phases[0], batch, 0)
    monkeypatch.setattr(made, "draw", lambda *_: pytest.fail("drawn twice"))
    made.loss(made.phases[1], batch, 0)
    assert made._drawn == {}


def test_without_a_gan_the_head_does_not_learn(sd15):
    made = method(sd15, adversarial_weight=0.0)
    batch = batch_of(made)
    total, terms = made.loss(made.phases[1], batch, 1)
    total.backward()
    assert set(terms) == {"denoising"} and not any(gradients(made.critic.head).values())


def test_real_guidance_is_classifier_free_guidance(sd15):
    made = method(sd15, real_guidance=3.0)
    batch = batch_of(made)
    x_t, t = torch.randn(2, 4, 16, 16), torch.tensor([500, 20])
    with torch.no_grad():
        with_text = made.teacher(x_t, t, batch["context"]).sample
        without = made.teacher(x_t, t, made.encoders.prompts(["", ""])["context"]).sample
        plain, ours = made.guided(x_t, t, batch, 3.0)
    assert torch.allclose(ours.float(), without + 3.0 * (with_text - without), atol=1e-5)
    assert torch.allclose(plain.float(), with_text, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- decoupled DMD


def at_levels(made: DMD2, monkeypatch, **levels: int) -> None:
    """Timesteps of the streams instead of random ones, and one noise for all."""
    eps = torch.randn(2, 4, 16, 16)
    monkeypatch.setattr(made, "matching_noise", lambda batch, stream, *_: (torch.tensor([levels[stream]] * 2), eps))


def test_decoupled_at_one_timestep_is_plain_dmd2(sd15, monkeypatch):
    plain, apart = (method(sd15, real_guidance=3.0, decoupled=name) for name in ("", "hybrid"))
    batch, x = batch_of(plain), torch.randn(2, 4, 16, 16)
    found = []
    for made in (plain, apart):
        torch.manual_seed(0)
        at_levels(made, monkeypatch, matching=300, guidance=300)
        found.append(made.matching_gradient(x, batch, [0, 2]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6 * float(found[0][0].abs().max()))
    assert found[0][1]["lag"].item() == pytest.approx(found[1][1]["lag"].item(), rel=1e-6)


def test_the_decoupled_gradient_is_equation_8(sd15, monkeypatch):
    """Two terms, each at its own timestep, in float64 from the networks' own predictions."""
    made = method(sd15, real_guidance=3.0, decoupled="hybrid", step_aware=False)
    batch, x = batch_of(made), torch.randn(2, 4, 16, 16)
    torch.manual_seed(0)
    at_levels(made, monkeypatch, matching=300, guidance=120)
    ours, _ = made.matching_gradient(x, batch, [0, 0])
    torch.manual_seed(0)
    eps, alphas = torch.randn(2, 4, 16, 16).double(), made.process.schedule.alphas_cumprod
    empty = made.encoders.prompts(["", ""])["context"]

    def denoised(network, t, context):
        a = alphas[t]
        x_t = a**0.5 * x.double() + (1 - a) ** 0.5 * eps
        with torch.no_grad():
            said = network(x_t.float(), torch.tensor([t] * 2), context).sample.double()
        return (x_t - (1 - a) ** 0.5 * said) / a**0.5

    matching = denoised(made.teacher, 300, batch["context"])
    guidance = 2.0 * (denoised(made.teacher, 120, batch["context"]) - denoised(made.teacher, 120, empty))
    fake = denoised(made.critic.network, 300, batch["context"])
    scale = (x.double() - matching - guidance).abs().mean((1, 2, 3), keepdim=True)
    wanted = (fake - matching - guidance) / scale
    assert torch.allclose(ours.double(), wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["full", "constrained", "hybrid"])
def test_a_constrained_timestep_lies_below_the_step_that_made_the_image(sd15, name):
    made = method(sd15, decoupled=name)
    count = 400
    batch = {"index": range(count), "latent_mean": torch.zeros(count, 4, 1, 1)}
    last = [number % 4 for number in range(count)]
    for stream, constrained in (("matching", name == "constrained"), ("guidance", name != "full")):
        t, eps = made.matching_noise(batch, stream, last)
        assert t.min() >= 20 and t.max() <= 980 and eps.shape == (count, 4, 1, 1)
        for step, bound in enumerate(made.timesteps):
            highest = max(level for level, of in zip(t.tolist(), last, strict=True) if of == step)
            assert highest < bound if constrained else highest > 800


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(real_guidance=1.0), "no guidance to decouple"),
        (dict(timesteps="999,20"), "the step at 20 leaves no timestep for --decoupled hybrid: they begin at 20"),
    ],
)
def test_what_cannot_be_decoupled_is_said(sd15, fields, said):
    with pytest.raises(UserError, match=said):
        method(sd15, decoupled="hybrid", **fields)


def test_a_decoupled_run_trains_and_is_another_run(sd15, tmp_path):
    given = recipe(sd15, decoupled="hybrid", steps=2, ratio=1)
    execute(given, tmp_path / "out")
    assert "decoupled" not in checkpoints.settings(recipe(sd15), 1)  # as before there was one
    with pytest.raises(UserError, match="decoupled was 'hybrid', is now None"):
        execute(recipe(sd15, steps=2, ratio=1), tmp_path / "other", tmp_path / "out-run")


# ------------------------------------------------------------------------------------------------------------- networks


def test_a_pruned_generator_with_the_full_teacher(sd15, sd15_tiny):
    made = method(sd15_tiny, teacher=str(sd15))
    assert len(made.generator.up_blocks) == 3 and len(made.teacher.up_blocks) == len(made.critic.network.up_blocks) == 4


def test_a_teacher_of_another_noise_schedule_is_refused(sd15, tmp_path):
    import shutil

    other = Path(shutil.copytree(sd15, tmp_path / "other"))
    config = json.loads((other / "scheduler/scheduler_config.json").read_text())
    (other / "scheduler/scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "v_prediction"}))
    with pytest.raises(UserError, match="different noise schedules"):
        method(sd15, teacher=str(other))


# ------------------------------------------------------------------------------------------------------------- training


def test_a_run_its_result_and_its_resume(sd15, tmp_path):
    torch.set_num_threads(1)
    execute(recipe(sd15), tmp_path / "straight")
    assert json.loads((tmp_path / "straight/sampler.json").read_text()) == {
        "name": "dmd2",
        "timesteps": [999, 749, 499, 249],
        "guidance": 0.0,
    }
    assert str(sd15) not in (tmp_path / "straight/unet/config.json").read_text()  # where it was trained
    lines = [json.loads(line) for line in (tmp_path / "straight-run/losses.jsonl").read_text().splitlines()]
    assert ["generator/loss" in line for line in lines] == [True, False, True, False]
    assert all(np.isfinite(value) for line in lines for value in line.values())

    class Dies(DMD2):
        def loss(self, phase, batch, step):
            if step == 3:
                raise RuntimeError("the power went off")
            return super().loss(phase, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accel.distill.few_step.dmd2.DMD2", Dies)
        with pytest.raises(RuntimeError, match="power"):
            execute(recipe(sd15), tmp_path / "resumed")
    execute(recipe(sd15), tmp_path / "resumed")
    ours, theirs = load_file(tmp_path / "resumed" / UNET), load_file(tmp_path / "straight" / UNET)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    first, second = (checkpoints.all_of(tmp_path / f"{name}-run")[-1] for name in ("resumed", "straight"))
    for name in ("generator", "generator_ema", "critic"):
        ours, theirs = (load_file(path / name / UNET.name) for path in (first, second))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert not (second / "critic_ema").exists() and not (second / "teacher").exists()


def test_the_result_draws_in_its_own_steps_on_a_bundle(sd15, tmp_path):
    import accel
    from accel.export.pipeline import export_pipeline

    given = recipe(sd15, teacher=str(sd15), timesteps="399", steps=2, sample_every=2, sample_prompts="the cat")
    execute(given, tmp_path / "one")
    export_pipeline(tmp_path / "one", tmp_path / "bundle", profile="batch=1,size=64")
    pipe = accel.load(tmp_path / "bundle", engine="eager")
    assert pipe.bundle.manifest.sampler["timesteps"] == [399]
    assert pipe("the cat", seed=0, output_type="np").images.shape == (1, 64, 64, 3)
    assert (tmp_path / "one-run/samples/step-000002.png").is_file()


def test_the_critic_may_learn_alone_first(sd15, tmp_path):
    execute(recipe(sd15, critic_warmup=3, ratio=2, steps=6), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out-run/losses.jsonl").read_text().splitlines()]
    assert ["generator/loss" in line for line in lines] == [False, False, False, True, False, True]


@pytest.mark.parametrize(("every", "start"), [(1, 0), (5, 0), (5, 3), (2, 7)])
def test_a_turn_counts_what_is_due(every, start):
    phase = OptimizerPhase("generator", (), every=every, start=start)
    for steps in range(20):
        assert phase.count(steps) == sum(phase.due(step) for step in range(steps))


def test_two_learning_rates_and_schedules(sd15, tmp_path):
    given = recipe(sd15, critic_learning_rate=4e-4, lr_schedule="linear", steps=4)
    execute(given, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out-run/losses.jsonl").read_text().splitlines()]
    assert [line["critic/lr"] for line in lines] == pytest.approx([4e-4, 3e-4, 2e-4, 1e-4])
    assert [line["generator/lr"] for line in lines if "generator/lr" in line] == pytest.approx([1e-4, 5e-5])


def test_fields_are_options(sd15):
    assert {field.name for field in dataclasses.fields(settings.DMD2Recipe)} >= {"ratio", "real_guidance", "few_steps"}
    assert registry.recipe("digits-dmd2").real_guidance == 1.3


# -------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    ("ranks", "bases"), [(dict(rank=2, critic_rank=2), 1), (dict(rank=2), 2), (dict(critic_rank=2), 2), ({}, 3)]
)
def test_what_is_frozen_is_shared(sd15, ranks, bases):
    made = method(sd15, **ranks)
    networks = (made.generator, made.critic.network, made.teacher)
    found = {id(shared_lora.within(network, lambda unet: unet)) for network in networks}
    assert len(found) == bases
    batch = batch_of(made)
    for phase, learns, rests in (
        (made.phases[0], made.generator, made.critic),
        (made.phases[1], made.critic, made.generator),
    ):
        made.loss(phase, batch, 0)[0].backward()
        reached = gradients(learns)
        # A of a fresh adapter has no gradient while B is zero; the others have one.
        assert all(found for name, found in reached.items() if "lora_A" not in name)
        assert not any(gradients(rests).values())
        assert not any(value.grad is not None for value in made.teacher.parameters())
        for network in (learns, rests):
            network.zero_grad(set_to_none=True)


def test_a_lora_run_gives_one_file_that_diffusers_and_we_load(sd15, tmp_path):
    torch.set_num_threads(1)
    given = recipe(sd15, rank=2, critic_rank=2, alpha=1.0, learning_rate=1e-2)
    execute(given, tmp_path / "out")
    assert json.loads((tmp_path / "out/sampler.json").read_text())["timesteps"] == [999, 749, 499, 249]
    state = load_file(tmp_path / "out" / WEIGHT_NAME)
    assert all(key.startswith("unet.") for key in state) and any(value.abs().sum() > 0 for value in state.values())
    fused = open_source(sd15).load("unet")
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    fuse(fused, "unet", [lora_file(tmp_path / "out" / WEIGHT_NAME)], unet_config=open_source(sd15).config("unet"))
    assert any(not torch.equal(before[name], value) for name, value in fused.state_dict().items())
    pipeline = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "out")
    pipeline.fuse_lora()
    sample = (torch.randn(2, 4, 16, 16), torch.tensor([5, 700]), torch.randn(2, 7, fused.config.cross_attention_dim))
    with torch.no_grad():
        assert torch.allclose(pipeline.unet(*sample).sample, fused(*sample).sample, atol=1e-4)


def test_kohyas_names_hold_the_same_updates(sd15, tmp_path):
    torch.set_num_threads(1)
    unets = []
    for form in ("diffusers", "kohya"):
        execute(recipe(sd15, rank=2, alpha=1.0, lora_format=form, steps=2, learning_rate=1e-2), tmp_path / form)
        unet = open_source(sd15).load("unet")
        fuse(unet, "unet", [lora_file(tmp_path / form / WEIGHT_NAME)], unet_config=open_source(sd15).config("unet"))
        unets.append(unet)
    state = load_file(tmp_path / "kohya" / WEIGHT_NAME)
    assert {key.rsplit(".", 2)[-2] for key in state if key.endswith(".weight")} == {"lora_down", "lora_up"}
    assert all(key.startswith("lora_unet_") for key in state)
    ours, theirs = (unet.state_dict() for unet in unets)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_gradient_checkpointing_gives_the_same_run(sd15, tmp_path):
    torch.set_num_threads(1)
    states = []
    for name, fields in (("plain", {}), ("again", dict(gradient_checkpointing=True))):
        execute(recipe(sd15, rank=2, critic_rank=2, steps=2, learning_rate=1e-2, **fields), tmp_path / name)
        states.append(load_file(tmp_path / name / WEIGHT_NAME))
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-4), name


def test_gradient_checkpointing_of_whole_networks(sd15, tmp_path):
    torch.set_num_threads(1)
    file, states = "unet/diffusion_pytorch_model.safetensors", []
    for name, fields in (("plain", {}), ("again", dict(gradient_checkpointing=True))):
        execute(recipe(sd15, steps=2, **fields), tmp_path / name)
        states.append(load_file(tmp_path / name / file))
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=3e-4), name


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(rank=-1), "invalid rank -1"),
        (dict(rank=2, targets="nothing"), "no layer"),
        (dict(rank=2, offload_teacher=True), "shares its weights"),
    ],
)
def test_what_cannot_be_is_said(sd15, fields, said):
    with pytest.raises(UserError, match=said):
        method(sd15, **fields)


# ---------------------------------------------------------------------------------------------------------- the teacher


def test_an_offloaded_teacher_is_uploaded_and_never_brought_back(sd15, fakes, monkeypatch):
    from accel.engines.offloading.visiting import Visiting

    cuda = fakes("cuda").Cuda
    for count in ("uploads", "uploaded", "resident", "most"):
        monkeypatch.setattr(cuda, count, 0)
    near, away = method(sd15), method(sd15)
    away._away = Visiting(away.teacher, cuda(), "model")
    kept = [parameter.data_ptr() for parameter in away.teacher.parameters()]
    batch = batch_of(near)
    for turn in (1, 2):
        losses = [made.loss(made.phases[0], batch, 0)[0] for made in (near, away)]
        assert torch.equal(*losses)
        assert cuda.uploads == turn * len(kept) and cuda.resident == 0
    assert [parameter.data_ptr() for parameter in away.teacher.parameters()] == kept  # the weights that it has had


def test_the_teacher_is_compiled_with_the_others(sd15, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    made = method(sd15, compile=True)
    assert compiled == [made.teacher]  # the loop compiles what learns


def test_lists_of_a_turn_are_uploaded_once(sd15, monkeypatch):
    made = method(sd15, batch=4)
    batch = batch_of(made, 4)
    for phase in made.phases:
        made.loss(phase, batch, 0)
    monkeypatch.setattr(torch, "tensor", lambda *given, **options: pytest.fail(f"a list went up again: {given}"))
    for phase in made.phases:
        shape = batch["latent_mean"].shape[1:]
        drawn = {draw.key: draw.of(0, batch["index"], shape) for draw in phase.draws if not draw.high}
        drawn |= {draw.key: torch.ones(4, dtype=torch.int64) for draw in phase.draws if draw.high}
        made.loss(phase, batch | drawn, 0)
