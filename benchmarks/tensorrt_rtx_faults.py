"""The ten faults that a fake TensorRT had hidden, each shown by the real library on the commit before they were mended.

    python benchmarks/tensorrt_rtx_faults.py out/before --write       # a few minutes, no GPU

`out/before` becomes a checkout of that commit. Each probe is the essence of a test of today, run on the code of then:
NVIDIA's real parser and builder stand in for `tensorrt`, under a version that this code takes, and the layers are
listings that the real builder has printed. `--write` makes `tensorrt-rtx-faults.json` and the table of
`docs/tensorrt-rtx.md`. A probe that finds no fault fails.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import earlier_commit

LISTINGS = earlier_commit.ROOT / "tests" / "export" / "tensorrt" / "listings"
REAL, LAYERS = "test_real_builder.py", "test_layers.py"

# Number -> what was wrong, and the tests of tests/export/tensorrt/ that show it.
KNOWN = {
    1: ("the audit reads no datatype", [f"{LAYERS}::test_every_layer_that_does_the_work_is_counted"]),
    2: ("the audit misses layers", [f"{LAYERS}::test_every_quantised_layer_of_the_shipped_digits_runs_in_int8"]),
    3: ("attention nodes without a kernel", [f"{REAL}::test_without_taking_attention_apart_such_a_build_fails"]),
    4: ("Ctrl-C while it compiles", [f"{REAL}::test_ctrl_c_and_kill_in_the_midst_of_compiling_leave_nothing"]),
    5: (
        "the fix of --version-compatible",
        [f"{REAL}::test_options_that_it_ignores_or_cannot_do_are_refused_before_anything_is_built"],
    ),
    6: ("errors of the parser", [f"{REAL}::test_the_parser_says_what_it_refuses_and_where"]),
    7: ("warnings, and options that are ignored", ["test_build.py::test_warnings_of_a_build_that_succeeds_are_kept"]),
    8: (
        "a damaged timing cache",
        ["test_timing_cache.py::test_the_timing_cache_is_one_file_per_gpu_and_version_and_only_grows"],
    ),
    9: ("a machine without a driver", ["test_failures.py::test_an_engine_that_does_not_load_is_told_with_its_cause"]),
    10: ("the memory of fused attention", ["test_memory.py::test_fused_attention_keeps_no_scores"]),
}


# What follows runs on the code of then.


def _blind(work: Path) -> str:
    """Float32 layers of the shipped digits, as of a float16 graph."""
    from accel.export.tensorrt import audit

    counts = audit.audit(_inspector("4step-vae_decoder-", "Datatype"))
    line = audit.check("vae_decoder", "fp16", counts)  # an engine all in float32 passes
    assert set(counts["heavy"]) <= {"unknown"}
    return f"a float16 graph that was built in float32 passes: {counts['heavy']}: {line!r}"


def _misses(work: Path) -> str:
    """The digits UNet, all 242 quantised layers of which run in int8, with the key of the datatype mended."""
    from accel.export.tensorrt import audit

    counts = audit.audit(_inspector("digits-int8-unet-int8", "Format/Datatype"))
    return f"242 of 242 nodes in int8: {_error(lambda: audit.check('unet', 'int8', counts))}"


def _attention(work: Path) -> str:
    from accel.export.tensorrt import operators

    bundle = earlier_commit.exported(
        work, "opset23", "digits/tiny", "--profile", "digits", "--precision", "fp16", "--opset", "23"
    )
    problems = operators.check(bundle.path / "unet" / "model.onnx")
    assert not problems
    return f"inspect: {len(problems)} problems; build: {_error(lambda: _build(bundle, 'unet'))}"


def _interrupted(work: Path) -> str:
    """Ctrl-C once the compiler is at work; how long the build goes on."""
    program = [sys.executable, __file__, str(work), "--build", "unet"]
    child = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)
    import psutil

    process = psutil.Process(child.pid)
    assert child.stdout and any("compiling" in line for line in child.stdout)
    begun = process.cpu_times().user
    while process.cpu_times().user < begun + 3:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    pressed = process.cpu_times().user
    spent = pressed
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        spent = process.cpu_times().user
        time.sleep(0.05)
    child.wait()
    assert spent - pressed > 1
    return f"Ctrl-C, and it computes for {spent - pressed:.1f} CPU seconds more"


def _lean(work: Path) -> str:
    return _error(lambda: _build(_digits(), "text_encoder", version_compatible=True))


def _parser(work: Path) -> str:
    import onnx

    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2, 2]) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Det", ["x"], ["y"], name="bad")], "g", [x], [y])
    path = work / "det.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)
    from accel.export.tensorrt import build

    _library()
    build.graph_file = lambda *_: path
    told = _error(lambda: _build(_digits(), "text_encoder"))
    assert "unsupported" not in told.lower()
    return told


def _warned(work: Path) -> str:
    """The engine is taken for loaded, because that needs a driver: what the record then holds."""
    from accel.export.tensorrt import build
    from accel.trt import library

    seen: list[str] = []
    make = library._make_logger

    def watched(module: Any) -> Any:
        log = make(module)
        told, severity = log.log, module.ILogger.Severity.WARNING
        log.log = lambda kind, text: (seen.append(text) if kind == severity else None, told(kind, text))[1]
        return log

    library._make_logger = watched
    _library()
    build._inspect = lambda *_: _inspector("digits-int8-vae_decoder-int8", "Format/Datatype")
    (file,) = _build(_digits(), "text_encoder", hardware_compatible="ampere_plus")
    kept, level = file.record.get("warnings"), file.identity["options"]["hardware_compatible"]
    assert seen and kept is None and level == "ampere_plus"
    ignored = next((line for line in seen if "hardware" in line.lower()), seen[0])
    return (
        f"{len(seen)} warnings ({ignored.strip()[:110]!r}), none in the record, which says hardware_compatible={level}"
    )


def _timings(work: Path) -> str:
    """What a garbage file does to a build's configuration."""
    from accel.export.tensorrt import timing_cache

    module = _library()
    path = work / "garbage.timing"
    path.write_bytes(b"no timing cache" * 9)
    from accel.trt import library

    builder = module.Builder(library.logger(module))
    config = builder.create_builder_config()
    given = config.create_timing_cache(path.read_bytes())
    taken = config.set_timing_cache(given, ignore_mismatch=False)
    timing_cache.load(config, path)
    assert given is not None and taken
    kind = type(given).__name__
    return f"create_timing_cache(garbage) is an {kind}, set_timing_cache says {taken}: no file is ever refused"


