import json

import pytest

from accel import records
from accel.bundle.shape_profiles import PROFILES, Profile, Range, fixed, profile, round_to
from accel.errors import UserError

SD1 = dict(vae_scale=8, latent_multiple=8)


def test_a_range_admits_its_ends_and_the_steps_between():
    limits = Range(64, 64, 256, 64)
    assert [n for n in range(0, 400) if limits.admits(n)] == [64, 128, 192, 256]


def test_a_fixed_range_admits_one_value():
    assert [n for n in range(0, 100) if fixed(77).admits(n)] == [77]
    assert fixed(77).fixed and not Range(1, 1, 2).fixed


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("guidance", [False, True])
def test_every_named_profile_fits_stable_diffusion_and_is_consistent(name, guidance):
    dims = PROFILES[name].dims(**SD1, guidance=guidance)
    for side in ("height", "width"):
        pixels, latent = dims[side], dims[f"latent_{side}"]
        assert (latent.min * 8, latent.opt * 8, latent.max * 8) == (pixels.min, pixels.opt, pixels.max)
        assert all(
            limits.admits(limits.min) and limits.admits(limits.opt) and limits.admits(limits.max)
            for limits in (pixels, latent)
        )
        for stride in (2, 4, 8):
            assert dims[f"latent_{side}_{stride}"].max * stride == latent.max
    assert dims["images"] == PROFILES[name].batch


@pytest.mark.parametrize("text", ["sd-512", "dynamic", "batch=2,height=64-128,width=64", "static", "native"])
def test_a_profile_survives_json(text):
    made = profile(text, native=512)
    assert records.read(Profile, json.loads(json.dumps(made.as_dict())), "profile") == made


def test_guidance_doubles_a_fixed_batch_and_a_range_leaves_room_for_both():
    for guidance, size in ((True, 6), (False, 3)):
        batch = profile("batch=3,size=64").dims(**SD1, guidance=guidance)["batch"]
        assert (batch.min, batch.opt, batch.max) == (size, size, size)
    for guidance in (False, True):
        batch = profile("batch=1-4,size=64").dims(**SD1, guidance=guidance)["batch"]
        assert (batch.min, batch.max) == (1, 8)


def test_a_profile_can_be_spelled_out():
    made = profile("batch=2-4, height=256-768, width=512, tokens=77")
    assert (made.batch.min, made.batch.max) == (2, 4)
    assert (made.height.min, made.height.max) == (256, 768)
    assert made.width == fixed(512)
    assert made.tokens == 77
    assert profile("size=64-128").height == profile("size=64-128").width


def test_the_models_own_size_stands_in_for_a_side_that_is_not_named():
    assert profile("batch=2", native=512).height == fixed(512)
    assert profile("static", native=64) == Profile("static", fixed(1), fixed(64), fixed(64))
    assert profile("native", native=64).batch.max > 1
    with pytest.raises(UserError, match="names no height and width"):
        profile("batch=2")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sd-51",
        "size",
        "size=",
        "size=a",
        "size=64..128",
        "size=-64",
        "size=64-",
        "depth=64",
        "size=64;batch=1",
        "size=64,",
        "SIZE=64",
        "batch=1 - 4,size=64",
    ],
)
def test_a_text_that_is_no_profile_is_refused_with_the_names(text):
    with pytest.raises(UserError) as caught:
        profile(text, native=512)
    assert repr(text) in caught.value.message
    assert "sd-512" in caught.value.fix and "batch=1-4" in caught.value.fix


@pytest.mark.parametrize("text", ["size=128-64", "batch=0,size=64", "size=0", "batch=4-1,size=64"])
def test_an_empty_range_is_refused(text):
    with pytest.raises(UserError, match="empty range"):
        profile(text)


@pytest.mark.parametrize("text", ["size=64,size=128", "size=64,height=128", "batch=1,batch=2,size=64"])
def test_saying_one_thing_twice_is_refused(text):
    with pytest.raises(UserError, match="twice"):
        profile(text)


