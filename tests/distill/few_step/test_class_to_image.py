"""DMD2 of EDM models: images of a class, in pixels; the same method with another forward process and network."""

import json

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from accel.distill import recipes, settings
from accel.distill.data.encoders import encoded
from accel.distill.data.examples import Examples, loader
from accel.distill.edm import preconditioning
from accel.distill.edm.source import ClassEncoders, is_edm, open_edm, save_edm
from accel.distill.few_step.class_to_image import Karras
from accel.distill.few_step.dmd2 import DMD2
from accel.distill.run import execute
from accel.distill.sources.open_data import open_data
from accel.distill.training import checkpoints
from accel.errors import UserError

CONFIG = dict(size=16, channels=1, width=32, multipliers=(1, 2), layers=1, attention=(8,), head_width=32, classes=10)
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edm")
    torch.manual_seed(0)
    unet = UNet2DModel(**preconditioning.unet_config(**CONFIG))
    for parameter in unet.parameters():  # an untrained network says 0 in many places: nothing would reach the weights
        torch.nn.init.normal_(parameter, std=0.05)
    save_edm(folder, preconditioning.Preconditioned(unet))
    return folder


def recipe(model, **fields):
    common = dict(
        model=str(model),
        data="digits",
        resolution=16,
        random_flip=False,
        cache="none",
        steps=4,
        batch=2,
        ratio=2,
        few_steps=1,
        real_guidance=1.0,
        learning_rate=1e-4,
        ema=0.9,
        checkpoint_every=2,
        sample_every=0,
        log="none",
    )
    return recipes.changed(settings.DMD2Recipe(), **common | fields)


def method(model, **fields):
    made = DMD2(recipe(model, **fields), ClassEncoders(open_edm(model)))
    made.place(torch.device("cpu"), torch.float32)
    return made


def batch_of(made, size=2):
    examples = Examples(open_data("digits", classes=True), seed=0, resolution=16, random_flip=False)
    return encoded(next(loader(examples, batch=size)), made.encoders)


def test_a_batch_is_pixels_and_class_numbers(model):
    batch = batch_of(method(model), 5)
    assert batch["latent_mean"].shape == (5, 1, 16, 16) and batch["context"].dtype == torch.int64
    assert batch["context"].tolist() == [int(caption) for caption in batch["caption"]]


def test_one_step_is_the_samplers(model):
    from accel.distill.edm.sampler import one_step

    made = method(model)
    batch = batch_of(made)
    with torch.no_grad():
        ours = made.draw(batch, [0, 0])
        wanted = one_step(made.generator, made.normal(batch, "noise"), batch["context"])
    assert torch.allclose(ours, wanted, atol=1e-5)


def test_several_steps_add_noise_of_each_level(model):
    made = method(model, few_steps=2)
    batch = batch_of(made)
    seen = []
    made.generator.register_forward_pre_hook(lambda module, given: seen.append(given))
    made.draw(batch, [1, 1])
    (_, first, _), (x_t, sigma, _) = seen
    assert first.tolist() == [80.0, 80.0]
    assert sigma.tolist() == pytest.approx([float(made.process.sigmas[499])] * 2)
    assert x_t.std().item() == pytest.approx(float(sigma[0]), rel=0.2)


def test_the_fake_scores_loss_is_edms():
    process = Karras(torch.from_numpy(preconditioning.edm_sigmas()))
    torch.manual_seed(0)
    x0, said, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999])
    sigma = process.sigma(t)
    wanted = ((sigma**-2 + 0.5**-2).view(-1, 1, 1, 1) * (said - x0).double() ** 2).mean()
    assert process.denoising_loss(said, x0, x0, t).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert process.x0(said, x0, t).dtype == torch.float64


def test_each_turn_reaches_its_own_network_and_no_other(model):
    made = method(model)
    batch = batch_of(made)
    for phase, learns, rests in (
        (made.phases[0], made.generator, (made.critic, made.teacher)),
        (made.phases[1], made.critic, (made.generator, made.teacher)),
    ):
        total, terms = made.loss(phase, batch, 0)
        assert all(torch.isfinite(term) for term in terms.values())
        total.backward()
        # A class's row of the table learns when an image of it is in the batch.
        assert all(p.grad is not None and bool((p.grad != 0).any()) for p in learns.parameters())
        assert all(p.grad is None for network in rests for p in network.parameters())
        learns.zero_grad(set_to_none=True)


def test_a_run_its_result_and_its_resume(model, tmp_path):
    torch.set_num_threads(1)
    given = recipe(model, sample_every=4)
    execute(given, tmp_path / "straight")
    assert is_edm(tmp_path / "straight") and (tmp_path / "straight-run/samples/step-000004.png").is_file()
    sampler = json.loads((tmp_path / "straight/sampler.json").read_text())
    assert sampler["timesteps"] == [999] and sampler["sigmas"] == [80.0]
    execute(recipes.changed(given, steps=2), tmp_path / "half")
    (tmp_path / "half-run").rename(tmp_path / "again-run")
    execute(given, tmp_path / "again")
    ours, theirs = load_file(tmp_path / "again" / UNET), load_file(tmp_path / "straight" / UNET)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # The result is a model like the one that it came from.
    assert UNet2DModel.from_pretrained(tmp_path / "straight/unet").config.num_class_embeds == 10
    assert len(checkpoints.all_of(tmp_path / "again-run")) == 2


def test_folders_are_classes_in_the_order_of_their_names(tmp_path, six_images):
    for number, name in enumerate(("n02", "n01", "n02", "n03", "n01", "n03")):
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name / f"{number}.png").write_bytes((six_images / f"{number}.png").read_bytes())
    source = open_data(tmp_path, classes=True)
    assert [source[row].captions for row in range(6)] == [("0",), ("0",), ("1",), ("1",), ("2",), ("2",)]
    with pytest.raises(UserError, match="no captions"):
        open_data(tmp_path)


def test_a_column_of_numbers_is_one_of_classes(tmp_path, six_images):
    lines = [json.dumps({"file_name": f"{number}.png", "label": number % 3}) for number in range(6)]
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes((six_images / f"{number}.png").read_bytes())
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = open_data(tmp_path, caption_column="label", classes=True)
    assert [source.captions(row) for row in range(3)] == [("0",), ("1",), ("2",)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(real_guidance=2.0), "no unconditional"),
        (dict(teacher="nowhere"), "not a folder of an EDM model"),
        (dict(timesteps="1200"), "do not fall"),
    ],
)
def test_what_cannot_be_is_said(model, fields, said):
    with pytest.raises(UserError, match=said):
        method(model, **fields)


def test_words_are_no_classes(model, six_images, tmp_path):
    with pytest.raises(UserError, match="not a class number"):
        execute(recipe(model, data=str(six_images)), tmp_path / "out")


def test_other_methods_do_not_train_it(model, tmp_path):
    with pytest.raises(UserError, match="DMD2 alone"):
        execute(recipes.changed(settings.FinetuneRecipe(), model=str(model), data="digits"), tmp_path / "out")
