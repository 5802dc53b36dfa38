"""Run a compiler's job in a process of its own, which can be ended at any moment.

TensorRT compiles for many seconds without looking up, so neither Ctrl-C nor a cancel through its progress monitor ends
a build in time, and a crash or lack of memory in it would take the caller along. The child gets its job on its
standard input, and ends when that closes: also when its parent was killed. It answers on a pipe with lines of JSON, and
with the engine's bytes after the last of them, so that there is no file to leave behind.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from accel import interrupt
from accel.errors import UserError

from . import layers
from .compiler import Compiled, Job, compile_graph

Progress = Callable[[str, float], None]
COMMAND = (sys.executable, "-m", "accel.export.tensorrt.child")
_EVERY = 0.1  # seconds between two reports of progress


def compile_apart(job: Job, progress: Progress) -> Compiled:
    """`compile_graph` in a child process; a Ctrl-C here ends it at once, and nothing of it is left.

    Raises:
        UserError: what the child raised; or that it ended without a result, with the reason as far as it is known.
    """
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        assert child.stdin and child.stdout
        answers: queue.SimpleQueue = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(child.stdout, answers), name="tensorrt-build", daemon=True)
        try:
            child.stdin.write(json.dumps(job.as_dict()).encode() + b"\n")
            child.stdin.flush()
            reader.start()
            return _wait(job, answers, progress, lambda: _ended(job, child, errors))
        except BrokenPipeError:
            raise _ended(job, child, errors) from None
        finally:  # also after Ctrl-C, or when the caller's progress bar failed
            child.kill()
            child.wait()
            child.stdin.close()
            if reader.ident:
                reader.join()
            child.stdout.close()


def _read(pipe: BinaryIO, answers: queue.SimpleQueue) -> None:
    """Put every answer of the child into the queue; None when it has closed the pipe."""
    for line in pipe:
        try:
            answer = json.loads(line)
        except ValueError:
            break
        if size := answer.get("bytes"):
            answer["data"] = pipe.read(size)
        answers.put(answer)
    answers.put(None)


def _wait(job: Job, answers: queue.SimpleQueue, progress: Progress, ended: Callable[[], Exception]) -> Compiled:
    stage, fraction = "starting", 0.0
    while True:
        try:
            answer = answers.get(timeout=_EVERY)
        except queue.Empty:
            answer = {}
        interrupt.check()
        if answer is None:
            raise ended()
        if "error" in answer:
            raise UserError(*answer["error"])
        if "result" in answer:
            return _result(answer, ended)
        stage, fraction = answer.get("progress", (stage, fraction))
        progress(stage, fraction)


def _result(answer: dict[str, Any], ended: Callable[[], Exception]) -> Compiled:
    result = answer["result"]
    result["layers"] = [
        layers.Layer(
            **{
                key: tuple(layers.Tensor(kind, tuple(shape), name) for kind, shape, name in found[key])
                for key in ("inputs", "constants", "outputs")
            }
            | {key: found[key] for key in ("name", "kind", "tactic")},
            nodes=tuple(found["nodes"]),
        )
        for found in result["layers"]
    ]
    data = answer.get("data", b"")
    if len(data) != answer["bytes"]:
        raise ended()
    return Compiled(**{**result, "data": data})


def _ended(job: Job, child: subprocess.Popen, errors: BinaryIO) -> UserError:
    """Why a child ended without a result."""
    try:
        code = child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        code = None
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = f": {lines[-1][:300]}" if lines else ""
    if code is not None and code < 0:
        how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
    else:
        how = f"ended with code {code}"
    return UserError(
        f"the process that builds {job.name} {how}{said}",
        "free memory of this machine, or give a smaller --profile" if code == -9 else "see accel doctor",
    )


def main() -> None:
    """The child: one job from standard input, answers on what was standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to both; the parent decides
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    job = Job(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock, last = threading.Lock(), 0.0

    def answer(message: dict[str, Any], data: Any = b"") -> None:
        with lock:
            pipe.write(json.dumps(message).encode() + b"\n")
            pipe.write(data)
            pipe.flush()

    def progress(stage: str, fraction: float) -> None:
        nonlocal last
        if time.monotonic() - last > _EVERY:
            last = time.monotonic()
            answer({"progress": [stage, fraction]})

    try:
        done = compile_graph(job, progress)
    except UserError as error:
        answer({"error": [error.message, error.fix]})
    except BaseException:  # the parent tells the last line of it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    else:
        data = memoryview(done.data)
        result = asdict(replace(done, data=b""))
        del result["data"]
        result["layers"] = [_row(layer) for layer in done.layers]
        answer({"result": result | {"peak_memory": _peak()}, "bytes": data.nbytes}, data)
    pipe.close()
    os._exit(0)  # the library's own end takes seconds after a large build


def _row(layer: layers.Layer) -> dict[str, Any]:
    row = asdict(layer)
    for key in ("inputs", "constants", "outputs"):
        row[key] = [[tensor.datatype, list(tensor.shape), tensor.name] for tensor in getattr(layer, key)]
    return row


def _peak() -> int | None:
    """The most bytes of memory that this process has had; None where the system does not say (all but Linux).

    `resource.getrusage` will not do: after a fork it starts from what the parent had.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _end_with_parent() -> None:
    """End when the parent has closed the pipe, which it does by ending."""
    while os.read(0, 1 << 10):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
