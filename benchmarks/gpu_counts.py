"""What an image and a step of training ask of a GPU, counted on a CPU. No time is measured.

    python benchmarks/gpu_counts.py --before out/before-queue --write    # gpu-counts.json, tables of docs/gpu.md

Launches are the operations of torch that compute or copy (views are none); a CUDA graph, and a run of ONNX Runtime or
of a TensorRT engine, is one. Uploads are values of the host that become tensors, each of which waits for the device;
waits are values that are read back, and synchronisations. Of an image they are counted from its first step to its last,
where the device has to be kept busy. CUDA and TensorRT are the test suite's fakes, which record operations and replay
them on the same memory. What torch's compiler makes of a step is counted in the code that it writes for a CPU: its own
kernels, and those of torch that it calls.
Of a step of training `gpu_traffic.py` follows where each tensor lies.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import earlier_commit
import gpu_traffic
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
WAYS = [(engine, how) for engine in ("eager", "tensorrt") for how in ("off", "step", "loop")] + [("onnxruntime", "off")]
BEFORE = "a236794"  # before ONNX Runtime's runs on CUDA were queued on a stream
METHODS = ("tiny", "dmd2")
STEPS = 6  # of a training; what comes before the second and in the last is not counted
_UPLOADS, _WAITS = ("aten::lift_fresh",), ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")


class Counts(TorchDispatchMode):
    """Counts while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.uploads = self.waits = 0
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        aliases = [one.alias_info for one in func._schema.returns]
        view = any(one is not None and not one.is_write for one in aliases)
        self.uploads += name in _UPLOADS
        self.waits += name in _WAITS
        self.launches += not view and "empty" not in name and name not in (*_UPLOADS, *_WAITS)
        return func(*args, **(kwargs or {}))

    @property
    def now(self) -> tuple[int, int, int]:
        return self.launches, self.uploads, self.waits


def image(engine: str, how: str, model: str) -> dict[str, Any]:
    """The counts of one image after a first one."""
    import accel

    fake = _tests()._fake("cuda")
    options = _on_the_fake(engine, how, fake, model)
    pipe = accel.load(model, engine, text_cache=0, **options)
    launch = {"onnxruntime": "run", "tensorrt": "execute"}.get(engine, "")
    return {"engine": engine, "how": how} | _one_image(pipe, lambda: fake.Cuda.waits, launch)


def _one_image(pipe: Any, waits: Callable[[], int], launch: str) -> dict[str, Any]:
    """The counts of a pipeline's second image.

    Args:
        waits: how often somebody has waited so far.
        launch: the method of an engine whose call is one launch; "" where torch's operations are.
    """
    import numpy as np

    from accel import images
    from accel.arrays import to_host

    call = dict(prompt="a handwritten seven", seed=7)
    expected = pipe(output_type="np", **call)
    unet, left, marks, counts = pipe.engines["unet"], [], [], Counts()
    array, run = unet.array, unet.run
    inside = _count_replays(pipe)

    def arrays(value: Any) -> Any:
        counts.uploads += isinstance(value, np.ndarray)
        return array(value)

    def runs(feeds: Any) -> Any:
        marks.append(_state(counts, inside, waits()))
        return run(feeds)

    unet.array, unet.run = arrays, runs
    for one in pipe.engines.values() if launch else ():
        setattr(one, launch, _counted(counts, getattr(one, launch)))
    images.to_host = lambda x: left.append(x.nbytes) or to_host(x)
    before = waits()
    with counts:
        made = pipe(**call)
    images.to_host = to_host
    assert np.array_equal(np.asarray(made.images[0]), (expected.images[0] * 255).round().astype(np.uint8))
    total = _state(counts, inside, waits() - before)
    steps = [(b - a) / (len(marks) - 1) for a, b in zip(marks[0], marks[-1], strict=True)] if marks else [0, 0, 0]
    a_step = dict(zip(("launches", "uploads", "waits"), steps, strict=True))
    return {"launches": total[0], "a_step": a_step, "bytes_out": sum(left)}


def then(work: Path) -> dict[str, Any]:
    """The counts of ONNX Runtime on CUDA by the code of `BEFORE`, whose tensors lie on the CPU here."""
    import torch

    import accel

    waited: list[int] = []
    bundle = earlier_commit.exported(work, "digits-4step", "digits/4step", "--profile", "digits")
    pipe = accel.load(bundle.path, "onnxruntime", io_binding=True, threads=1)
    torch.cuda.current_stream = lambda *_: SimpleNamespace(synchronize=lambda: waited.append(1))  # type: ignore
    for engine in pipe.engines.values():
        engine.session, engine.on_gpu = _OnTheCpu(engine.session, waited), True
    return {"engine": "onnxruntime", "how": "off"} | _one_image(pipe, lambda: len(waited), "run")


