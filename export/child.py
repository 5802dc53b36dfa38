"""Run long work in a process of its own, which can be ended at any moment and leaves nothing.

Compilers work for many seconds without looking up, so Ctrl-C does not end them in time, and a crash or lack of memory
would take the caller along. The child gets its job on its standard input, and ends when that closes: also when its
parent was killed. It answers on a pipe with lines of JSON, and with the bytes of the result after the last of them. All
its temporary files, and those of the programs that it starts, lie in one folder, which is deleted with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from accel import interrupt
from accel.errors import UserError

Progress = Callable[[str, float], None]
Work = Callable[[dict[str, Any], Progress], tuple[dict[str, Any], Any]]
_EVERY = 0.1  # seconds between two reports of progress
_SCRATCH = "ACCEL_SCRATCH"


def run_apart(
    command: Sequence[str], name: str, job: Mapping[str, Any], progress: Progress
) -> tuple[dict[str, Any], bytes]:
    """Give a job to a child whose program calls `serve`; a Ctrl-C here ends it at once, and nothing of it is left.

    Args:
        command: the child's program and its arguments.
        name: what it builds, for messages.
        job: values that JSON can hold.

    Returns:
        The result, and its bytes.

    Raises:
        UserError: what the child raised; or that it ended without a result, with the reason as far as it is known.
    """
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        environment = os.environ | {"TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": scratch, _SCRATCH: scratch}
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,  # what it starts is of its process group, and ends with it
        )
        assert child.stdin and child.stdout
        answers: queue.SimpleQueue = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(child.stdout, answers), name="build-answers", daemon=True)
        try:
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
            reader.start()
            return _wait(answers, progress, lambda: _ended(name, child, errors))
        except BrokenPipeError:
            raise _ended(name, child, errors) from None
        finally:  # also after Ctrl-C, or when the caller's progress bar failed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
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


def _wait(
    answers: queue.SimpleQueue, progress: Progress, ended: Callable[[], Exception]
) -> tuple[dict[str, Any], bytes]:
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
            data = answer.get("data", b"")
            if len(data) != answer["bytes"]:
                raise ended()
            return answer["result"], data
        stage, fraction = answer.get("progress", (stage, fraction))
        progress(stage, fraction)


def _ended(name: str, child: subprocess.Popen, errors: BinaryIO) -> UserError:
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
        f"the process that builds {name} {how}{said}",
        "free memory of this machine, or give a smaller --profile" if code == -9 else "see accel doctor",
    )


def serve(work: Work) -> None:
    """The child: one job from standard input, answers on what was standard output.

    Args:
        work: (job, progress) -> the result, in values that JSON can hold, and its bytes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    job = json.loads(sys.stdin.buffer.readline())
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
        result, data = work(job, progress)
    except UserError as error:
        answer({"error": [error.message, error.fix]})
    except BaseException:  # the parent tells the last line of it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    else:
        view = memoryview(data)
        answer({"result": result | {"peak_memory": _peak()}, "bytes": view.nbytes}, view)
    pipe.close()
    os._exit(0)  # a library's own end takes seconds after a large build


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
    """End when the parent has closed the pipe, which it does by ending: with all that was started and written."""
    while os.read(0, 1 << 10):
        pass
    for started in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            started.kill()
    if scratch := os.environ.get(_SCRATCH):
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)
