"""Students are the teacher where nothing was removed, and what was saved is what comes back."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from accel.distill.methods.students import key_map, make_student, student_config, surviving
from accel.errors import UserError
from accel.models.topology import TOPOLOGIES, identify, narrowed


def unet(name: str, **overrides) -> UNet2DConditionModel:
    """A narrow teacher with random weights."""
    torch.manual_seed(0)
    if name == "sdxl":
        config = narrowed(
            name,
            (8, 16, 16),
            sample_size=8,
            cross_attention_dim=16,
            norm_num_groups=4,
            attention_head_dim=(2, 4, 4),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        )
    else:
        heads = (2, 4, 4, 4) if name.startswith("sd2") else 4
        config = narrowed(
            name, (8, 16, 16, 16), sample_size=16, cross_attention_dim=16, norm_num_groups=4, attention_head_dim=heads
        )
    return UNet2DConditionModel(**config | overrides).eval()


def call(model: UNet2DConditionModel, size: int = 16) -> torch.Tensor:
    torch.manual_seed(1)
    added = None
    if model.config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.rand(2, 6)}
    inputs = torch.randn(2, model.config.in_channels, size, size)
    context = torch.randn(2, 5, model.config.cross_attention_dim)
    with torch.no_grad():
        return model(inputs, torch.tensor([3, 700]), context, added_cond_kwargs=added).sample


PUBLISHED = [(name, entry) for name, entry in TOPOLOGIES.items() if entry.teacher]


@pytest.mark.parametrize(("name", "entry"), PUBLISHED, ids=[name for name, _ in PUBLISHED])
def test_real_sizes_are_the_published_ones(name, entry):
    kind = name if name in ("ssd-1b", "vega") else name.split("-")[1]
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**TOPOLOGIES[entry.teacher].config)
        student = UNet2DConditionModel.from_config(student_config(teacher.config, kind))
    assert sum(p.numel() for p in student.parameters()) == entry.parameters
    assert identify(student.config).name == name
    ours, theirs = student.state_dict(), teacher.state_dict()
    source = key_map(ours, theirs, kind)
    assert all(ours[name].shape == theirs[other].shape for name, other in source.items())
    assert len(set(source.values())) == len(source)  # nothing is copied twice
    assert student.num_upsamplers == len(student.up_blocks) - 1


CASES = [
    *[(name, kind, {}) for name in ("sd15", "sd2", "sd21") for kind in ("base", "small", "tiny")],
    ("sd15", "tiny", dict(in_channels=9)),
    ("sd2", "base", dict(in_channels=9)),
    ("sdxl", "ssd-1b", {}),
    ("sdxl", "vega", {}),
    ("sdxl", "ssd-1b", dict(in_channels=9)),
]


@pytest.mark.parametrize(("name", "kind", "overrides"), CASES)
def test_saved_and_reloaded_bit_for_bit(name, kind, overrides, tmp_path):
    teacher = unet(name, **overrides)
    student = make_student(teacher, kind)
    assert student.config.in_channels == overrides.get("in_channels", 4)
    assert student.config.sample_size == teacher.config.sample_size
    student.save_pretrained(tmp_path)
    loaded, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(call(loaded), call(student))
    assert "_name_or_path" not in json.loads((tmp_path / "config.json").read_text())


def neutral(teacher: UNet2DConditionModel, names: list[str]) -> None:
    """Make residual layers add nothing: their last projection becomes zero."""
    modules = dict(teacher.named_modules())
    for name in names:
        layer = modules[name]
        last = layer.conv2 if hasattr(layer, "conv2") else layer.proj_out
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)


def test_base_is_exact_when_what_was_removed_did_nothing_on_the_way_down():
    """The student's blocks compute what the teacher's do: compare the activations before anything is removed."""
    teacher = unet("sd15")
    neutral(teacher, [f"down_blocks.{i}.{layer}.1" for i in range(3) for layer in ("resnets", "attentions")])
    neutral(teacher, ["down_blocks.3.resnets.1"])
    student = make_student(teacher, "base")
    caught = {}
    for label, model in (("teacher", teacher), ("student", student)):
        for i, block in enumerate(model.down_blocks):
            block.register_forward_hook(lambda m, a, out, key=(label, i): caught.__setitem__(key, out[0]))
        model.mid_block.register_forward_hook(lambda m, a, out, key=(label, "mid"): caught.__setitem__(key, out))
        call(model)
    for place in (0, 1, 2, 3, "mid"):
        assert torch.equal(caught["teacher", place], caught["student", place])


def test_depth_pruned_is_exact_when_the_layers_that_went_did_nothing():
    """SSD-1B keeps every resnet outside the mid block, so with neutral layers the whole down path is the teacher's."""
    teacher = unet("sdxl")
    for name, module in teacher.named_modules():
        if ".transformer_blocks." in name and name.count(".") == 5:
            prefix, index = name.rsplit(".", 1)
            if prefix.startswith("down_blocks.2") and int(index) >= 4:
                for last in (module.attn1.to_out[0], module.attn2.to_out[0], module.ff.net[2]):
                    torch.nn.init.zeros_(last.weight)
                    torch.nn.init.zeros_(last.bias)
    student = make_student(teacher, "ssd-1b")
    caught = {}
    for label, model in (("teacher", teacher), ("student", student)):
        for i, block in enumerate(model.down_blocks):
            block.register_forward_hook(lambda m, a, out, key=(label, i): caught.__setitem__(key, out[0]))
        call(model, 8)
    for place in range(3):
        assert torch.equal(caught["teacher", place], caught["student", place])


