"""Training with int8 rounding: attached by one option, resumed exactly, averaged, fused with LoRA, and gone after."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accel.distill import recipes, settings
from accel.distill.data import batches
from accel.distill.data.encoders import Encoders
from accel.distill.few_step.dmd2 import DMD2
from accel.distill.methods import qat
from accel.distill.methods.kd import Denoising
from accel.distill.run import execute
from accel.distill.training import checkpoints
from accel.errors import UserError
from accel.int8 import fake_quant, trained_scales
from accel.models.source import open_source

UNET = Path("unet/diffusion_pytorch_model.safetensors")
CPU = torch.device("cpu")


def common(source: Path, images: Path, **fields) -> dict:
    return (
        dict(
            model=str(source),
            data=str(images),
            resolution=32,
            cache="none",
            steps=2,
            batch=2,
            learning_rate=1e-3,
            ema=0.9,
            checkpoint_every=1,
            sample_every=0,
            sample_steps=1,
            sample_prompts="the cat",
            sample_guidance=3.0,
            log="none",
            mixed_precision="no",
            seed=7,
            qat="attention",
        )
        | fields
    )


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tuned(smallest, six_images, tmp_path_factory) -> Path:
    """The smallest pipeline fine-tuned for int8, without interruption."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    assert not execute(recipes.changed(settings.FinetuneRecipe(), **common(smallest, six_images)), out).stopped
    return out


@pytest.fixture(scope="module")
def straight(sd15, six_images, tmp_path_factory) -> Path:
    """A student trained by knowledge distillation for int8, without interruption."""
    out = tmp_path_factory.mktemp("qat") / "out"
    assert not execute(recipes.changed(recipes.tiny(), **common(sd15, six_images)), out).stopped
    return out


def test_the_result_is_a_plain_pipeline_with_its_ranges_beside_it(straight):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(straight)
    assert set(load_file(straight / UNET)) == set(pipeline.unet.state_dict())
    trained = trained_scales.find(straight)
    names = fake_quant.attach(pipeline.unet, trained.config)
    assert set(names) == {name.rpartition(".")[0] for name in trained.scales if name.endswith("_scale")}
    assert any(name.endswith("attn1.mix.left_scale") for name in trained.scales)
    fake_quant.set_scales(pipeline.unet, trained.scales)
    assert trained.config.level == "attention"


def test_ranges_are_learned_averaged_and_in_every_checkpoint(straight):
    folders = checkpoints.all_of(straight.with_name("out-run"))
    first, last = (load_file(folder / "unet" / checkpoints.WEIGHTS) for folder in (folders[0], folders[-1]))
    ranges = [name for name in first if name.endswith("_range.log_scale")]
    moved = [name for name in ranges if not torch.equal(first[name], last[name])]
    assert len(ranges) > 100 and len(moved) > 0.9 * len(ranges)
    averaged = load_file(folders[-1] / "unet_ema" / checkpoints.WEIGHTS)
    final = trained_scales.find(straight).scales
    for name in ranges:
        kept = final[name.replace("_range.log_scale", "_scale")]
        assert torch.allclose(averaged[name].exp(), kept, rtol=1e-5)


def test_a_resumed_run_is_the_same_run(tuned, smallest, six_images, tmp_path):
    recipe = recipes.changed(settings.FinetuneRecipe(), **common(smallest, six_images))
    execute(recipes.changed(recipe, steps=1), tmp_path / "half", tmp_path / "run")
    execute(recipe, tmp_path / "out", tmp_path / "run")
    for file in (UNET, Path(trained_scales.FILE)):
        ours, theirs = load_file(tmp_path / "out" / file), load_file(tuned / file)
        assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UserError, match="qat was 'attention', is now 'conv'"):
        execute(recipes.changed(recipe, qat="conv"), tmp_path / "other", tmp_path / "run")


