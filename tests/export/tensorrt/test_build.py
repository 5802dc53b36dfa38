"""Building engine files, on fakes of TensorRT 10.16 and 11.4: order, profiles, failures, audit, identity, trust."""

from __future__ import annotations

import _thread
import json
import os
import shlex
import signal
import threading
import time

import pytest

from accel.bundle import Bundle
from accel.cli import main
from accel.errors import UserError
from accel.export.tensorrt import audit, shapes, timing_cache
from accel.export.tensorrt.build import BuildOptions, build
from accel.export.tensorrt.memory import peak
from accel.trt import engine_files, library, preflight, trust

VAE = ("vae_decoder",)
# For what calls nothing of TensorRT that the other tests do not call: one version shows it.
NEWEST = pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)


@pytest.fixture
def bundle(bundle_copy):
    return Bundle.open(bundle_copy)


def here(tensorrt) -> engine_files.Here:
    from accel.export.tensorrt.build import Cuda

    return engine_files.Here.of(tensorrt.__version__, Cuda())


def verdict(bundle, tensorrt, component="vae_decoder") -> preflight.Fit:
    (engine_file,) = engine_files.find(bundle, component)
    assert isinstance(engine_file, engine_files.EngineFile), engine_file
    return preflight.check(bundle, engine_file, here(tensorrt))


# The double itself


def test_what_a_version_does_not_have_does_not_exist(tensorrt):
    with pytest.raises(AttributeError):
        tensorrt.BuilderFlag.SOME_FLAG  # noqa: B018
    with pytest.raises(AttributeError):
        tensorrt.Builder.platform_has_fast_fp64  # noqa: B018
    assert hasattr(tensorrt.BuilderFlag, "FP16") == tensorrt.__version__.startswith("10.")
    logger = type("Log", (tensorrt.ILogger,), {"log": lambda *_: None})()
    config = tensorrt.Builder(logger).create_builder_config()
    with pytest.raises(AttributeError, match="has no int8_calibratr"):
        config.int8_calibratr = None
    with pytest.raises(TypeError):
        config.set_flag("REFIT")
    with pytest.raises(TypeError):
        config.set_memory_pool_limit(pool=tensorrt.MemoryPoolType.WORKSPACE, size=1)
    with pytest.raises(TypeError):
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE)
    profile = tensorrt.Builder(logger).create_optimization_profile()
    with pytest.raises(TypeError):
        profile.set_shape("x", (1,), (1,), "12")
    if hasattr(tensorrt.BuilderFlag, "FP16"):
        assert tensorrt.BuilderFlag.FP16.value == 0
    with pytest.raises(NotImplementedError):
        config.set_preview_feature(tensorrt.PreviewFeature(0), True)


# Building


def test_a_build_goes_in_order_and_is_kept(bundle, tensorrt):
    said = []
    (engine_file,) = build(bundle, VAE, announce=said.append)
    assert tensorrt._world.calls == ["Builder", "network", "parse", "config", "profile", "build", "deserialize"]
    assert (
        engine_file.path == bundle.path / "engines" / engine_file.key / "vae_decoder.plan"
        and engine_file.path.is_file()
    )
    assert "building needs about" in said[0] and "in fp32" in said[1]
    assert verdict(bundle, tensorrt).ok
    bundle.verify()  # engine files lie beside what the manifest lists
    assert build(bundle, VAE, announce=said.append)[0].key == engine_file.key and "already built" in said[-1]
    assert tensorrt._world.calls.count("build") == 1
    build(bundle, VAE, force=True)
    assert tensorrt._world.calls.count("build") == 2


def test_several_profiles_become_one_plan(bundle, tensorrt):
    (engine_file,) = build(bundle, VAE, profiles=["batch=1,size=64", "batch=1-4,height=64-128,width=128"])
    assert tensorrt._world.calls.count("profile") == 2
    first, second = (profile["shapes"]["latent_sample"] for profile in engine_file.identity["profiles"])
    assert first == [[1, 4, 16, 16]] * 3 and second == [[1, 4, 16, 32], [1, 4, 32, 32], [4, 4, 32, 32]]


