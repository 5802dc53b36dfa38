"""The repository on NVIDIA's own server, from the package nvidia-pytriton: a whole image, and clients that share calls.

The package has the server without its ONNX Runtime backend; `onnxruntime_backend/model.py` stands in for that.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import accel
from accel.bundle import Bundle
from accel.export.pipeline import export_pipeline
from accel.export.triton.repository import Serving, write

ROOT = Path(__file__).parents[3]
FOUND = sorted((ROOT / ".venv-triton").glob("lib/python3*/site-packages/pytriton/tritonserver"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOUND, reason="there is no tritonserver here: make test-triton installs one"),
]


def free_port() -> int:
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        return at.getsockname()[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "digits"
    export_pipeline("digits/4step", out, precision="fp32", profile="digits")
    return Bundle.open(out)


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    """A repository, and the address of a server that has loaded it."""
    folder, distribution = tmp_path_factory.mktemp("triton"), FOUND[0]
    write(bundle, folder / "repo", Serving(kind="cpu", queue_microseconds=200_000))
    shutil.copytree(distribution / "backends", folder / "backends")
    shutil.copytree(Path(__file__).parent / "onnxruntime_backend", folder / "backends" / "onnxruntime")
    stub = distribution / "python_backend_stubs" / sysconfig.get_python_version() / "triton_python_backend_stub"
    shutil.copy(stub, folder / "backends" / "python")
    for file in (distribution / "bin" / "tritonserver", folder / "backends" / "python" / stub.name):
        file.chmod(0o755)
    ports = {name: free_port() for name in ("http", "grpc", "metrics")}
    command = [distribution / "bin" / "tritonserver", "--model-repository", folder / "repo", "--exit-on-error", "true"]
    command += ["--backend-directory", folder / "backends", "--allow-gpu-metrics", "false"]
    command += [f"--{name}-port={port}" for name, port in ports.items()]
    python = sysconfig.get_config_var("LIBDIR") or ""
    libraries = [str(distribution.parents[1] / "nvidia_pytriton.libs"), python]
    environment = os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PYTHONPATH": sysconfig.get_path("purelib"),
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    grpc = pytest.importorskip("tritonclient.grpc")
    client = grpc.InferenceServerClient(f"127.0.0.1:{ports['grpc']}")
    until = time.monotonic() + 120
    while not ready(client):
        assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
        time.sleep(0.2)
    yield folder / "repo", client
    process.terminate()
    process.wait(60)


def ready(client) -> bool:
    from tritonclient.utils import InferenceServerException

    try:
        return client.is_server_ready()
    except InferenceServerException:
        return False


class Served:
    """An engine whose graph runs on the server."""

    def __init__(self, engine, client):
        self.engine, self.client = engine, client

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def __call__(self, **feeds):
        import tritonclient.grpc as grpc
        from tritonclient.utils import np_to_triton_dtype

        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        rows = max(len(array) for array in arrays.values() if array.ndim)
        inputs = []
        for name, array in arrays.items():
            array = np.full((rows, 1), array) if not array.ndim else array  # Triton has no scalars
            inputs.append(grpc.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        answer = self.client.infer(self.engine.component.name, inputs)
        return {spec.name: answer.as_numpy(spec.name) for spec in self.engine.component.outputs}


def calls(repository, name):
    """Rows of the calls of a model's graph since the last time."""
    file = repository / name / "calls.txt"
    found = [int(line) for line in file.read_text().split()] if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def test_the_server_loads_every_model_and_calls_it_once_to_warm_up(server):
    repository, client = server
    names = sorted(model.name for model in client.get_model_repository_index().models)
    assert names == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert all(client.is_model_ready(name) for name in names)
    for name in names:
        assert client.get_model_config(name).config.backend == "onnxruntime"
        assert len(calls(repository, name)) == 1


def test_an_image_that_the_server_makes_is_the_bundles(server, bundle):
    _, client = server
    with accel.load(bundle, "onnxruntime", threads=1) as pipe:
        own = np.asarray(pipe("a handwritten seven", seed=3).images[0]).astype(int)
        for name in ("text_encoder", "unet", "vae_decoder"):
            pipe.engines._loaded[name] = Served(pipe.engines[name], client)
        served = np.asarray(pipe("a handwritten seven", seed=3).images[0]).astype(int)
    assert abs(own - served).max() <= 1 and own.std() > 10


def test_clients_at_different_steps_share_a_call_and_get_what_each_gets_alone(server, bundle):
    repository, client = server
    rng = np.random.default_rng(0)
    with accel.load(bundle, "onnxruntime", threads=1) as pipe:
        unet = pipe.engines["unet"]
        feeds = [
            {
                "sample": rng.standard_normal((1, 4, 16, 16), np.float32),
                "timestep": np.float32(t),
                "encoder_hidden_states": rng.standard_normal((1, 77, 64), np.float32),
            }
            for t in (999, 749, 499, 249)
        ]
        alone = [unet(**one)["out_sample"] for one in feeds]
        calls(repository, "unet")
        together: dict[int, np.ndarray] = {}
        served = Served(unet, client)
        ask = lambda i: together.update({i: served(**feeds[i])["out_sample"]})  # noqa: E731
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    made = calls(repository, "unet")
    assert sum(made) == 4 and len(made) < 4, made
    for i, expected in enumerate(alone):
        assert np.linalg.norm(together[i] - expected) <= 1e-5 * np.linalg.norm(expected)


def test_what_does_not_fit_is_refused_by_the_configuration(server, bundle):
    from tritonclient.utils import InferenceServerException

    _, client = server
    with accel.load(bundle, "onnxruntime", threads=1) as pipe:
        served = Served(pipe.engines["text_encoder"], client)
        with pytest.raises(InferenceServerException, match="input_ids"):
            served(input_ids=np.zeros((1, 76), np.int64))