def test_observed_ranges_are_no_parameters_but_are_kept(smallest, six_images, tmp_path):
    recipe = recipes.changed(
        settings.FinetuneRecipe(), **common(smallest, six_images, steps=1, qat="conv", qat_ranges="observed")
    )
    method = Denoising(recipe, Encoders(open_source(smallest)))
    assert qat.attach(method, recipe)
    assert not any("log_scale" in name for name, _ in method.unet.named_parameters())
    assert any("log_scale" in name for name, _ in method.unet.named_buffers())
    execute(recipe, tmp_path / "out")
    (folder,) = checkpoints.all_of(tmp_path / "out-run")
    stored = load_file(folder / "unet" / checkpoints.WEIGHTS)
    assert any(name.endswith("_range.log_scale") for name in stored)
    assert trained_scales.find(tmp_path / "out").config.level == "conv"


def test_only_the_generator_of_dmd2_rounds(sd15, six_images):
    recipe = recipes.changed(settings.DMD2Recipe(), **common(sd15, six_images, few_steps=2))
    method = DMD2(recipe, Encoders(open_source(sd15)))
    names = qat.attach(method, recipe)
    assert names and qat.network_of(method).model is method.generator
    for other in (method.critic, method.teacher):
        assert not any(isinstance(part, fake_quant.FakeQuantized) for part in other.modules())
    method.place(CPU, torch.float32)
    before = torch.get_rng_state()
    qat.calibrate(method, recipe, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        quantizer.mode == "quantize" and quantizer.scale != 1 for _, quantizer in fake_quant.ranges(method.generator)
    )


def test_a_network_that_several_adapters_share_cannot_round(sd15, six_images):
    pytest.importorskip("peft")
    recipe = recipes.changed(settings.DMD2Recipe(), **common(sd15, six_images, few_steps=2, rank=2, critic_rank=2))
    with pytest.raises(UserError, match="no UNet of its own.*\n.*train all weights"):
        qat.attach(DMD2(recipe, Encoders(open_source(sd15))), recipe)


def test_what_cannot_round_is_said_before_the_data_are_read(sd15, six_images, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(batches, "batches_of", lambda *_: pytest.fail("the cache may take hours"))
    fields = common(sd15, six_images, few_steps=2, rank=2, critic_rank=2)
    with pytest.raises(UserError, match="no UNet of its own"):
        execute(recipes.changed(settings.DMD2Recipe(), **fields), tmp_path / "out")


@pytest.mark.parametrize("attention", ["flash-attn", "xformers"])
def test_attention_that_is_one_kernel_cannot_round(sd15, six_images, attention):
    fields = common(sd15, six_images, attention=attention)
    with pytest.raises(UserError, match=f"--attention {attention} leaves to one kernel\n.*--qat all"):
        settings.check(recipes.changed(settings.FinetuneRecipe(), **fields))
    settings.check(recipes.changed(settings.FinetuneRecipe(), **fields | {"qat": "all"}))


def test_training_without_the_option_is_untouched(smallest, six_images):
    recipe = recipes.changed(settings.FinetuneRecipe(), **common(smallest, six_images, qat=""))
    method = Denoising(recipe, Encoders(open_source(smallest)))
    assert qat.attach(method, recipe) == [] and qat.detach(method, recipe) is None
    qat.calibrate(method, recipe, CPU)
    assert not any(isinstance(part, fake_quant.FakeQuantized) for part in method.unet.modules())
    assert "qat" not in checkpoints.settings(recipe, 1)
    with pytest.raises(UserError, match="invalid qat: 'convs'"):
        settings.check(recipes.changed(recipe, qat="convs"))


def test_a_lora_rounds_as_the_weights_it_will_be_fused_into(smallest, six_images, tmp_path):
    pytest.importorskip("peft")
    from accel.distill.methods.lora import LowRank

    # All kinds of layers that can have an update: attention, feed-forward, convolutions.
    targets = "to_q,to_k,ff.net.2,conv1"
    fields = common(smallest, six_images, rank=2, alpha=3.0, targets=targets, steps=2, ema=0.0)
    recipe = recipes.changed(settings.LoraRecipe(), **fields)
    method = LowRank(recipe, Encoders(open_source(smallest)))
    names = qat.attach(method, recipe)
    assert not any("lora_" in name or "base_layer" in name for name in names)
    method.place(CPU, torch.float32)
    qat.calibrate(method, recipe, CPU)
    generator = torch.Generator().manual_seed(0)
    model = method.networks["unet"].model.eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator).mul_(0.05)
    feeds = (torch.randn(1, 4, 8, 8, generator=generator), torch.tensor(99), torch.randn(1, 7, 32, generator=generator))
    trained_parameters = [name for name, value in model.named_parameters() if value.requires_grad]
    assert all("lora_" in name or "log_scale" in name for name in trained_parameters)
    model(*feeds)[0].square().mean().backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)

    rounding = model(*feeds)[0]
    scales = qat.detach(method, recipe).scales
    method.save(tmp_path)
    plain = open_source(smallest, [tmp_path]).load("unet")
    fake_quant.attach(plain, qat.recipe_of(recipe), names=names)
    fake_quant.set_scales(plain, scales)
    fake_quant.set_mode(plain, "quantize")
    # The fused weight is the sum to the last bit or two, and a bit may round the other way.
    assert (plain(*feeds)[0] - rounding).norm() < 0.1 * rounding.norm()
    layer = next(name for name in names if name.endswith("attn1.to_q"))
    assert torch.allclose(plain.get_submodule(layer).fake_weight(), _fused_weight(method, recipe, layer), atol=1e-6)


