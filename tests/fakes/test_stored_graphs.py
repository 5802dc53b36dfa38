"""The graphs that exports of a test session share: one for networks that only differ in weights, else one each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import save_file

from accel.bundle.shape_profiles import Range
from accel.int8 import fake_quant, packed
from accel.int8.config import Int8Config
from accel.models import networks


@pytest.fixture
def export(fakes, vae_maker, tmp_path):
    """export(network, side, opset): the graph that is remembered of an exporter that numbers its graphs."""
    (tmp_path / "graphs").mkdir()
    made = []

    def export_graph(network, dims, folder, *, opset):
        made.append(network)
        (folder / "model.onnx").write_text(str(len(made)))

    remembering = fakes("stored_graphs").remembering(
        export_graph, partial(fakes("made_once").made_once, tmp_path / "graphs")
    )

    def call(network, side: int = 8, opset: int = 20) -> str:
        folder = Path(tmp_path / f"{len(list(tmp_path.iterdir()))}")
        folder.mkdir()
        save_file(network.module.model.state_dict(), folder / "model.safetensors")
        sides = dict.fromkeys(("latent_height", "latent_width", "height", "width"), Range(8, 8, side))
        remembering(network, sides | {"images": Range(1, 1, 1)}, folder, opset=opset)
        return (folder / "model.onnx").read_text()

    return call


def test_networks_with_other_weights_share_a_graph(export, vae_maker):
    first, second = (networks.vae_decoder(vae_maker(seed)) for seed in (0, 1))
    assert export(first) == export(second) == "1"


def test_what_a_graph_can_show_makes_another(export, vae_maker):
    decoder = networks.vae_decoder(vae_maker(0))
    seen = [export(decoder), export(decoder, side=16), export(decoder, opset=23)]
    seen.append(export(networks.vae_encoder(vae_maker(0))))
    renamed = tuple(replace(spec, name="picture") for spec in decoder.outputs)
    seen.append(export(replace(decoder, outputs=renamed)))
    networks.keep_float32(decoder.module.model, ("decoder.conv_out",))
    seen.append(export(decoder))
    seen.append(export(networks.vae_decoder(vae_maker(0).half())))
    assert seen == ["1", "2", "3", "4", "5", "6", "7"]


def test_int8_networks_share_no_graph_for_their_scales_lie_in_it(export, vae_maker):
    decoder = networks.vae_decoder(vae_maker(0))
    fake_quant.attach(decoder.module.model, Int8Config())
    for _, quantizer in fake_quant.ranges(decoder.module.model):
        quantizer.set_scale(0.02)
    packed.pack(decoder.module.model)
    assert [export(decoder), export(decoder)] == ["1", "2"]