class _OnTheCpu:
    """A session whose callers say that their tensors are on a GPU; a run of it waits for ONNX Runtime's own stream."""

    def __init__(self, session: Any, waited: list[int]):
        self.session, self.waited = session, waited

    def io_binding(self) -> Any:
        made = self.session.io_binding()
        on_cpu = lambda bind: lambda name, device, *rest: bind(name, "cpu", *rest)  # noqa: E731
        return SimpleNamespace(made=made, bind_input=on_cpu(made.bind_input), bind_output=on_cpu(made.bind_output))

    def run_with_iobinding(self, binding: Any) -> None:
        self.waited.append(1)
        self.session.run_with_iobinding(binding.made)


def _counted(counts: Counts, function: Any) -> Any:
    def counted(*given: Any) -> Any:
        counts.launches += 1
        return function(*given)

    return counted


def _tests() -> Any:
    """The test suite's `conftest.py`, which puts its fakes in place."""
    name = "conftest"
    if name not in sys.modules:
        spec = spec_from_file_location(name, HERE.parent / "tests" / "conftest.py")
        assert spec and spec.loader
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _on_the_fake(engine: str, how: str, fake: Any, model: str) -> dict[str, Any]:
    """Let an engine take the fake for a GPU; its options."""
    if engine == "tensorrt":
        from accel.bundle import Bundle
        from accel.export.tensorrt.build import build

        if "tensorrt" not in sys.modules:
            _tests()._install_fake_tensorrt("11.4", pytest.MonkeyPatch(), Path(model).with_name("cache"))
        build(Bundle.open(model), ("text_encoder", "unet", "vae_decoder"))
        return {"cuda_graph": how}
    module = import_module(f"accel.engines.{engine}")
    module.Cuda = fake.Cuda
    if engine != "onnxruntime":
        return {"device": "cpu"} if how == "off" else {"cuda_graph": how}
    from accel.providers.built_in import PROVIDERS
    from accel.providers.route import Route

    class OnFake(Route):
        def open(self, file: Any, session_options: Any, **more: Any) -> Any:
            import onnxruntime

            return onnxruntime.InferenceSession(file, session_options, providers=[PROVIDERS["cpu"]], **more)

    module.find = lambda *_: OnFake("cuda", PROVIDERS["cpu"], "cuda:0", ((PROVIDERS["cuda"], {}),))
    return {}


def _state(counts: Counts, inside: dict[str, int], waits: int) -> tuple[int, int, int]:
    """What a replay on the fake does again, operation by operation, is one launch on a GPU."""
    launches, uploads, read = counts.now
    return launches - inside["operations"] + inside["graphs"], uploads, read + waits


def _count_replays(pipe: Any) -> dict[str, int]:
    """Counts the graphs that are replayed, and their operations."""
    found = {"graphs": 0, "operations": 0}
    for name in ("unet", "vae_decoder"):
        graphs = getattr(getattr(pipe.engines[name], "_local", None), "graphs", None)
        for graph in graphs._kept.values() if graphs else ():

            def replayed(replay: Any = graph.replay) -> None:
                found["graphs"] += 1
                with Counts() as own:
                    replay()
                found["operations"] += own.launches

            graph.replay = replayed
    return found


def compiled(model: str) -> list[dict[str, Any]]:
    """The kernels of one call of the UNet, by torch.compile and by AOTInductor, in their code for a CPU."""
    from torch._inductor.utils import run_and_get_code

    import accel
    from accel.bundle import Bundle
    from accel.export.aoti.build import build
    from accel.export.graph.trace import example

    unet = accel.load_engine(model, "unet", "compile", device="cpu")
    feeds = example(unet.component.inputs, {name: limits.opt for name, limits in unet.component.dims.items()})
    _, codes = run_and_get_code(lambda: unet(**feeds))
    (file,) = build(Bundle.open(model), ("unet",), device="cpu")
    with zipfile.ZipFile(file.path) as packed:
        sources = [packed.read(name).decode() for name in packed.namelist() if name.endswith("wrapper.cpp")]
    return [
        {"engine": name, "own": sum(map(_own, found)), "torchs": sum(map(_torchs, found))}
        for name, found in (("compile", codes), ("aoti", sources))
    ]


def _own(code: str) -> int:
    """Calls of kernels that the compiler wrote: in Python `cpp_fused_add_0(...)`, in C++ too."""
    return len(re.findall(r"^\s+cpp_fused_\w+\(", code, re.M))