def _fused_weight(method, recipe, layer: str) -> torch.Tensor:
    qat.attach(method, recipe)
    model = qat.network_of(method).model
    fake_quant.set_mode(model, "quantize")
    return model.get_submodule(layer).fake_weight()


def test_a_trained_student_is_exported_with_its_own_ranges(tuned, tmp_path, monkeypatch):
    from accel.export.int8 import quantize, speed
    from accel.export.int8.calibration import Calibration
    from accel.export.int8.settings import Int8Settings
    from accel.export.pipeline import export_pipeline
    from accel.int8.config import Int8Config

    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(speed, "computing_in", lambda form: ("onnxruntime",))
    monkeypatch.setattr(quantize, "observe", lambda *_: pytest.fail("nothing is left to calibrate"))
    sampler = {"name": "dmd2", "timesteps": [999], "guidance": 0.0}
    options = Int8Settings(images=1, evaluation_images=1, components=("unet",))
    bundle = export_pipeline(
        tuned,
        tmp_path / "out",
        profile="batch=1,size=32",
        precision="int8",
        sampler=sampler,
        components=("text_encoder", "unet", "vae_decoder"),
        int8=options,
    )
    record = bundle.component("unet")
    assert record.int8["calibration"]["ranges"] == "trained"
    stored, trained = load_file(tmp_path / "out" / "unet" / "model.safetensors"), trained_scales.find(tuned)
    for name, value in trained.scales.items():
        assert torch.allclose(stored[name], value, rtol=1e-6), name
    settings = Int8Settings(trained.config, calibration=Calibration(("the cat",)), trained=trained.scales)
    assert quantize.calibrate(None, {}, settings) == {}, "a trained UNet may be left out"
    with pytest.raises(UserError, match="was trained with its own int8 config"):
        export_pipeline(tuned, tmp_path / "no", precision="int8", int8=Int8Settings(config=Int8Config()))


def test_a_damaged_range_file_is_refused(tuned, tmp_path):
    trained = trained_scales.find(tuned)
    broken = dict(trained.scales)
    name = next(iter(broken))
    broken[name] = torch.tensor(0.0)
    trained_scales.write(tmp_path, trained_scales.Trained(trained.config, broken))
    with pytest.raises(UserError, match=f"invalid scale {name}: 0"):
        trained_scales.find(tmp_path)
    (tmp_path / trained_scales.FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        trained_scales.find(tmp_path)
    assert trained_scales.find(tmp_path / "elsewhere") is None


def test_ranges_survive_a_deep_copy(smallest, six_images):
    recipe = recipes.changed(settings.FinetuneRecipe(), **common(smallest, six_images))
    method = Denoising(recipe, Encoders(open_source(smallest)))
    qat.attach(method, recipe)
    twin = copy.deepcopy(method.unet)
    assert [name for name, _ in fake_quant.ranges(twin)] == [name for name, _ in fake_quant.ranges(method.unet)]
