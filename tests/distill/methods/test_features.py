"""Feature pairs have equal shapes, and are the published ones."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from accel.distill.methods.features import SETS, Tapped, pairs
from accel.distill.methods.students import make_student
from accel.errors import UserError
from accel.models.topology import narrowed


@pytest.fixture(scope="module")
def teachers():
    torch.manual_seed(0)
    sd15 = narrowed(
        "sd15", (8, 16, 24, 24), sample_size=16, cross_attention_dim=16, norm_num_groups=4, attention_head_dim=4
    )
    sdxl = narrowed(
        "sdxl",
        (8, 16, 24),
        sample_size=8,
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=(2, 4, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    return {"sd15": UNet2DConditionModel(**sd15), "sdxl": UNet2DConditionModel(**sdxl)}


def call(model: Tapped):
    torch.manual_seed(1)
    xl = model.unet.config.addition_embed_type == "text_time"
    added = {"text_embeds": torch.randn(1, 16), "time_ids": torch.rand(1, 6)} if xl else None
    return model(torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 5, 16), added)


COUNTS = {
    ("base", "nota"): 8,
    ("base", "segmind"): 9,
    ("small", "nota"): 8,
    ("tiny", "nota"): 6,
    ("tiny", "segmind"): 6,
    ("ssd-1b", "layers"): 26,
    ("vega", "layers"): 26,
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["base", "small", "tiny", "ssd-1b", "vega"])
def test_pairs_have_equal_shapes_in_the_published_number(teachers, name, kind):
    teacher = teachers["sdxl" if kind in ("ssd-1b", "vega") else "sd15"]
    student = make_student(teacher, kind)
    found = pairs(name, kind, student)
    assert len(found) == COUNTS.get((kind, name), len(found))
    _, theirs = call(Tapped(teacher, [theirs for theirs, _ in found]))
    _, ours = call(Tapped(student, [ours for _, ours in found]))
    assert [a.shape for a in ours] == [b.shape for b in theirs]


def test_layer_pairs_are_resnets_and_transformers_and_the_mid_block(teachers):
    student = make_student(teachers["sdxl"], "ssd-1b")
    modules = dict(student.named_modules())
    kinds = [type(modules[ours]) for _, ours in pairs("layers", "ssd-1b", student)]
    assert kinds.count(ResnetBlock2D) == 15 and kinds.count(Transformer2DModel) == 10 and len(kinds) == 26


def test_layer_pairs_of_tiny_start_as_what_they_are_pulled_to(teachers):
    """Each layer of the student is paired with the layer of the teacher whose weights it was given."""
    student = make_student(teachers["sd15"], "tiny")
    theirs, ours = dict(teachers["sd15"].named_modules()), dict(student.named_modules())
    for teacher_name, name in pairs("layers", "tiny", student):
        for a, b in zip(ours[name].parameters(), theirs[teacher_name].parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_published_pairs_of_tiny(teachers):
    student = make_student(teachers["sd15"], "tiny")
    nota = pairs("nota", "tiny", student)
    assert nota[2] == ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out")
    assert pairs("segmind", "tiny", student)[2] == ("up_blocks.0", "down_blocks.2")
    assert nota[3:] == [(f"up_blocks.{i + 1}", f"up_blocks.{i}") for i in range(3)]


def test_tapping_changes_nothing_and_a_down_block_gives_its_downsampled_state(teachers):
    unet = teachers["sd15"]
    out, caught = call(Tapped(unet, ["down_blocks.0", "mid_block"]))
    plain, none = call(Tapped(unet))
    assert torch.equal(out, plain) and none == []
    assert caught[0].shape[-1] == 8 and caught[1].shape[-1] == 2


def test_gradients_reach_the_student_through_its_features(teachers):
    student = Tapped(make_student(teachers["sd15"], "tiny"), ["down_blocks.1"])
    call(student)[1][0].sum().backward()
    assert student.unet.conv_in.weight.grad is not None
    assert student.unet.conv_out.weight.grad is None


def test_unknown_names_are_errors_for_people(teachers):
    with pytest.raises(UserError, match="unknown feature set"):
        pairs("all", "tiny", teachers["sd15"])
    with pytest.raises(UserError, match="no module"):
        Tapped(teachers["sd15"], ["down_blocks.9"])


def test_activations_are_not_held_after_the_call_or_when_a_pipeline_calls_the_unet(teachers):
    model = Tapped(teachers["sd15"], ["mid_block"])
    model.unet(torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 5, 16))
    assert model._caught is None
    assert call(model)[1][0].shape == (1, 24, 2, 2) and model._caught is None