def _torchs(code: str) -> int:
    """Calls of torch's kernels."""
    python = r"^\s+(?:\w+ = )?(?:extern_kernels|torch\.ops)\.[\w.]+\("
    return len(re.findall(rf"{python}|AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_cpu_\w+\(", code, re.M))


def training(method: str) -> dict[str, Any]:
    """The counts of one step of training the digits from a cache, data and logs included, as a GPU's defaults are."""
    from accel.distill import recipes, settings

    common = dict(model="digits", data="digits", resolution=64, steps=STEPS, batch=4, log="none")
    common |= dict(random_flip=False, sample_every=0, mixed_precision="no", warmup=0, ema=0.99)
    common |= dict(workers=1, fused="on")
    if method == "dmd2":
        recipe = recipes.changed(settings.DMD2Recipe(), **common, ratio=2)
    else:
        recipe = recipes.changed(recipes.sd15_tiny(), **common, accumulation=1)
    with tempfile.TemporaryDirectory() as folder:
        return {"method": method, "a_step": gpu_traffic.a_step(recipe, Path(folder) / "out", STEPS)}


def table(document: dict[str, Any]) -> str:
    head = "| engine | `--cuda-graph` | launches a step | uploads | waits | launches of the image | bytes that leave |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in document["rows"]:
        cells = [row["engine"], row["how"]]
        cells += ["one for all" if row["how"] == "loop" else _number(row["a_step"]["launches"])]
        cells += [_number(row["a_step"][key]) for key in ("uploads", "waits")]
        lines.append(f"| {' | '.join([*cells, str(row['launches']), str(row['bytes_out'])])} |")
    earlier = ", ".join(f"{row['how']} {row['uploads_between_steps']}" for row in document["before"])
    lines += ["", "`digits/4step`, one image of 64 px in four steps."]
    lines += [f"Uploads between its steps on eager before noise went up once: {earlier}."]
    if old := document["onnxruntime_before"]:
        counts = ", ".join(f"{name} {_number(count)}" for name, count in old["a_step"].items())
        lines += [f"A step of ONNX Runtime before its runs were queued on a stream ({BEFORE}): {counts}."]
    lines += ["", "| a step by torch's compiler | its own kernels | torch's kernels |", "|---|---|---|"]
    lines += [f"| {row['engine']} | {row['own']} | {row['torchs']} |" for row in document["compiled"]]
    lines += [
        "",
        "| a step of training | launches | uploads | copies ahead | waits | draws |",
        "|---|---|---|---|---|---|",
    ]
    for title, key in ((" before", "training_before"), ("", "training")):
        for row in document[key]:
            lines.append(f"| {row['method']}{title} | {' | '.join(map(_number, row['a_step'].values()))} |")
    lines += [
        "",
        "Batch 4 of the digits from a cache, in float32 on a CPU, averages included, without the optimizer; dmd2 with "
        "one turn of the generator in two steps. Before: commit faa0bab.",
        "`python benchmarks/gpu_counts.py --before out/before-queue --write`",
    ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "write benchmarks/gpu-counts.json and docs/gpu.md's tables"
    parser.add_argument("--write", action="store_true", help=text)
    text = f"folder for a checkout of {BEFORE}, to count ONNX Runtime on the code of then (default: as counted before)"
    parser.add_argument("--before", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--then", type=Path, help=argparse.SUPPRESS)  # that, in this process
    args = parser.parse_args()
    if args.then:
        print(json.dumps(then(args.then)))
        return
    from accel.export import export_pipeline
    from accel.machine import machine_name
    from accel.models.source import open_source

    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a cached network has no code
    earlier = json.loads((HERE / "gpu-counts.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_pipeline(
            open_source("digits/4step"), bundle, profile="digits", components=("text_encoder", "unet", "vae_decoder")
        )
        rows = [image(engine, how, "digits/4step" if engine == "eager" else str(bundle)) for engine, how in WAYS]
        code = compiled(str(bundle))
    if args.before:
        earlier_commit.check_out(BEFORE, args.before)
        earlier["onnxruntime_before"] = earlier_commit.told(Path(__file__), args.before, "--then")
    document = {
        "command": "python benchmarks/gpu_counts.py --before out/before-queue --write",
        "machine": machine_name(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "onnxruntime")},
        "rows": rows,
        "compiled": code,
        "training": [training(method) for method in METHODS],
        "training_before": earlier["training_before"],
        "before": earlier.get("before", earlier["rows"]),
        "onnxruntime_before": earlier.get("onnxruntime_before"),
    }
    print(table(document))
    if args.write:
        import pages

        (HERE / "gpu-counts.json").write_text(json.dumps(document, indent=1) + "\n")
        pages.put(HERE.parent / "docs/gpu.md", "gpu-counts", table(document))


if __name__ == "__main__":
    main()
