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
    ("text", "side"), [("size=65", "height"), ("size=64-100", "height"), ("height=64,width=96-128", "width")]
)
def test_a_size_that_the_network_cannot_halve_is_refused_with_one_that_it_can(text, side):
    with pytest.raises(UserError, match=side) as caught:
        profile(text).dims(**SD1, guidance=False)
    assert "64 px" in caught.value.message
    suggestion = int(caught.value.fix.rpartition("=")[2])
    assert suggestion > 0 and suggestion % 64 == 0


def test_a_size_is_judged_by_the_networks_own_step():
    wide = profile("size=96").dims(vae_scale=8, latent_multiple=4, guidance=False)
    assert wide["latent_height"] == fixed(12)


@pytest.mark.parametrize("value", range(1, 300, 7))
def test_rounding_never_gives_zero_and_never_strays_more_than_half_a_step(value):
    rounded = round_to(value, 64)
    assert rounded % 64 == 0 and rounded >= 64
    assert rounded == 64 or abs(rounded - value) <= 32