def _driver(work: Path) -> str:
    return _error(lambda: _build(_digits(), "text_encoder"))


def _scores(work: Path) -> str:
    """float16 attention of eight heads of 40 over 4,096 tokens, which is one kernel."""
    import onnx
    import onnx_ir as ir

    from accel.export.tensorrt import memory

    path = work / "attention.onnx"
    onnx.save(attention(), path)
    read, memory.graph_file = ir.load, lambda *_: path
    estimated = memory.peak(None, None, {})
    assert read is ir.load
    return f"eight heads of 40 over 4,096 tokens: {estimated / 1e6:,.0f} MB"


def attention() -> Any:
    """The graph of one float16 attention, [1, 8, 4096, 40], written as products and a softmax."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    shape, half = [1, 8, 4096, 40], TensorProto.FLOAT16
    q, k, v, y = (helper.make_tensor_value_info(name, half, shape) for name in ("q", "k", "v", "y"))
    nodes = [
        helper.make_node("Mul", ["q", "scale"], ["scaled"], name="scale_q"),
        helper.make_node("Transpose", ["k"], ["keys"], name="turn", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["scaled", "keys"], ["scores"], name="product"),
        helper.make_node("Softmax", ["scores"], ["weights"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["y"], name="mix"),
    ]
    scale = numpy_helper.from_array(np.array(40**-0.5, np.float16), "scale")
    graph = helper.make_graph(nodes, "attention", [q, k, v], [y], [scale])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


PROBES: dict[int, Callable[[Path], str]] = {
    1: _blind,
    2: _misses,
    3: _attention,
    4: _interrupted,
    5: _lean,
    6: _parser,
    7: _warned,
    8: _timings,
    9: _driver,
    10: _scores,
}


def _library() -> Any:
    """NVIDIA's real library as a module called `tensorrt`, of a version that the code of then takes."""
    if "tensorrt" not in sys.modules:
        import ctypes
        from importlib.util import find_spec

        spec = find_spec("onnxruntime_ep_nv_tensorrt_rtx")
        assert spec and spec.origin
        for name in ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"):
            ctypes.CDLL(str(next(Path(spec.origin).parent.glob(name))), mode=ctypes.RTLD_GLOBAL)
        import tensorrt_rtx_bindings

        module = types.ModuleType("tensorrt")
        module.__dict__.update({k: v for k, v in vars(tensorrt_rtx_bindings).items() if not k.startswith("__")})
        module.__version__ = "11.4.0.106"  # type: ignore[attr-defined]
        sys.modules["tensorrt"] = module
    return sys.modules["tensorrt"]