def test_guidance_doubles_the_batch_of_the_unet(bundle):
    """It is 5 in this bundle; a range leaves room for both."""
    unet = bundle.component("unet")
    first, second = (
        shapes.described(bundle, unet, profile)
        for profile in shapes.profiles_of(bundle, ["batch=1,size=64", "batch=1-4,height=64-128,width=128"])
    )
    assert first["shapes"]["sample"] == [[2, 4, 16, 16]] * 3
    assert second["shapes"]["sample"] == [[1, 4, 16, 32], [2, 4, 32, 32], [8, 4, 32, 32]]
    assert second["shapes"]["encoder_hidden_states"][0] == [1, 77, 32] and "timestep" not in first["shapes"]


@NEWEST
@pytest.mark.parametrize(
    "profiles, message",
    [
        (["batch=1-9,size=64"], "batch"),
        (["batch=1,size=256"], "256"),
        (["batch=1,size=80"], "no multiple"),
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
    (engine_file,) = build(bundle, VAE, options=options)
    data = engine_file.path.read_bytes()
    start = data.index(b'{"version"')
    header, _ = json.JSONDecoder().raw_decode(data[start : start + 4000].decode("utf-8", "replace"))
    assert set(header["flags"]) == flags
    assert header["limits"] == ({"WORKSPACE": options.workspace} if options.workspace else {})
    plain = engine_files.key_of({**engine_file.identity, "options": BuildOptions().identity()})
    assert (engine_file.key == plain) == (options == BuildOptions())


@NEWEST
@pytest.mark.parametrize(
    "options", [BuildOptions(optimization_level=6), BuildOptions(workspace=5), BuildOptions(hardware_compatible="all")]
)
def test_options_without_sense_are_refused(bundle, tensorrt, options):
    with pytest.raises(UserError):
        build(bundle, VAE, options=options)


@NEWEST
def test_refittable_plans_are_refused_where_tensorrt_gets_them_wrong(bundle, tensorrt, monkeypatch):
    monkeypatch.setattr(tensorrt, "__version__", "11.3.0.99")
    with pytest.raises(UserError, match="drop the bias") as caught:
        build(bundle, VAE, options=BuildOptions(refittable=True))
    assert "11.4" in caught.value.fix


def test_too_old_and_missing_are_said(bundle, tensorrt, monkeypatch):
    import sys

    monkeypatch.setattr(tensorrt, "__version__", "10.9.0")
    with pytest.raises(UserError, match="too old"):
        build(bundle)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match="not installed") as caught:
        build(bundle)
    assert "accel-diffusion[tensorrt]" in caught.value.fix


@NEWEST
def test_the_memory_estimate_warns_when_the_gpu_is_full(bundle, tensorrt, monkeypatch):
    from accel.export.tensorrt.build import Cuda

    monkeypatch.setattr(Cuda, "free_bytes", 1000)
    said = []
    build(bundle, VAE, announce=said.append)
    assert "only 0.0 GB are free on the GPU" in said[0]


def test_the_activation_estimate_counts_what_lives_at_once(bundle):
    component = bundle.component("vae_decoder")
    small, sizes = ({name: getattr(limits, end) for name, limits in component.dims.items()} for end in ("min", "max"))
    # Four images of 32 x 32 latents: the scores of the decoder's one attention, before and after softmax.
    scores = 4 * (32 * 32) ** 2 * 4
    assert 2 * scores <= peak(bundle, component, sizes) <= 4 * scores
    # Four times the images and four times the cells; scores grow with the square of the cells.
    assert 16 <= peak(bundle, component, sizes) / peak(bundle, component, small) <= 64


def test_the_activation_estimate_knows_every_shape_of_a_unet(bundle):
    """Eight times the batch and four times the cells: 32 times the activations, and attention grows faster."""
    unet = bundle.component("unet")
    small, large = (
        peak(bundle, unet, {name: getattr(limits, end) for name, limits in unet.dims.items()}) for end in ("min", "max")
    )
    assert 32 * small <= large <= 128 * small


# What fails, fails with TensorRT's own words and leaves nothing behind


def test_an_operator_without_importer_is_named(bundle, tensorrt):
    tensorrt._world.fail.add("Softmax")
    with pytest.raises(UserError, match="No importer registered for op: Softmax.*node") as caught:
        build(bundle, VAE)
    assert "accel inspect" in caught.value.fix and not (bundle.path / "engines").exists()


def test_no_plan_tells_the_last_error_line(bundle, tensorrt):
    tensorrt._world.fail.add("build")
    with pytest.raises(UserError, match="Could not find any implementation for node /conv_in"):
        build(bundle, VAE)
    assert not (bundle.path / "engines").exists()


def test_a_plan_that_does_not_load_is_not_kept(bundle, tensorrt):
    tensorrt._world.fail.add("deserialize")
    with pytest.raises(UserError, match="cannot deserialize its own engine.*magic tag"):
        build(bundle, VAE)
    assert not (bundle.path / "engines").exists()


def test_progress_rises_and_ctrl_c_ends_the_build_at_its_next_step(bundle, tensorrt):
    seen = []
    tensorrt._world.steps, tensorrt._world.on_step = 6, lambda _: time.sleep(0.11)
    build(bundle, VAE, progress=lambda stage, fraction: seen.append((stage, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and len(set(fractions)) > 3
    assert any("Tactic Selection" in stage for stage, _ in seen)

    reached = []

    def on_step(step):
        reached.append(step)
        if step == 2:
            _thread.interrupt_main()  # Ctrl-C for this process alone, whatever else runs the tests
        time.sleep(0.3)

    tensorrt._world.steps, tensorrt._world.on_step = 20, on_step
    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            build(bundle, ("text_encoder",))
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached[-1] < 19 and "tensorrt-build" not in [thread.name for thread in threading.enumerate()]
    assert engine_files.find(bundle, "text_encoder") == []
    tensorrt._world.on_step = None
    build(bundle, ("text_encoder",))  # and can be started again


# Timing cache


def test_the_timing_cache_is_one_file_per_gpu_and_version_and_only_grows(bundle, tensorrt):
    build(bundle, VAE)
    path = timing_cache.path_for(here(tensorrt))
    stamp, first = json.loads(path.read_bytes())
    assert tensorrt.__version__ in path.name and "Conv" in first
    path.write_text(json.dumps([stamp, ["from another build"]]))
    build(bundle, ("text_encoder",))
    assert "from another build" in json.loads(path.read_bytes())[1]
    path.write_bytes(b"garbage")  # counts as empty
    build(bundle, VAE, force=True)
    assert "Conv" in json.loads(path.read_bytes())[1]
    before = path.read_bytes()
    build(bundle, VAE, options=BuildOptions(timing_cache=False), force=True)
    assert path.read_bytes() == before


@NEWEST
def test_threads_that_begin_together_share_one_logger(tensorrt, monkeypatch):
    make, together, found = library._make_logger, threading.Barrier(4), []

    def slowly(module):
        time.sleep(0.05)
        return make(module)

    def begin():
        together.wait()
        found.append(library.logger(tensorrt))

    monkeypatch.setattr(library, "_make_logger", slowly)
    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(map(id, found))) == 1


@NEWEST
def test_builds_that_end_together_lose_no_measurements(tensorrt):
    path, together = timing_cache.path_for(here(tensorrt)), threading.Barrier(8)
    builder = tensorrt.Builder(library.logger(tensorrt))

    def end(number):
        config = builder.create_builder_config()
        timing_cache.load(config, path)
        config.get_timing_cache()._entries.add(f"kernel {number}")
        together.wait()
        timing_cache.save(config, path)

    threads = [threading.Thread(target=end, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(path.read_bytes())[1] == [f"kernel {number}" for number in range(8)]


# Audit


def layer(kind, name, dtype, tactic=""):
    tensor = {"Name": "x", "Dimensions": [1], "Format/Datatype": dtype}
    return {"Name": name, "LayerType": kind, "Inputs": [tensor], "Outputs": [tensor], "TacticName": tactic}


def test_the_audit_counts_the_layers_that_do_the_work():
    layers = [
        layer("CaskConvolution", "conv", "Thirty-two wide channel vectorized row major Int8 format."),
        layer("gemm", "matmul_myl0_7", "Half"),
        layer("kgen", "__myl_FcMulAdd_myl0_8", "Half"),
        layer("kgen", "__myl_AddCastMean_myl0_8", "Float"),  # no matrix product in it
        layer("Reformat", "Reformatting CopyNode for conv", "Float"),
        layer("CaskGemmConvolution", "wide", "Float"),
        layer("CaskConvolution", "bf", "BFloat16"),
        layer("gemm", "told by its tactic", "N/A due to dynamic shapes", "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n"),
        layer("gemm", "untold", "N/A due to dynamic shapes"),
        "a name only",
    ]
    found = audit.audit(json.dumps({"Layers": layers}))
    assert found["heavy"] == {"bf16": 1, "fp16": 3, "fp32": 1, "int8": 1, "unknown": 1} and found["layers"] == 10
    assert found["float32_layers"] == ["wide"]
    told = audit.check("unet", "fp16", found)
    assert told.startswith("6 convolutions") and told.endswith("; 1 more of unknown precision")


@pytest.mark.parametrize(
    "wanted, heavy, ok",
    [
        ("fp16", {"fp16": 5, "fp32": 5}, True),
        ("fp16", {"fp16": 4, "fp32": 5}, False),
        ("fp32", {"fp32": 5}, True),
        ("int8", {"fp16": 5}, False),
        ("int8", {"int8": 1, "fp16": 5}, True),
        ("int8", {"int8": 2, "fp32": 5}, False),
        ("fp16", {"unknown": 5}, True),
        ("fp16", {}, True),
    ],
)
def test_a_plan_that_is_mostly_float32_is_refused(wanted, heavy, ok):
    found = {"layers": 9, "heavy": heavy, "float32_layers": []}
    if ok:
        audit.check("unet", wanted, found)
    else:
        with pytest.raises(UserError, match="was to run in"):
            audit.check("unet", wanted, found)


@NEWEST
def test_the_build_of_an_fp16_graph_that_ran_in_float32_keeps_nothing(bundle_copy, edit_manifest, tensorrt):
    edit_manifest(bundle_copy, lambda data: data["components"]["vae_decoder"].update(dtype="float16"))
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(UserError, match="was to run in fp16.*in fp32"):
        build(bundle, VAE)
    assert engine_files.find(bundle) == []


@NEWEST
def test_int8_plans_must_have_int8_layers_and_are_not_refitted(bundle_copy, edit_manifest, tensorrt):
    quantised = {name: {} for name in ("recipe", "layers", "graphs", "calibration")}
    edit_manifest(bundle_copy, lambda data: data["components"]["vae_decoder"].update(int8=quantised))
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(UserError, match="was to run in int8.*in fp32"):
        build(bundle, VAE)
    with pytest.raises(UserError, match="vae_decoder is int8") as caught:
        build(bundle, VAE, options=BuildOptions(refittable=True))
    assert "--lora" in caught.value.fix
    tensorrt._world.dtype = "Int8"
    (engine_file,) = build(bundle, VAE)
    assert engine_file.record["audit"]["wanted"] == "int8"


def test_the_audit_lies_beside_the_plan(bundle, tensorrt):
    (engine_file,) = build(bundle, VAE)
    record = json.loads(engine_file.path.with_suffix(".json").read_text())
    assert record["audit"]["wanted"] == "fp32" and record["audit"]["heavy"]["fp32"] > 10


# Identity and trust: what a new user would do wrong


@NEWEST
def test_another_gpu_another_tensorrt_another_system(bundle, tensorrt):
    build(bundle, VAE)
    (engine_file,) = engine_files.find(bundle)
    now = here(tensorrt)
    for other, reason in (
        (engine_files.Here("9.9.9", now.gpu, now.compute_capability), "TensorRT"),
        (engine_files.Here(now.tensorrt, "Other GPU", now.compute_capability), "Other GPU"),
        (engine_files.Here(now.tensorrt, now.gpu, "8.6"), "8.6"),
        (engine_files.Here(now.tensorrt, now.gpu, now.compute_capability, "Windows AMD64"), "Windows"),
    ):
        found = preflight.check(bundle, engine_file, other)
        assert not found.ok and reason in found.reason and found.fix.startswith(f"accel build {bundle.path}")


@NEWEST
def test_the_command_that_helps_builds_the_same_plan_again(bundle, tensorrt, edit_manifest):
    """Its profiles and options, for this GPU; profiles only as far as the bundle still takes them."""
    options = BuildOptions(optimization_level=0, workspace=1 << 20, refittable=True)
    (engine_file,) = build(bundle, VAE, profiles=["batch=1,size=64", "batch=1-2,size=64-96"], options=options)
    command = ["accel", "build", str(bundle.path), "--components", "vae_decoder"]
    given = ["--optimization-level", "0", "--workspace", "1048576", "--refittable"]
    other = engine_files.Here("9.9.9", "Fake GPU", "9.0")
    words = shlex.split(preflight.check(bundle, engine_file, other).fix)
    assert words == [*command, "--profile", "batch=1,size=64", "--profile", "batch=1-2,size=64-96", *given]
    engine_file.path.unlink()
    assert main(words[1:]) == 0
    again = engine_files.find(bundle)[0]
    assert again.key == engine_file.key

    narrowed = lambda data: data["components"]["vae_decoder"]["dims"]["images"].update(max=1)  # noqa: E731
    edit_manifest(bundle.path, narrowed)
    assert shlex.split(preflight.check(Bundle.open(bundle.path), again, other).fix) == [*command, *given]
    trust.key_file().unlink()  # a stranger's record is not repeated
    assert preflight.check(bundle, again, other).fix.startswith(" ".join(command) + "   (or,")


@NEWEST
def test_what_compatible_plans_take(bundle, tensorrt):
    now = here(tensorrt)
    build(bundle, VAE, options=BuildOptions(version_compatible=True, hardware_compatible="ampere_plus"))
    (engine_file,) = engine_files.find(bundle)
    major = int(now.tensorrt.split(".")[0])

    def ok(version, capability="8.6"):
        return preflight.check(bundle, engine_file, engine_files.Here(version, "Other GPU", capability)).ok

    assert ok(f"{major}.99.0") and ok(f"{major + 1}.0.0") and not ok(f"{major + 2}.0.0") and not ok(f"{major}.0.0")
    assert not ok(now.tensorrt, "7.5")


@NEWEST
def test_a_flipped_byte(bundle, tensorrt):
    (engine_file,) = build(bundle, VAE)
    data = bytearray(engine_file.path.read_bytes())
    data[len(data) // 2] ^= 1
    engine_file.path.write_bytes(data)
    assert "changed after it was built" in verdict(bundle, tensorrt).reason
    engine_file.path.write_bytes(data[:-1])
    assert "bytes where" in verdict(bundle, tensorrt).reason
    engine_file.path.unlink()
    with pytest.raises(UserError, match="no TensorRT engine file"):
        preflight.choose(bundle, "vae_decoder", here(tensorrt))


@NEWEST
def test_contents_are_read_once_and_only_of_plans_that_fit(bundle, tensorrt, monkeypatch):
    import accel

    read, changed = [], preflight.changed
    monkeypatch.setattr(
        preflight, "changed", lambda engine_file, *data: read.append(engine_file.key) or changed(engine_file, *data)
    )
    (engine_file,) = build(bundle, VAE)
    other = engine_files.Here(tensorrt.__version__, "Other GPU", "9.0")
    with pytest.raises(UserError, match="it was built for Fake GPU"):
        preflight.choose(bundle, "vae_decoder", other)
    assert read == []
    assert accel.load_engine(bundle, "vae_decoder").name == "tensorrt" and read == [engine_file.key]


@NEWEST
def test_an_edited_record(bundle, tensorrt):
    (engine_file,) = build(bundle, VAE)
    path = engine_file.path.with_suffix(".json")
    whole = path.read_text()
    for change, reason in (
        (lambda r: r["identity"]["options"].update(version_compatible=True), "record was changed"),
        (lambda r: r["audit"].update(wanted="int8"), "signature"),
        (lambda r: r.update(key="0" * 32), "record was changed"),
    ):
        record = json.loads(whole)
        change(record)
        path.write_text(json.dumps(record))
        assert reason in verdict(bundle, tensorrt).reason
    path.write_text(whole)
    assert verdict(bundle, tensorrt).ok
    signature = path.with_suffix(".sig").read_text()
    for text in ("0" * 64, "", signature[:-2], "ü"):
        path.with_suffix(".sig").write_text(text)
        assert "signature" in verdict(bundle, tensorrt).reason
    path.with_suffix(".sig").unlink()
    assert "signature" in verdict(bundle, tensorrt).reason
    for lacking, change in (
        ("gpu", lambda r: r["identity"].pop("gpu")),
        ("options", lambda r: r["identity"].update(options=None)),
        ("profiles", lambda r: r["identity"].update(profiles=["one"])),
        ("name", lambda r: r["identity"]["profiles"][0].pop("name")),
        ("sha256", lambda r: r["plan"].pop("sha256")),
    ):
        record = json.loads(whole)
        change(record)
        path.write_text(json.dumps(record))
        (found,) = engine_files.find(bundle)
        assert isinstance(found, UserError) and f"is damaged: it lacks {lacking}" in found.message
        assert main(["inspect", str(bundle.path), "--no-verify"]) == main(["trust", str(bundle.path)]) == 0
    newer = whole.replace('"schema": 1', '"schema": 2')
    for text, reason in (("no json", "damaged"), ("[]", "damaged"), (newer, "newer")):
        path.write_text(text)
        with pytest.raises(UserError, match=reason):
            preflight.choose(bundle, "vae_decoder", here(tensorrt))


@NEWEST
def test_a_bundle_that_was_exported_again_has_stale_plans(bundle_copy, tensorrt, edit_manifest):
    build(Bundle.open(bundle_copy), VAE)
    for name, reason in (("model.onnx", "another ONNX graph"), ("model.safetensors", "weights")):
        original = (bundle_copy / "accel.json").read_text()
        edit_manifest(bundle_copy, lambda data, name=name: data["files"][f"vae_decoder/{name}"].update(sha256="0" * 64))
        found = verdict(Bundle.open(bundle_copy), tensorrt)
        assert reason in found.reason and "accel build" in found.fix
        (bundle_copy / "accel.json").write_text(original)
    edit_manifest(bundle_copy, lambda data: data["exporter"].update(opset=23))
    assert "another exporter" in verdict(Bundle.open(bundle_copy), tensorrt).reason


@NEWEST
def test_a_plan_from_elsewhere_runs_only_after_trust(bundle, tensorrt, capsys):
    (engine_file,) = build(bundle, VAE)
    trust.key_file().unlink()  # as if another user had built it
    assert "not built by you" in verdict(bundle, tensorrt).reason
    build(bundle, ("text_encoder",))  # makes a key of our own
    assert "not built by you" in verdict(bundle, tensorrt).reason and "accel trust" in verdict(bundle, tensorrt).fix
    assert main(["trust", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert engine_file.record["plan"]["sha256"] in shown and "--yes" in shown and not verdict(bundle, tensorrt).ok
    assert main(["trust", str(bundle.path), "--yes"]) == 0
    assert verdict(bundle, tensorrt).ok
    assert "signed by you already" in (main(["trust", str(bundle.path)]), capsys.readouterr().out)[1]


@NEWEST
def test_trust_signs_the_text_that_it_shows(bundle, tensorrt, capsys, monkeypatch):
    """Somebody who may write the bundle exchanges the record while it is looked at."""
    (engine_file,) = build(bundle, VAE)
    trust.key_file().unlink()
    path, changed = engine_file.path.with_suffix(".json"), preflight.changed
    whole = path.read_bytes()

    def meanwhile(found, data=None):
        path.write_bytes(whole.replace(b'"Fake GPU"', b'"Other GPU"'))
        return changed(found, data)

    monkeypatch.setattr(preflight, "changed", meanwhile)
    assert main(["trust", str(bundle.path), "--yes"]) == 0
    assert "Fake GPU" in capsys.readouterr().out and not preflight.trusted(engine_files.find(bundle)[0])
    path.write_bytes(whole)
    assert preflight.trusted(engine_files.find(bundle)[0])


@NEWEST
def test_trust_does_not_sign_what_is_damaged(bundle, tensorrt):
    (engine_file,) = build(bundle, VAE)
    trust.key_file().unlink()
    engine_file.path.write_bytes(engine_file.path.read_bytes()[:-1] + b"x")
    assert main(["trust", str(bundle.path), "--yes"]) == 1
    assert not preflight.trusted(engine_files.find(bundle)[0])


@NEWEST
def test_a_text_file_named_plan_and_a_folder_that_others_may_write(bundle, tensorrt):
    folder = bundle.path / "engines" / "whatever"
    folder.mkdir(parents=True)
    (folder / "vae_decoder.plan").write_text("hello")
    with pytest.raises(UserError, match="accel did not build it"):
        preflight.choose(bundle, "vae_decoder", here(tensorrt))
    (folder / "vae_decoder.plan").unlink()
    (engine_file,) = build(bundle, VAE)
    for place, mode in ((engine_file.path.parent, 0o777), (engine_file.path.parent, 0o775), (engine_file.path, 0o664)):
        before = place.stat().st_mode
        place.chmod(mode)
        assert "others can write" in verdict(bundle, tensorrt).reason
        place.chmod(before)
    assert verdict(bundle, tensorrt).ok


@NEWEST
def test_a_plan_is_private_where_new_folders_are_not(bundle, tensorrt):
    before = os.umask(0o002)
    try:
        build(bundle, VAE)
    finally:
        os.umask(before)
    assert verdict(bundle, tensorrt).ok


@NEWEST
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to somebody else")
def test_a_plan_of_another_user_is_not_loaded(bundle, tensorrt):
    (engine_file,) = build(bundle, VAE)
    os.chown(engine_file.path, 12345, -1)
    found = verdict(bundle, tensorrt)
    assert "another user" in found.reason and found.fix.startswith("cp -r")


@NEWEST
def test_a_plan_behind_a_link_is_refused(bundle, tensorrt, tmp_path):
    (engine_file,) = build(bundle, VAE)
    elsewhere = tmp_path / "elsewhere"
    engine_file.path.parent.rename(elsewhere)
    engine_file.path.parent.symlink_to(elsewhere)
    with pytest.raises(UserError, match="symbolic link"):
        preflight.choose(bundle, "vae_decoder", here(tensorrt))


@NEWEST
def test_the_key_is_private_and_made_once(tensorrt):
    first = trust.sign(b"a")
    assert trust.key_file().stat().st_mode & 0o777 == 0o600 and trust.sign(b"a") == first
    assert trust.signed(b"a", first) and not trust.signed(b"b", first) and not trust.signed(b"a", "")
    trust.key_file().chmod(0o644)
    with pytest.raises(UserError, match="read or written by others"):
        trust.sign(b"a")


# The command line


@NEWEST
def test_the_verbs(bundle, tensorrt, capsys, monkeypatch):
    assert main(["build", str(bundle.path), "--components", "vae_decoder", "--workspace", "256M"]) == 0
    told = capsys.readouterr()
    assert "--engine auto --prompt" in told.out and "building needs" in told.err
    assert main(["inspect", str(bundle.path), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["plans"]
    assert entry["ok"] and entry["reason"] == "fits"
    assert main(["build", str(bundle.path), "--components", "nothing"]) == 1
    assert "has no component" in capsys.readouterr().err
    assert main(["build", str(bundle.path), "--components", "vae_decoder", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["identity"]["options"]["workspace"] is None


@NEWEST
def test_only_plans_that_fit_make_a_bundle_ready(bundle_copy, edit_manifest, tensorrt, fakes, monkeypatch, capsys):
    edit_manifest(
        bundle_copy,
        lambda data: data.update(
            components={name: c for name, c in data["components"].items() if name in ("text_encoder", *VAE)}
        ),
    )
    (engine_file,) = build(Bundle.open(bundle_copy), VAE)
    engine_file.path.write_bytes(b"hello")
    command = ["build", str(bundle_copy), "--components"]
    assert main([*command, "text_encoder"]) == 0 and "--engine auto --prompt" in capsys.readouterr().out
    assert main([*command, "vae_decoder"]) == 0 and "--engine tensorrt --prompt" in capsys.readouterr().out
    monkeypatch.setattr(fakes("cuda").Cuda, "names", ("Fake GPU", "Fake GPU"))
    assert main([*command, "vae_decoder", "--gpu", "1"]) == 0
    assert "--engine tensorrt --device cuda:1 --prompt" in capsys.readouterr().out


@NEWEST
def test_build_options_are_checked_before_an_export(tensorrt, tmp_path, capsys):
    command = ["export", str(tmp_path / "no model"), str(tmp_path / "out"), "--engine", "tensorrt"]
    assert main([*command, "--optimization-level", "6"]) == 1
    assert "use 0 (fast build) to 5" in capsys.readouterr().err
    assert main([*command, "--precision", "int8", "--refittable"]) == 1
    assert "leave out --refittable" in capsys.readouterr().err


@NEWEST
def test_an_export_with_plans_at_once(sd15, tensorrt, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", str(sd15), str(out), "--components", "text_encoder", "--profile", "batch=1-2,size=64"]
    assert main([*command, "--engine", "tensorrt", "--refittable"]) == 0
    assert "text_encoder: building needs" in capsys.readouterr().err
    (engine_file,) = engine_files.find(Bundle.open(out))
    assert engine_file.identity["options"]["refittable"] and engine_file.identity["profiles"][0]["shapes"]["input_ids"][
        2
    ] == [2, 77]
