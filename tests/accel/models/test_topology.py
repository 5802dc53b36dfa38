import json
from collections import Counter

import pytest

from accel.errors import UserError
from accel.models.topology import ALIASES, TOPOLOGIES, identify, narrowed, topology

# What Stable Diffusion 1.5's own unet/config.json says: written by an early diffusers, without the later fields.
EARLY_KEYS = (
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "in_channels",
    "layers_per_block",
    "out_channels",
    "sample_size",
    "up_block_types",
)


def parameters(config) -> int:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return sum(p.numel() for p in UNet2DConditionModel(**config).parameters())


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_unet_has_exactly_the_stated_parameters(name):
    assert parameters(TOPOLOGIES[name].config) == TOPOLOGIES[name].parameters


def test_every_alias_means_one_topology_and_is_nobodys_name():
    counts = Counter(alias for entry in TOPOLOGIES.values() for alias in entry.aliases)
    assert [alias for alias, count in counts.items() if count > 1] == []
    assert set(ALIASES) & set(TOPOLOGIES) == set()
    for alias, name in ALIASES.items():
        assert topology(alias) is TOPOLOGIES[name]


@pytest.mark.parametrize("name", [*TOPOLOGIES, *ALIASES])
def test_names_are_read_in_any_case_and_with_underscores(name):
    assert topology(name.upper().replace("-", "_")) is topology(name)


def test_segminds_small_is_notas_base_and_notas_small_is_smaller():
    assert topology("segmind-sd-small") is topology("bk-sdm-base")
    assert topology("bk-sdm-small").parameters < topology("bk-sdm-base").parameters
    assert topology("bk-sdm-small").config["mid_block_type"] is None


def test_students_are_smaller_than_their_teachers_and_of_the_same_family():
    for entry in TOPOLOGIES.values():
        if entry.teacher:
            teacher = TOPOLOGIES[entry.teacher]
            assert teacher.teacher is None
            assert entry.parameters < teacher.parameters
            assert entry.family == teacher.family


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError) as caught:
        topology("sd-smal")
    assert "sd-smal" in caught.value.message
    for name in (*TOPOLOGIES, *ALIASES):
        assert name in caught.value.fix


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_config_is_identified_also_after_json_has_made_lists_of_its_tuples(name):
    config = TOPOLOGIES[name].config
    assert identify(config).name == name
    assert identify(json.loads(json.dumps(config))).name == name


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_config_is_identified_after_diffusers_has_filled_in_its_defaults(name, tmp_path):
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        UNet2DConditionModel(**TOPOLOGIES[name].config).save_config(tmp_path)
    assert identify(json.loads((tmp_path / "config.json").read_text())).name == name


@pytest.mark.parametrize("name", ["sd15", "sd15-base"])
def test_a_field_that_an_early_config_lacks_has_diffusers_default(name):
    early = {key: TOPOLOGIES[name].config[key] for key in EARLY_KEYS}
    assert parameters(early) == TOPOLOGIES[name].parameters
    assert identify(early).name == name


@pytest.mark.parametrize("change", [{"layers_per_block": 3}, {"cross_attention_dim": 64}, {"mid_block_type": "other"}])
def test_another_network_is_not_identified(change):
    assert identify(dict(TOPOLOGIES["sd15"].config) | change) is None


def test_resolution_and_input_channels_do_not_make_another_topology():
    assert identify(dict(TOPOLOGIES["sd15"].config) | {"sample_size": 96, "in_channels": 9}).name == "sd15"


@pytest.mark.parametrize("name", ["sd15", "sd15-tiny", "sdxl"])
def test_a_narrowed_config_keeps_the_graph(name):
    stages = len(TOPOLOGIES[name].config["block_out_channels"])
    config = narrowed(name, (32,) * stages, cross_attention_dim=16)
    assert config["block_out_channels"] == (32,) * stages
    assert config["cross_attention_dim"] == 16
    same = set(config) - {"block_out_channels", "cross_attention_dim"}
    assert {key: config[key] for key in same} == {key: TOPOLOGIES[name].config[key] for key in same}
