"""What an image and a step of training ask of a GPU, counted on a CPU. No time is measured.

    python benchmarks/gpu_counts.py --write      # benchmarks/gpu-counts.json, and the tables of docs/gpu.md

Of a step of training `gpu_traffic.py` follows where each tensor lies.

Launches are the operations of torch that compute or copy (views are none); a CUDA graph, and a run of ONNX Runtime, is
one. Uploads are values of the host that become tensors, each of which waits for the device; waits are values that are
read back, and synchronisations. Of an image they are counted from its first step to its last, where the device has to
be kept busy. CUDA is the test suite's fake, which records operations and replays them on the same memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu_traffic
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "fakes"))
WAYS = (("eager", "off"), ("eager", "step"), ("eager", "loop"), ("onnxruntime", "off"))
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
    import cuda as fake
    import numpy as np

    import accel
    from accel import images
    from accel.arrays import to_host

    options = _on_the_fake(engine, how, fake)
    pipe = accel.load(model, engine, text_cache=0, **options)
    call = dict(prompt="a handwritten seven", seed=7)
    expected = pipe(output_type="np", **call)
    unet, left, marks, counts = pipe.engines["unet"], [], [], Counts()
    array, run = unet.array, unet.run
    inside = _count_replays(pipe)

    def arrays(value: Any) -> Any:
        counts.uploads += isinstance(value, np.ndarray)
        return array(value)

    def runs(feeds: Any) -> Any:
        marks.append(_state(counts, inside, fake.Cuda.waits))
        counts.launches += engine == "onnxruntime"
        return run(feeds)

    unet.array, unet.run = arrays, runs
    images.to_host = lambda x: left.append(x.nbytes) or to_host(x)
    before = fake.Cuda.waits
    with counts:
        made = pipe(**call)
    images.to_host = to_host
    assert np.array_equal(np.asarray(made.images[0]), (expected.images[0] * 255).round().astype(np.uint8))
    total = _state(counts, inside, fake.Cuda.waits - before)
    steps = [(b - a) / (len(marks) - 1) for a, b in zip(marks[0], marks[-1], strict=True)] if marks else [0, 0, 0]
    return {
        "engine": engine,
        "how": how,
        "launches": total[0],
        "a_step": dict(zip(("launches", "uploads", "waits"), steps, strict=True)),
        "bytes_out": sum(left),
    }


def _on_the_fake(engine: str, how: str, fake: Any) -> dict[str, Any]:
    """Let an engine take the fake for a GPU; its options."""
    from importlib import import_module

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
        "one turn of the generator in two steps. Before: commit faa0bab. `python benchmarks/gpu_counts.py --write`",
    ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "write benchmarks/gpu-counts.json and docs/gpu.md's tables"
    parser.add_argument("--write", action="store_true", help=text)
    args = parser.parse_args()
    from accel.export import export_pipeline
    from accel.models.source import open_source

    earlier = json.loads((HERE / "gpu-counts.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_pipeline(
            open_source("digits/4step"), bundle, profile="digits", components=("text_encoder", "unet", "vae_decoder")
        )
        rows = [image(engine, how, str(bundle) if engine == "onnxruntime" else "digits/4step") for engine, how in WAYS]
    document = {
        "command": "python benchmarks/gpu_counts.py --write",
        "torch": version("torch"),
        "rows": rows,
        "training": [training(method) for method in METHODS],
        "training_before": earlier["training_before"],
        "before": earlier.get("before", earlier["rows"]),
    }
    print(table(document))
    if args.write:
        import pages

        (HERE / "gpu-counts.json").write_text(json.dumps(document, indent=1) + "\n")
        pages.put(HERE.parent / "docs/gpu.md", "gpu-counts", table(document))


if __name__ == "__main__":
    main()
