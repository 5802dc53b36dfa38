"""Tiles of a VAE against diffusers' own `tiled_decode` and `tiled_encode`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accel.bundle import Component
from accel.bundle.shape_profiles import Range, fixed
from accel.errors import UserError
from accel.pipeline.tiling import VaeTiling

# Latent sizes: one side no larger than a tile, both larger, a last tile of one latent pixel.
SIZES = [(8, 20), (20, 27), (13, 25), (8, 8)]


def made_vae(vae_maker, name: str):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    if name == "AutoencoderKL":
        return vae_maker()
    widths = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8,) * 4)
    return AutoencoderTiny(**widths).eval()


def tiled(vae, name: str, pixels: int):
    """diffusers' VAE with tiles of that size, and ours."""
    scale = 4 if name == "AutoencoderKL" else 8
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = pixels, pixels // scale
    return VaeTiling.of(dict(vae.config) | {"_class_name": name}, scale, pixels)


def of_torch(function):
    return lambda tile: function(torch.from_numpy(np.ascontiguousarray(tile))).numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
@torch.no_grad()
def test_tiles_are_decoded_and_encoded_as_in_diffusers(vae_maker, name, size):
    vae = made_vae(vae_maker, name)
    tiling = tiled(vae, name, 32 if name == "AutoencoderKL" else 128)
    z = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    whole = of_torch(lambda x: vae.decode(x, return_dict=False)[0])
    expected = vae.decode(z, return_dict=False)[0].numpy()
    vae.disable_tiling()
    found, plain = tiling.decode(z.numpy(), whole), whole(z.numpy())
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-5
    cut = any(len(tiles) > 1 for tiles in tiling.sides(*(side * tiling.scale for side in size)))
    assert (np.abs(found - plain).max() > 1e-3) == cut

    pixels = torch.rand(2, 3, *(side * tiling.scale for side in size), generator=torch.Generator().manual_seed(1))

    def encoded(x):
        return vae.encode(x).latent_dist.parameters if name == "AutoencoderKL" else vae.encode(x).latents

    vae.enable_tiling()
    expected = encoded(pixels).numpy()
    vae.disable_tiling()
    assert np.abs(tiling.encode(pixels.numpy(), of_torch(encoded)) - expected).max() < 1e-5


@torch.no_grad()
def test_no_tile_is_larger_than_it_may_be(vae_maker):
    tiling = VaeTiling("AutoencoderKL", 64, 4)
    seen = []

    def run(tile):
        seen.append(tile.shape[2:])
        return np.zeros((len(tile), 3, tile.shape[2] * 4, tile.shape[3] * 4), np.float16)

    assert tiling.decode(np.zeros((1, 4, 33, 16), np.float32), run).shape == (1, 3, 132, 64)
    high, wide = tiling.sides(132, 64)
    assert (high, wide) == ([64, 64, 36], [64, 16])
    assert seen == [(h // 4, w // 4) for h in high for w in wide]


def test_the_side_of_a_tile_is_the_vaes_own(vae_maker):
    vae = vae_maker()
    for name, scale, own in (("AutoencoderKL", 4, vae.tile_sample_min_size), ("AutoencoderTiny", 8, 512)):
        assert VaeTiling.of(dict(vae.config) | {"_class_name": name}, scale).tile == own


@pytest.mark.parametrize("tile", [40, 0, -64, 8])
def test_a_side_that_makes_no_whole_overlaps_is_refused(tile):
    with pytest.raises(UserError, match=f"vae_tile is {tile}, .* multiples of 32 px"):
        VaeTiling.of({}, 8, tile)


def test_a_vae_whose_own_size_makes_no_tiles_or_of_another_class_is_refused():
    with pytest.raises(UserError, match="sample_size is 500") as error:
        VaeTiling.of({"sample_size": 500}, 8)
    assert error.value.fix == "vae_tile=512"
    with pytest.raises(UserError, match="from 128 on"):
        VaeTiling.of({"_class_name": "AutoencoderTiny"}, 8, 64)
    with pytest.raises(UserError, match="AutoencoderKLWan has no tiles"):
        VaeTiling.of({"_class_name": "AutoencoderKLWan"}, 8)


def component(limits: Range) -> Component:
    dims = dict.fromkeys(("height", "width"), limits)
    return Component("vae_decoder", "vae_decoder", "vae_decoder/model.onnx", "vae_decoder/w", (), (), dims)


def test_a_component_that_does_not_take_the_tiles_is_refused():
    tiling = VaeTiling("AutoencoderKL", 512, 8)
    tiling.check(component(Range(256, 512, 512, 64)), 1024, 1024)
    with pytest.raises(UserError, match=r"height of 832 px is cut into tiles of 512, 448, 64 px, .* 256 to 512") as e:
        tiling.check(component(Range(256, 512, 512, 64)), 832, 1024)
    assert "vae_tile=512" in e.value.fix
    with pytest.raises(UserError, match=r"takes 512 \(tiles at the edge are smaller\)"):
        tiling.check(component(fixed(512)), 1024, 1024)
    tiling.check(component(fixed(512)), 512, 512)
    with pytest.raises(UserError, match="width of 256 px is one tile"):
        tiling.check(component(fixed(512)), 512, 256)
