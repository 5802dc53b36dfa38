"""What an image asks of a GPU, counted on a CPU: launches, uploads, bytes that leave the device. No time is measured.

    python benchmarks/gpu_counts.py --write      # benchmarks/gpu-counts.json, and the table of docs/gpu.md

Launches are the operations of torch that compute or copy (views are none), in the sampler's loop and in the decoder; a
CUDA graph is one launch, and copies what goes in and out. Uploads are host arrays that become tensors between the first
and the last step, each of which waits for the device. The graph is captured on the test suite's fake CUDA, which
records operations and replays them on the same memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "fakes"))


def counted(how: str, model: str = "digits/4step") -> dict[str, Any]:
    """The counts of one image after a first one, on eager with `cuda_graph=how`."""
    import cuda as fake
    import numpy as np
    from torch.utils._python_dispatch import TorchDispatchMode

    import accel
    from accel import images
    from accel.arrays import to_host
    from accel.engines import eager

    class Launches(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            aliases = [one.alias_info for one in func._schema.returns]
            if not any(a is not None and not a.is_write for a in aliases) and "empty" not in func.name():
                Launches.count += 1
            return func(*args, **(kwargs or {}))

    eager.Cuda = fake.Cuda
    options = {"device": "cpu"} if how == "off" else {"cuda_graph": how}
    pipe = accel.load(model, "eager", text_cache=0, **options)
    call = dict(prompt="a handwritten seven", seed=7)
    expected = pipe(output_type="np", **call)
    unet, left, events = pipe.engines["unet"], [], []
    array, run = unet.array, unet.run
    unet.array = lambda value: (events.append("up" if isinstance(value, np.ndarray) else ""), array(value))[1]
    unet.run = lambda feeds: (events.append("run"), run(feeds))[1]
    images.to_host = lambda x: left.append(x.nbytes) or to_host(x)
    replays = _count_replays(pipe)
    with Launches():
        made = pipe(**call)
    images.to_host = to_host
    assert np.array_equal(np.asarray(made.images[0]), (expected.images[0] * 255).round().astype(np.uint8))
    steps = [i for i, event in enumerate(events) if event == "run"]
    inside = events[steps[0] : steps[-1]].count("up") if steps else 0
    # What a replay on the fake does again, operation by operation, is one launch on a GPU.
    launches = Launches.count - replays["operations"] + replays["graphs"]
    return {"how": how, "launches": launches, "uploads_between_steps": inside, "bytes_out": sum(left)}


def _count_replays(pipe: Any) -> dict[str, int]:
    """Counts the graphs that are replayed, and their operations."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = {"graphs": 0, "operations": 0}

    class Inside(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            aliases = [one.alias_info for one in func._schema.returns]
            if not any(a is not None and not a.is_write for a in aliases) and "empty" not in func.name():
                found["operations"] += 1
            return func(*args, **(kwargs or {}))

    for name in ("unet", "vae_decoder"):
        for graph in getattr(pipe.engines[name]._local, "graphs", _Empty())._kept.values():

            def replayed(replay: Any = graph.replay) -> None:
                found["graphs"] += 1
                with Inside():
                    replay()

            graph.replay = replayed
    return found


class _Empty:
    _kept: dict[str, Any] = {}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| `--cuda-graph` | launches | uploads between steps | bytes that leave |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['how']} | {row['launches']} | {row['uploads_between_steps']} | {row['bytes_out']} |")
    lines += [
        "",
        "`digits/4step`, one image of 64 px in four steps on `eager`; what it uploads there is fresh noise.",
        "`python benchmarks/gpu_counts.py --write`",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/gpu-counts.json and docs/gpu.md's table")
    args = parser.parse_args()
    rows = [counted(how) for how in ("off", "step", "loop")]
    print(table(rows))
    if args.write:
        import pages

        document = {"command": "python benchmarks/gpu_counts.py --write", "torch": version("torch"), "rows": rows}
        (HERE / "gpu-counts.json").write_text(json.dumps(document, indent=1) + "\n")
        pages.put(HERE.parent / "docs/gpu.md", "gpu-counts", table(rows))


if __name__ == "__main__":
    main()