@pytest.mark.parametrize("kind", ["base", "tiny"])
def test_the_last_up_layer_survives_not_the_middle_one(kind):
    teacher = unet("sd15")
    student = make_student(teacher, kind)
    shift = 1 if kind == "tiny" else 0
    for block in range(len(student.up_blocks)):
        ours = student.up_blocks[block].resnets[1].conv1.weight
        assert torch.equal(ours, teacher.up_blocks[block + shift].resnets[2].conv1.weight)
        assert not torch.equal(ours, teacher.up_blocks[block + shift].resnets[1].conv1.weight)


def test_the_teacher_is_only_read():
    teacher = unet("sd15").requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = make_student(teacher, "tiny")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_half_precision_teacher_gives_a_float32_student():
    student = make_student(unet("sd15").half(), "tiny")
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_random_weights_depend_on_the_seed_alone():
    teacher = unet("sd15")
    torch.manual_seed(3)
    first = make_student(teacher, "tiny", init="random", seed=5)
    state = torch.get_rng_state()
    second = make_student(teacher, "tiny", init="random", seed=5)
    assert torch.equal(state, torch.get_rng_state())
    other = make_student(teacher, "tiny", init="random", seed=6)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize(
    ("teacher", "student", "rule", "kept"),
    [
        (10, 4, "first", (0, 1, 2, 3)),
        (10, 4, "spread", (0, 3, 6, 9)),
        (2, 1, "first", (0,)),
        (2, 1, "spread", (0,)),
        (10, 4, "10:4=0,1,2,6", (0, 1, 2, 6)),
        (10, 4, "2:1=1", (0, 1, 2, 3)),
        (10, 4, "2:1=1; 10:4=1,2,3,9", (1, 2, 3, 9)),
        (10, 10, "spread", tuple(range(10))),
    ],
)
def test_which_layers_survive(teacher, student, rule, kept):
    assert surviving(teacher, student, rule) == kept


def test_the_layers_that_were_named_are_the_ones_that_are_copied():
    teacher = unet("sdxl")
    student = make_student(teacher, "ssd-1b", layers="10:4=1,3,5,9")
    theirs = teacher.down_blocks[2].attentions[0].transformer_blocks
    for ours, index in zip(student.down_blocks[2].attentions[0].transformer_blocks, (1, 3, 5, 9), strict=True):
        assert torch.equal(ours.ff.net[2].weight, theirs[index].ff.net[2].weight)
    # Where all ten stay, all ten are the teacher's, in order.
    last = teacher.up_blocks[0].attentions[2].transformer_blocks
    for ours, other in zip(student.up_blocks[0].attentions[2].transformer_blocks, last, strict=True):
        assert torch.equal(ours.ff.net[2].weight, other.ff.net[2].weight)


@pytest.mark.parametrize("rule", ["last", "10:4=0,1,2", "10:4=0,1,2,10", "10:4=3,2,1,0", "10:4=1,1,2,3", "10:4"])
def test_a_layer_map_that_does_not_fit_is_an_error_for_people(rule):
    with pytest.raises(UserError, match="10:4=|10,4|layers"):
        surviving(10, 4, rule)


@pytest.mark.parametrize(
    ("name", "kind", "overrides", "words"),
    [
        ("sdxl", "tiny", {}, "3 stages"),
        ("sd15", "vega", {}, "made of SDXL"),
        ("sd15", "huge", {}, "unknown student"),
        ("sd15", "tiny", dict(layers_per_block=1), "layers_per_block 1"),
        ("sdxl", "ssd-1b", dict(transformer_layers_per_block=(1, 2, 3)), "the teacher 3"),
    ],
)
def test_a_teacher_that_does_not_fit_is_an_error_for_people(name, kind, overrides, words):
    with pytest.raises(UserError, match=words):
        make_student(unet(name, **overrides), kind)