def _build(bundle: Any, component: str, **options: Any) -> Any:
    """The build of then, on a GPU that is not there: nothing asks it before the engine is loaded."""
    from accel.export.tensorrt import build

    _library()
    gpu = types.SimpleNamespace(name="no GPU", compute_capability="8.9", memory=0, driver=None)
    cuda = types.SimpleNamespace(index=0, gpu=gpu, activate=lambda: None, release=lambda: None, free=lambda: 1 << 60)
    build.Cuda = lambda index=0: cuda
    progress = options.pop("progress", lambda stage, fraction: None)
    given = build.BuildOptions(timing_cache=False, **options)
    return build.build(bundle, [component], options=given, force=True, progress=progress)


def _digits() -> Any:
    import shutil

    from accel.assets import resolve
    from accel.bundle import Bundle

    return Bundle.open(shutil.copytree(resolve("digits/4step-int8"), Path(tempfile.mkdtemp()) / "digits"))


def _error(act: Callable[[], Any]) -> str:
    return re.sub(r"/\S+/(digits|opset23)\b", "BUNDLE", " ".join(earlier_commit.error(act).split()))


def _inspector(listing: str, key: str) -> str:
    """A real listing as the inspector's JSON, the datatype under a key."""
    return Path(os.environ["LISTINGS"], f"{listing}.{key.replace('/', '-')}.json").read_text()


# What follows runs on the code of today.


def write_listings(folder: Path) -> None:
    from accel.export.tensorrt import layers

    for name in ("4step-vae_decoder-", "digits-int8-unet-int8", "digits-int8-vae_decoder-int8"):
        read = layers.from_log([gzip.decompress((LISTINGS / f"{name}.txt.gz").read_bytes()).decode()])
        for key in ("Datatype", "Format/Datatype"):

            def tensors(found: Sequence[Any], key: str = key) -> list[dict[str, Any]]:
                return [{"Dimensions": list(tensor.shape), key: tensor.datatype} for tensor in found]

            rows = [
                {
                    "Name": layer.name,
                    "LayerType": layer.kind,
                    "Inputs": tensors(layer.inputs),
                    "Constants": tensors(layer.constants),
                    "Outputs": tensors(layer.outputs),
                    "TacticName": layer.tactic,
                    "Metadata": "".join(f"[ONNX Layer: {node}]" for node in layer.nodes),
                }
                for layer in read
            ]
            (folder / f"{name}.{key.replace('/', '-')}.json").write_text(json.dumps({"Layers": rows}))


def _activations(work: Path) -> int:
    """Bytes of activations of the attention's engine, as its builder tells them."""
    from dataclasses import asdict

    from accel.export.tensorrt.child import compile_apart
    from accel.export.tensorrt.compiler import Job
    from accel.export.tensorrt.options import BuildOptions

    path = work / "attention.onnx"
    done = compile_apart(Job("tensorrt-rtx", "attention", str(path), [], asdict(BuildOptions())), lambda *_: None)
    assert done.activations is not None
    return done.activations


FAULTS = earlier_commit.Faults(
    Path(__file__), "f7674c1", KNOWN, PROBES, earlier_commit.ROOT / "docs" / "tensorrt-rtx.md"
)


def main() -> None:
    parser = earlier_commit.parser(__doc__)
    parser.add_argument("--build", help=argparse.SUPPRESS)  # build a component of the digits, for the probe of Ctrl-C
    args = parser.parse_args()
    if args.build:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _build(_digits(), args.build, progress=lambda stage, fraction: print("compiling", stage, flush=True))
        return
    earlier_commit.run(FAULTS, args, write_listings, _builder_says, _library_of_today)


def _builder_says(number: int, work: Path) -> str:
    return f"; the builder says {_activations(work) / 1e6:,.0f} MB" if number == 10 else ""


def _library_of_today() -> dict[str, Any]:
    from accel.trt import library

    return {"library": str(library.load("tensorrt-rtx"))}


if __name__ == "__main__":
    main()
