"""Protocols: what they say, what overriding does to their names, and constants that make no sense."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.assets import DIGITS
from accel.commands.evaluate import PROTOCOL_NAMES
from accel.distill.evaluation import metrics
from accel.distill.evaluation.own_sets import OWN_SETS
from accel.distill.evaluation.protocols import PROTOCOLS, full_id, overridden, protocol, sampling_changes, schedulers
from accel.dtypes import SHORT
from accel.errors import UserError
from accel.sampling import Sampling
from accel.sampling.samplers import SAMPLERS

BASE = Sampling(sampler="dmd2", timesteps=(999, 749, 499, 249), guidance=0.0)


def test_the_command_line_lists_every_protocol_and_every_metric_has_its_adapter():
    assert PROTOCOL_NAMES == tuple(PROTOCOLS)
    for name, found in PROTOCOLS.items():
        assert protocol(name).id == name
        assert found.prompts in (*OWN_SETS, "captions", "classes") and found.format in ("png", "jpeg")
        assert bool(found.captions_source) == (found.prompts == "captions")
        assert bool(found.reference_source) == bool(found.reference_images)
        assert found.sampling.sampler in schedulers() and found.dtype in (None, *SHORT)
        for metric in found.metrics:
            assert metric.kind in (*OWN_SETS, "frechet", "inception_score", "clip_score")
            assert metric.kind in (*OWN_SETS, "clip_score") or metric.extractor in metrics.EXTRACTORS
            assert metric.prepare.filter in metrics.FILTERS
    assert set(schedulers()) == set(SAMPLERS)


def test_the_two_coco_protocols_are_not_the_same_measurement():
    nota, dmd2 = PROTOCOLS["bk-sdm-coco30k"], PROTOCOLS["dmd2-sd15-coco30k"]
    assert nota.sampling == Sampling(sampler="pndm", steps=25, guidance=7.5) and nota.images == 30_000
    assert (nota.format, nota.seed, nota.dtype, nota.reference_images) == ("jpeg", 1234, "fp16", 40_504)
    clip = {p.id: next(m for m in p.metrics if m.kind == "clip_score") for p in (nota, dmd2)}
    assert clip[nota.id].extractor != clip[dmd2.id].extractor
    assert (clip[nota.id].prefix, clip[dmd2.id].prefix) == ("", "A photo depicts ")
    assert [m.prepare.crop for m in PROTOCOLS["dmd2-sdxl-coco10k"].metrics[:2]] == ["centre", 299]


def test_an_unknown_protocol_names_the_known_ones():
    with pytest.raises(UserError, match="coco") as error:
        protocol("coco")
    assert all(name in error.value.fix for name in PROTOCOLS)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, "p"),
        ({"steps": 4}, "p"),
        ({"sampler": "dmd2", "guidance": 0}, "p"),
        ({"steps": 2}, "p[steps=2]"),
        ({"guidance": 7.5}, "p[guidance=7.5]"),
        ({"sampler": "ddim"}, "p[sampler=ddim]"),
        ({"sampler": "ddim", "steps": 25, "guidance": 3}, "p[sampler=ddim,steps=25,guidance=3]"),
    ],
)
def test_the_name_carries_what_was_changed_and_only_that(flags, name):
    used = overridden(BASE, **flags)
    assert full_id("p", sampling_changes(BASE, used)) == name
    assert (used == BASE) == (name == "p")


def test_the_models_own_timesteps_stay_unless_the_grid_changes():
    assert overridden(BASE, guidance=2).timesteps == BASE.timesteps
    assert overridden(BASE, steps=4).timesteps == BASE.timesteps
    two = overridden(BASE, steps=2)
    assert two.timesteps is None and two.steps == two.count == 2
    other = overridden(BASE, sampler="euler")
    assert other.timesteps is None and other.steps == 4


@given(
    st.sampled_from(list(schedulers())),
    st.integers(1, 100),
    st.floats(0, 20),
    st.sampled_from([None, *schedulers()]),
    st.none() | st.integers(1, 100),
    st.none() | st.floats(0, 20),
)
@settings(deadline=None)
def test_what_differs_is_named_and_what_is_named_differs(sampler, steps, guidance, other, count, scale):
    flags = (other, count, scale)
    base = Sampling(sampler=sampler, steps=steps, guidance=guidance)
    used = overridden(base, *flags)
    for name, asked in zip(("sampler", "steps", "guidance"), flags, strict=True):
        assert getattr(used, name) == (getattr(base, name) if asked is None else asked)
        assert (name in sampling_changes(base, used)) == (getattr(used, name) != getattr(base, name))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"sampler": "plms"}, "plms"),
        ({"steps": 0}, "steps"),
        ({"steps": True}, "steps"),
        ({"guidance": -1}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, word):
    with pytest.raises(UserError, match=word) as error:
        overridden(BASE, **flags)
    assert error.value.fix


def test_the_shipped_constants_are_read():
    constants = json.loads((DIGITS / "teacher" / "sampler.json").read_text())
    found = Sampling.from_dict(constants, "here")
    assert (found.sampler, found.count, found.guidance) == ("dpmpp_2m", 25, 3.0)
    assert Sampling.from_dict({"name": "dmd2", "timesteps": [999, 499], "guidance": 0}, "here").count == 2


@pytest.mark.parametrize(
    "constants",
    [
        None,
        [],
        {},
        {"name": "dpmpp_2m"},
        {"name": "x", "steps": 1, "guidance": 0},
        {"name": "ddim", "steps": 0, "guidance": 0},
        {"name": "ddim", "steps": 1, "guidance": "3"},
        {"name": "ddim", "steps": 1, "guidance": float("nan")},
        {"name": "dmd2", "timesteps": [], "guidance": 0},
        {"name": "dmd2", "timesteps": ["999"], "guidance": 0},
        {"name": "dmd2", "timesteps": 999, "guidance": 0},
    ],
)
def test_constants_that_make_no_sense_name_their_file(constants):
    with pytest.raises(UserError, match=r"folder/sampler\.json"):
        Sampling.from_dict(constants, "folder/sampler.json", schedulers())
