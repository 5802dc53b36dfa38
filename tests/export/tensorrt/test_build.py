"""Building engines on fakes of TensorRT 10.16 and 11.4: order, profiles, options, failures, warnings."""

from __future__ import annotations

import json

import pytest

from accel.errors import UserError
from accel.export.tensorrt.build import build
from accel.export.tensorrt.options import BuildOptions
from accel.trt import engine_files, preflight
from accel.trt.engine_files import Here

VAE = ("vae_decoder",)
# For what calls nothing of TensorRT that the other tests do not call: one version shows it.
NEWEST = pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)


def test_a_build_goes_in_order_and_is_kept(bundle, tensorrt):
    said = []
    (file,) = build(bundle, VAE, announce=said.append)
    assert tensorrt._world.calls == ["Builder", "network", "parse", "config", "profile", "build", "deserialize"]
    assert file.path == bundle.path / "engines" / file.key / "vae_decoder.plan" and file.path.is_file()
    assert "building needs about" in said[0] and "in fp32" in said[1]
    assert preflight.check(bundle, file, Here(tensorrt.__version__, "Fake GPU", "9.0")).ok
    bundle.verify()  # engine files lie beside what the manifest lists
    assert build(bundle, VAE, announce=said.append)[0].key == file.key and "already built" in said[-1]
    assert tensorrt._world.calls.count("build") == 1
    build(bundle, VAE, force=True)
    assert tensorrt._world.calls.count("build") == 2


def test_several_profiles_go_into_one_engine(bundle, tensorrt):
    (file,) = build(bundle, VAE, profiles=["batch=1,size=64", "batch=1-4,height=64-128,width=128"])
    assert tensorrt._world.calls.count("profile") == 2
    first, second = (profile["shapes"]["latent_sample"] for profile in file.identity["profiles"])
    assert first == [[1, 4, 16, 16]] * 3 and second == [[1, 4, 16, 32], [1, 4, 32, 32], [4, 4, 32, 32]]


@NEWEST
@pytest.mark.parametrize(
    "profiles, message",
    [
        (["batch=1-9,size=64"], "batch"),
        (["batch=1,size=256"], "256"),
        (["batch=1,size=81"], "not a multiple"),
        (["nonsense"], "unknown profile"),
        (["batch=1,size=64", "batch=1,size=64"], "twice"),
    ],
)
def test_profiles_outside_the_bundle_are_refused_before_anything_is_built(bundle, tensorrt, profiles, message):
    with pytest.raises(UserError, match=message):
        build(bundle, profiles=profiles)
    assert tensorrt._world.calls == [] and not (bundle.path / "engines").exists()


@pytest.mark.parametrize(
    "options, flags",
    [
        (BuildOptions(), set()),
        (BuildOptions(refittable=True, workspace=1 << 20), {"REFIT"}),
        (BuildOptions(tf32=True), {"TF32"}),
        (BuildOptions(strip_plan=True), {"REFIT_IDENTICAL", "STRIP_PLAN"}),
        (BuildOptions(strip_plan=True, refittable=True), {"REFIT", "STRIP_PLAN"}),
        (BuildOptions(version_compatible=True, weight_streaming=True), {"VERSION_COMPATIBLE", "WEIGHT_STREAMING"}),
    ],
)
def test_options_are_flags_of_both_versions_and_part_of_the_key(bundle, tensorrt, options, flags):
    (file,) = build(bundle, VAE, options=options)
    data = file.path.read_bytes()
    start = data.index(b'{"version"')
    header, _ = json.JSONDecoder().raw_decode(data[start : start + 4000].decode("utf-8", "replace"))
    assert set(header["flags"]) == flags
    assert header["limits"] == ({"WORKSPACE": options.workspace} if options.workspace else {})
    plain = engine_files.key_of({**file.identity, "options": BuildOptions().identity()})
    assert (file.key == plain) == (options == BuildOptions())


@NEWEST
@pytest.mark.parametrize(
    "options", [BuildOptions(optimization_level=6), BuildOptions(workspace=5), BuildOptions(hardware_compatible="all")]
)
def test_invalid_options_are_refused(bundle, tensorrt, options):
    with pytest.raises(UserError):
        build(bundle, VAE, options=options)


@NEWEST
def test_refittable_engines_are_refused_where_tensorrt_computes_them_wrongly(bundle, tensorrt, monkeypatch):
    monkeypatch.setattr(tensorrt, "__version__", "11.3.0.99")
    with pytest.raises(UserError, match="drop the bias") as caught:
        build(bundle, VAE, options=BuildOptions(refittable=True))
    assert "11.4" in caught.value.fix


def test_an_operator_without_importer_is_named(bundle, tensorrt):
    tensorrt._world.fail.add("Softmax")
    told = "unsupported node: No importer registered for op: Softmax .in parseNode. .node .*, Softmax"
    with pytest.raises(UserError, match=told) as caught:
        build(bundle, VAE)
    assert "accel inspect" in caught.value.fix and not (bundle.path / "engines").exists()


def test_a_failed_build_ends_with_the_last_error_line(bundle, tensorrt):
    tensorrt._world.fail.add("build")
    with pytest.raises(UserError, match="Could not find any implementation for node /conv_in"):
        build(bundle, VAE)
    assert not (bundle.path / "engines").exists()


def test_an_engine_that_cannot_be_deserialized_is_not_kept(bundle, tensorrt):
    tensorrt._world.fail.add("deserialize")
    with pytest.raises(UserError, match="cannot deserialize its own engine.*magic tag"):
        build(bundle, VAE)
    assert not (bundle.path / "engines").exists()


@NEWEST
def test_warnings_of_a_build_that_succeeds_are_kept(bundle, tensorrt):
    tensorrt._world.warn = ["Converting conv activation scales to fp32"] * 80 + ["something else"]
    said = []
    (file,) = build(bundle, VAE, announce=said.append)
    assert file.record["warnings"] == ["Converting conv activation scales to fp32 (80 times)", "something else"]
    assert said[-1].endswith("warned: Converting conv activation scales to fp32 (80 times) (and 1 more in its record)")


def test_targets_are_for_tensorrt_rtx(bundle, tensorrt):
    with pytest.raises(UserError, match="TensorRT does not take --targets") as caught:
        build(bundle, VAE, targets=["sm89"])
    assert "leave --targets out" in caught.value.fix and tensorrt._world.calls == []
