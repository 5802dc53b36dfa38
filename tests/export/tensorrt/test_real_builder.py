"""NVIDIA's real parser and builder: TensorRT-RTX builds engine files on a machine without a GPU.

`make test` installs it (the extra `tensorrt-rtx`, Linux on x86-64); elsewhere these tests say why they are skipped.
Everything here together takes about a minute.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import onnx
import psutil
import pytest

from accel.assets import resolve
from accel.bundle import Bundle
from accel.errors import UserError
from accel.export.tensorrt import child, compiler, inspection
from accel.export.tensorrt.build import build
from accel.export.tensorrt.options import BuildOptions
from accel.trt import engine_files, library, preflight
from accel.trt.engine_files import Here

RTX = "tensorrt-rtx"
pytestmark = pytest.mark.skipif(
    library.installed(RTX) is None, reason='TensorRT-RTX is not installed: pip install "accel-diffusion[tensorrt-rtx]"'
)


@pytest.fixture
def digits(tmp_path) -> Bundle:
    """The shipped int8 digits, in a place of the test's own."""
    return Bundle.open(shutil.copytree(resolve("digits/4step-int8"), tmp_path / "digits"))


@pytest.fixture(scope="session")
def half(smallest, tmp_path_factory) -> Path:
    """The smallest pipeline in float16 at opset 23, whose attentions are one node each."""
    from accel.export.pipeline import export_pipeline

    out = tmp_path_factory.mktemp("half") / "bundle"
    export_pipeline(smallest, out, precision="fp16", opset=23, profile="batch=1-2,size=32-64")
    return out


def test_the_shipped_int8_digits_run_every_quantised_layer_in_int8(digits):
    said = []
    files = build(digits, engine=RTX, targets=["sm120", "sm86"], announce=said.append)
    shares = {file.component: file.record["audit"]["int8_share"] for file in files}
    assert shares == {"text_encoder": [12, 12], "unet": [242, 242], "vae_decoder": [22, 22]}
    assert all(file.record["audit"]["wider"] == [] for file in files)
    unet = files[1].record
    assert unet["audit"]["heavy"] == {"fp32": 114, "int8": 179} and unet["plan"]["bytes"] > 20e6
    # The estimate, made before the build, against what the builder says.
    assert 0.5 < unet["estimate"]["activations"] / unet["measured"]["activations"] < 1.5
    assert 0.5 < unet["estimate"]["host"] / unet["measured"]["host"] < 1.5
    assert any("242 of 242 int8 nodes" in line for line in said)
    found = library.load(RTX)
    identity = files[1].identity
    assert identity["targets"] == ["sm86", "sm120"] and identity["gpu"] == identity["platform"] == ""
    assert preflight.check(digits, files[1], Here.anywhere(found, ("sm86", "sm120"))).ok
    ada, blackwell = (Here(found.version, name, sm, engine=RTX) for name, sm in (("RTX 4090", "8.9"), ("5090", "12.0")))
    assert preflight.check(digits, files[1], blackwell).ok
    assert "built for sm86, sm120, here is RTX 4090 (sm89)" in preflight.check(digits, files[1], ada).reason
    digits.verify()


def test_half_precision_and_attention_nodes(half, tmp_path):
    """Opset 23 has attention as a node. For heads of 2 and 4 there is no kernel, so it has to be taken apart."""
    bundle = Bundle.open(shutil.copytree(half, tmp_path / "half"))
    (unet,) = build(bundle, ["unet"], engine=RTX)
    nodes = [
        node.op_type for node in onnx.load(bundle.path / "unet" / "model.onnx", load_external_data=False).graph.node
    ]
    assert unet.record["measured"]["attentions"] == nodes.count("Attention") > 0
    assert unet.record["audit"]["heavy"].keys() == {"fp16", "fp32"}  # the time embedding
    assert unet.record["audit"]["float32_in_graph"] == unet.record["audit"]["heavy"]["fp32"] == 2


def test_without_taking_attention_apart_such_a_build_fails(half, monkeypatch):
    """The fault that it mends, from the real library; and its error is told with a fix."""
    bundle = Bundle.open(half)
    monkeypatch.setattr(compiler, "_decomposable", lambda *_: 0)
    monkeypatch.setattr("accel.export.tensorrt.inspection.compile_apart", _in_this_process)
    answer = inspection.ask(bundle, RTX, build=True)["unet"]
    assert "is_decomposable" in answer.problems[0]["reason"] and "Begin node" not in answer.problems[0]["reason"]


def _in_this_process(job, progress):
    done = compiler.compile_graph(job, progress)
    return replace(done, data=bytes(done.data))


