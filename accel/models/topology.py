"""UNet topologies as data: teachers, block-removed students, depth-pruned students.

Every entry is a plain `UNet2DConditionModel` config, so diffusers builds, saves and reloads it without custom code.
Parameter counts are exact and asserted by the tests. Sources: the published configs of Stable Diffusion 1.5 / 2.x /
SDXL, BK-SDM (arXiv 2305.15798) and SSD-1B / Vega (arXiv 2401.02677).

Naming trap: Segmind's "SD-Small" is Nota's "BK-SDM-Base" (a mid block is kept); Nota's "BK-SDM-Small" has no Segmind
name. An alias therefore always carries its vendor, and the short names are unambiguous: base, small, tiny.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import unknown


@dataclass(frozen=True, kw_only=True)
class Topology:
    """One UNet.

    Attributes:
        name: the project's own, unambiguous name.
        family: `sd1`, `sd2` or `sdxl`: decides text encoders, conditioning and file layouts.
        parameters: exact parameter count of the UNet.
        teacher: name of the topology it is pruned from; None for a teacher.
        aliases: names others use for exactly this network.
        config: keyword arguments of `diffusers.UNet2DConditionModel`.
    """

    name: str
    family: str
    parameters: int
    teacher: str | None = None
    aliases: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


_CROSS_DOWN, _PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"

_SD1 = dict(
    sample_size=64,
    in_channels=4,
    out_channels=4,
    layers_per_block=2,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=(_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, _PLAIN_DOWN),
    up_block_types=(_PLAIN_UP, _CROSS_UP, _CROSS_UP, _CROSS_UP),
    mid_block_type="UNetMidBlock2DCrossAttn",
    attention_head_dim=8,
    cross_attention_dim=768,
)
_SD2 = _SD1 | dict(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
_SDXL = dict(
    sample_size=128,
    in_channels=4,
    out_channels=4,
    layers_per_block=2,
    block_out_channels=(320, 640, 1280),
    down_block_types=(_PLAIN_DOWN, _CROSS_DOWN, _CROSS_DOWN),
    up_block_types=(_CROSS_UP, _CROSS_UP, _PLAIN_UP),
    mid_block_type="UNetMidBlock2DCrossAttn",
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


# Config fields that may be given once for all stages or as a list with one value per stage.
_PER_STAGE = (
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "only_cross_attention",
)


def remove_blocks(teacher: Mapping[str, Any], student: str) -> dict[str, Any]:
    """BK-SDM's block removal (arXiv 2305.15798, section 3.1) on the config of a four-stage UNet of any width.

    Args:
        teacher: config with two layers per block.
        student: `base` (one layer less per stage), `small` (also no mid block) or `tiny` (also no fourth stage).
    """
    config = dict(teacher) | {"layers_per_block": 1}
    if student in ("small", "tiny"):
        config["mid_block_type"] = None
    if student == "tiny":
        config["block_out_channels"] = config["block_out_channels"][:3]
        config["down_block_types"] = config["down_block_types"][:3]
        config["up_block_types"] = config["up_block_types"][1:]
        config |= {key: config[key][:3] for key in _PER_STAGE if isinstance(config.get(key), (list, tuple))}
    return config


def _topologies() -> dict[str, Topology]:
    sd2_1 = _SD2 | dict(sample_size=96, upcast_attention=True)
    ssd_1b = _SDXL | dict(
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=(1, (2, 2), (4, 4)),
        reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
    )
    vega = _SDXL | dict(mid_block_type="UNetMidBlock2D", transformer_layers_per_block=(1, 1, 2))
    entries = [
        Topology(name="sd15", family="sd1", parameters=859_520_964, config=_SD1, aliases=("sd14", "sd1", "sd1.5")),
        Topology(
            name="sd15-base",
            family="sd1",
            teacher="sd15",
            parameters=579_384_964,
            config=remove_blocks(_SD1, "base"),
            aliases=("bk-sdm-base", "segmind-sd-small", "sd-small", "small-sd"),
        ),
        Topology(
            name="sd15-small",
            family="sd1",
            teacher="sd15",
            parameters=482_346_884,
            config=remove_blocks(_SD1, "small"),
            aliases=("bk-sdm-small",),
        ),
        Topology(
            name="sd15-tiny",
            family="sd1",
            teacher="sd15",
            parameters=323_384_964,
            config=remove_blocks(_SD1, "tiny"),
            aliases=("bk-sdm-tiny", "segmind-sd-tiny", "sd-tiny", "tiny-sd"),
        ),
        Topology(
            name="sd2",
            family="sd2",
            parameters=865_910_724,
            config=_SD2,
            aliases=("sd20", "stable-diffusion-2-base", "stable-diffusion-2-1-base"),
        ),
        Topology(name="sd21", family="sd2", parameters=865_910_724, config=sd2_1, aliases=("sd2.1", "sd21-768")),
        Topology(
            name="sd2-base",
            family="sd2",
            teacher="sd2",
            parameters=583_480_964,
            config=remove_blocks(_SD2, "base"),
            aliases=("bk-sdm-v2-base",),
        ),
        Topology(
            name="sd2-small",
            family="sd2",
            teacher="sd2",
            parameters=485_787_524,
            config=remove_blocks(_SD2, "small"),
            aliases=("bk-sdm-v2-small",),
        ),
        Topology(
            name="sd2-tiny",
            family="sd2",
            teacher="sd2",
            parameters=326_825_604,
            config=remove_blocks(_SD2, "tiny"),
            aliases=("bk-sdm-v2-tiny",),
        ),
        Topology(name="sdxl", family="sdxl", parameters=2_567_463_684, config=_SDXL, aliases=("sdxl-base",)),
        Topology(name="ssd-1b", family="sdxl", teacher="sdxl", parameters=1_331_334_404, config=ssd_1b),
        Topology(
            name="vega", family="sdxl", teacher="sdxl", parameters=745_225_604, config=vega, aliases=("segmind-vega",)
        ),
    ]
    return {entry.name: entry for entry in entries}


TOPOLOGIES: Mapping[str, Topology] = MappingProxyType(_topologies())
ALIASES: Mapping[str, str] = MappingProxyType(
    {alias: entry.name for entry in TOPOLOGIES.values() for alias in entry.aliases}
)


def topology(name: str) -> Topology:
    """The topology of a name or alias.

    Raises:
        UserError: for an unknown name; the known ones are listed.
    """
    key = name.lower().replace("_", "-")
    key = ALIASES.get(key, key)
    if key not in TOPOLOGIES:
        raise unknown("topology", name, sorted([*TOPOLOGIES, *ALIASES]))
    return TOPOLOGIES[key]


def narrowed(name: str, channels: tuple[int, ...], **overrides: Any) -> dict[str, Any]:
    """The config of a topology with other channel widths: the same graph, small enough for tests and for digits.

    Args:
        name: a topology name or alias.
        channels: `block_out_channels`, one per stage of the topology.
        overrides: further config fields, such as `cross_attention_dim` or `norm_num_groups`.
    """
    config = dict(topology(name).config)
    assert len(channels) == len(config["block_out_channels"]), "one width per stage"
    return config | {"block_out_channels": tuple(channels)} | overrides


def identify(config: Mapping[str, Any]) -> Topology | None:
    """The topology a UNet config is an instance of (resolution and input channels aside), or None for a custom one."""

    def shape(candidate: Mapping[str, Any]) -> tuple:
        keys = (
            "block_out_channels",
            "layers_per_block",
            "down_block_types",
            "up_block_types",
            "mid_block_type",
            "cross_attention_dim",
            "attention_head_dim",
            "use_linear_projection",
            "addition_embed_type",
            "transformer_layers_per_block",
            "reverse_transformer_layers_per_block",
            "upcast_attention",
        )
        # diffusers' own, for configs that were written before the field existed (such as SD1.5's).
        defaults = {
            "use_linear_projection": False,
            "transformer_layers_per_block": 1,
            "upcast_attention": False,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
        }
        return tuple(_frozen(candidate.get(key, defaults.get(key))) for key in keys)

    wanted = shape(config)
    return next((entry for entry in TOPOLOGIES.values() if shape(entry.config) == wanted), None)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