@pytest.mark.parametrize("text", ["tokens=0,size=64", "tokens=16-77,size=64"])
def test_the_text_length_is_one_number(text):
    with pytest.raises(UserError, match="tokens"):
        profile(text)


@pytest.mark.parametrize(
    ("text", "side"), [("size=56-128", "height"), ("size=64-100", "height"), ("height=64,width=96-128", "width")]
)
def test_a_size_that_the_network_cannot_halve_is_refused_with_one_that_it_can(text, side):
    with pytest.raises(UserError, match=side) as caught:
        profile(text).dims(**SD1, guidance=False)
    assert "64 px" in caught.value.message
    suggestion = int(caught.value.fix.partition("=")[2].partition(";")[0])
    assert suggestion > 0 and suggestion % 64 == 0
    assert caught.value.fix.endswith("; or add step=8 to allow all multiples of 8")


def test_a_fixed_size_is_any_multiple_of_what_the_vae_enlarges_by():
    dims = profile("height=72,width=88").dims(**SD1, guidance=False)
    assert (dims["latent_height"], dims["latent_width"]) == (fixed(9), fixed(11))
    assert [dims[f"latent_height_{stride}"].max for stride in (2, 4, 8)] == [5, 3, 2]  # rounded up, as a UNet does
    with pytest.raises(UserError, match="height 65 is not a multiple of 8 px") as caught:
        profile("size=65").dims(**SD1, guidance=False)
    assert caught.value.fix == "use multiples of 8, for example height=64"


def test_a_range_goes_in_steps_that_are_asked_for():
    made = profile("size=72-200,step=16", native=512)
    with pytest.raises(UserError, match="height 72 to 200 is not a multiple of 16"):
        made.dims(**SD1, guidance=False)
    dims = profile("size=72-200,step=8").dims(**SD1, guidance=False)
    assert dims["height"] == Range(72, 200, 200, 8) and dims["latent_height"] == Range(9, 25, 25, 1)
    assert dims["latent_height_4"] == Range(3, 7, 7, 1)
    with pytest.raises(UserError, match="step=12 is no multiple of 8 px"):
        profile("size=72-96,step=12").dims(**SD1, guidance=False)


def test_a_vae_takes_all_multiples_of_what_it_enlarges_by():
    dims = profile("size=64-128").dims(**SD1, guidance=False, component="vae_decoder")
    assert dims["height"] == Range(64, 128, 128, 8) and dims["latent_height"] == Range(8, 16, 16, 1)


def test_a_vae_for_tiles_takes_them_and_the_unet_the_whole():
    made = profile("sdxl-1024,vae_tile=512")
    assert made.name == "sdxl-1024,vae_tile=512" and made.batch == Range(1, 1, 4)
    assert made.dims(**SD1, guidance=False)["height"] == fixed(1024)
    tiles = made.dims(**SD1, guidance=False, component="vae_encoder")
    assert tiles["height"] == tiles["width"] == Range(8, 512, 512, 8)
    assert tiles["latent_height"] == Range(1, 64, 64, 1)
    with pytest.raises(UserError, match="vae_tile=100 makes no tiles"):
        profile("sd-512,vae_tile=100").dims(**SD1, guidance=False)
    with pytest.raises(UserError, match="only step and vae_tile may follow a name"):
        profile("sd-512,batch=2")


def test_the_younger_fields_are_stored_where_they_are_given():
    assert not {"step", "vae_tile"} & set(profile("sd-512").as_dict())
    assert profile("native,vae_tile=64", native=64).as_dict()["vae_tile"] == 64


def test_a_size_is_judged_by_the_networks_own_step():
    wide = profile("size=96").dims(vae_scale=8, latent_multiple=4, guidance=False)
    assert wide["latent_height"] == fixed(12)


@pytest.mark.parametrize("value", range(1, 300, 7))
def test_rounding_never_gives_zero_and_never_strays_more_than_half_a_step(value):
    rounded = round_to(value, 64)
    assert rounded % 64 == 0 and rounded >= 64
    assert rounded == 64 or abs(rounded - value) <= 32