def test_one_layer_forced_to_float32_is_refused(half, tmp_path):
    """The builder does as the graph says, so the audit compares the graph with what the manifest says of it."""
    folder = Path(shutil.copytree(half, tmp_path / "half"))
    path = folder / "vae_decoder" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    place, kinds = list(model.graph.node).index(node), (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    wide = [
        onnx.helper.make_node("Cast", [name], [f"{name}_wide"], name=f"cast_{i}", to=kinds[0])
        for i, name in enumerate(node.input)
    ]
    back = onnx.helper.make_node("Cast", [f"{node.output[0]}_wide"], [node.output[0]], name="cast_back", to=kinds[1])
    node.input[:] = [f"{name}_wide" for name in node.input]
    node.output[0] += "_wide"
    for i, made in enumerate(wide):
        model.graph.node.insert(place + i, made)
    model.graph.node.insert(place + len(wide) + 1, back)
    onnx.save(model, path)
    bundle = _with_digests_of_today(folder)
    with pytest.raises(UserError, match="float32"):
        build(bundle, ["vae_decoder"], engine=RTX)
    assert engine_files.find(bundle) == []


def _with_digests_of_today(folder: Path) -> Bundle:
    """The bundle of a folder whose graph was changed on purpose."""
    import hashlib
    import json

    path = folder / "accel.json"
    data = json.loads(path.read_text())
    for name, entry in data["files"].items():
        content = (folder / name).read_bytes()
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    path.write_text(json.dumps(data))
    return Bundle.open(folder)


def test_the_parser_says_what_it_refuses_and_where(tmp_path):
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2, 2]) for n in "xy")
    node = onnx.helper.make_node("Det", ["x"], ["y"], name="bad")
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    path = tmp_path / "det.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)
    job = compiler.Job(RTX, "unet", str(path), what="parse")
    (problem,) = child.compile_apart(job, lambda *_: None).problems
    assert (problem["node"], problem["operator"]) == ("bad", "Det") and problem["reason"].startswith("unsupported node")
    with pytest.raises(
        UserError, match=r"cannot parse det.onnx of unet: unsupported node.*\(node bad, Det\)"
    ) as caught:
        child.compile_apart(replace(job, what="build", options=asdict(BuildOptions())), lambda *_: None)
    assert "false" not in caught.value.message.split(":")[1] and "accel inspect" in caught.value.fix


def test_inspect_asks_the_parser_and_the_builder(digits, capsys):
    from accel.cli import main

    assert main(["inspect", str(digits.path), "--engine", RTX]) == 0
    told = capsys.readouterr().out
    assert "asked: the parser of TensorRT-RTX 1." in told and "every node is one that TensorRT-RTX takes" in told
    assert not (digits.path / "engines").exists()


@pytest.mark.parametrize(
    "options, targets, message",
    [
        (BuildOptions(refittable=True), (), "cannot do --refittable here: .*no NVIDIA driver"),
        (BuildOptions(strip_plan=True), (), "cannot do --strip-plan here"),
        (BuildOptions(version_compatible=True), (), "does not take --version-compatible: its engine files belong to"),
        (BuildOptions(hardware_compatible="ampere_plus"), (), "does not take --hardware-compatible"),
        (BuildOptions(timing_cache=False), (), "does not take --no-timing-cache"),
        (BuildOptions(), ("sm90",), "does not build for sm90: it has no kernels for Hopper"),
        (BuildOptions(), ("sm99999",), "unknown target 'sm99999'|does not build"),
        (BuildOptions(), ("sm89", "sm89"), "given twice"),
    ],
)
def test_options_that_it_ignores_or_cannot_do_are_refused_before_anything_is_built(digits, options, targets, message):
    if library.has_driver() and (options.refittable or options.strip_plan):
        pytest.skip("there is a driver here")
    with pytest.raises(UserError, match=message) as caught:
        build(digits, ["vae_decoder"], engine=RTX, options=options, targets=targets)
    assert caught.value.fix and not (digits.path / "engines").exists()


def test_what_the_library_refuses_for_a_target_is_told_with_a_fix(digits):
    with pytest.raises(UserError, match="could not build vae_decoder: .*not supported") as caught:
        build(digits, ["vae_decoder"], engine=RTX, targets=["sm75"])
    assert "leave sm75 out of --targets" in caught.value.fix


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_kill_in_the_midst_of_compiling_leave_nothing(digits, how):
    """The library compiles for seconds without looking up; the child that it does so in is ended."""
    command = [sys.executable, "-c", "from accel.cli import main; import sys; sys.exit(main(sys.argv[1:]))", "build"]
    program = subprocess.Popen(
        [*command, str(digits.path), "--engine", RTX, "--components", "unet"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # pytest's own terminal gets no Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    started, compilers = time.monotonic(), []
    while not compilers and time.monotonic() - started < 60:
        time.sleep(0.05)
        compilers = [
            p for p in psutil.Process(program.pid).children(recursive=True) if "child" in " ".join(p.cmdline())
        ]
    (compiling,) = compilers
    while compiling.cpu_times().user < 3:  # the graph is read; the compiler is at work
        time.sleep(0.05)
    os.kill(program.pid, how)
    told = program.communicate(timeout=10)[1]
    assert program.returncode in (130, -signal.SIGINT, -signal.SIGKILL) and "Traceback" not in told
    try:
        compiling.wait(timeout=10)
    except psutil.NoSuchProcess:
        pass
    assert not (digits.path / "engines").exists()
    build(digits, ["text_encoder"], engine=RTX)  # and it can be started again
