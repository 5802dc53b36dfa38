"""From settings to a server that runs in a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import Notice, UserError
from ..models import Settings
from .application import FRONT, NAME, build, deployment_name
from .scale import Scale

_ANSWER = 30.0  # seconds that the front may take to answer once Ray says that it runs


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process has joined.

    Attributes:
        address: by which others join it.
        own: whether this process started it, and it ends with it.
        nodes: resources of each node, such as {"CPU": 8.0}.
    """

    address: str
    own: bool
    nodes: Sequence[Mapping[str, float]]


@contextlib.contextmanager
def joined(address: str | None) -> Iterator[Cluster]:
    """Join a Ray cluster while in the `with`.

    Args:
        address: of the cluster, or "local" for a new one; None for that of RAY_ADDRESS or the one that runs on this
            machine, else a new one.

    Raises:
        UserError: where there is none at the address.
    """
    # A cluster that is started here asks for the token that Ray keeps in the home; one without tokens takes it too.
    # Ray reads this when it is imported; said later, one half of it would go by it and the other not.
    if "ray" not in sys.modules and (Path.home() / ".ray/auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # for a cluster that is started here: it tells nobody
    quiet: dict[str, Any] = dict(logging_level="ERROR", log_to_driver=False, namespace=NAME)
    own = address == "local"
    try:
        if not own:
            _reachable(address or os.environ.get("RAY_ADDRESS") or "")
            ray.init(address or "auto", **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        if place := address or os.environ.get("RAY_ADDRESS"):
            text = f"there is no Ray cluster at {place}: {str(error).splitlines()[0]}"
            fix = "ray start --head, or --ray-address local for a new cluster of this machine"
            raise UserError(text, fix) from None
        own = True
    if own:
        ray.init("local", include_dashboard=False, **quiet)
    try:
        yield Cluster(
            ray.get_runtime_context().gcs_address, own, [node["Resources"] for node in ray.nodes() if node["Alive"]]
        )
    finally:
        ray.shutdown()


def _reachable(address: str) -> None:
    """Raise OSError where nothing listens at "host:port"; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def settle(scale: Scale, cluster: Cluster, models: int, device: str | None) -> Scale:
    """The scale, with what was left open by what the cluster has.

    Raises:
        UserError: where a cluster that was started here lacks the room; another one may grow.
    """
    settled = scale.settled(cluster.nodes, models, device)
    if lacking := settled.missing(cluster.nodes, models):
        if cluster.own:
            raise UserError(lacking, "fewer --replicas, or less of --cpus-per-replica and --gpus-per-replica for each")
        warnings.warn(f"{lacking}; those without room wait until the cluster grows", Notice, stacklevel=2)
    return settled


def deploy(
    models: Sequence[tuple[Settings, str]], scale: Scale, cluster: Cluster, *, host: str, port: int, **how: Any
) -> bool:
    """Start the application in the cluster that was joined, or replace the one there, replica by replica.

    Args:
        models: settings and digest of each.
        scale: settled.
        host, port: where every node listens.
        how: limits, key and hosts, as `app.create` takes them.

    Returns:
        Whether it has replaced one.

    Raises:
        UserError: where replicas fail to start, with what they say.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port}, logging_config=_QUIET)
    spare = scale.room(cluster.nodes) > scale.most * len(models)
    replaced = NAME in serve.status().applications
    try:
        serve.run(build(models, scale, spare=spare, **how), name=NAME, route_prefix="/", logging_config=_QUIET)
    except RuntimeError as error:
        message, fix = why(serve.status(), str(error))
        raise UserError(f"the replicas do not start: {message}", fix) from None
    if replaced:
        _until(lambda: _settled(serve.status(), models), "the last of the old replicas is still at work")
    near = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    _until(lambda: answers(near, port), f"nothing answers at {near} port {port}: Ray Serve listens where it did before")
    return replaced


_QUIET = {"log_level": "WARNING", "enable_access_log": False}


def why(status: Any, otherwise: str) -> tuple[str, str]:
    """What the replicas that failed say, and the fix."""
    found = status.applications.get(NAME)
    deployments = found.deployments.values() if found else ()
    failed = [one.message for one in deployments if one.message and one.status != "HEALTHY"]
    lines = [line.strip() for line in (failed[0] if failed else otherwise).splitlines() if line.strip()]
    fix = next((line.removeprefix("fix: ") for line in lines if line.startswith("fix: ")), "")
    said = [line for line in lines if not line.startswith("fix: ")] or [otherwise]
    # Ray ends a traceback with the name of the error before its text.
    return re.sub(r"^[\w.]*UserError: ", "", said[-1]), fix or "`ray logs` has all of it"


def _settled(status: Any, models: Sequence[tuple[Settings, str]]) -> bool:
    """Whether an update is done: nothing starts or stops any more."""
    deployments = status.applications[NAME].deployments
    names = [FRONT, *(deployment_name(settings.name) for settings, _ in models)]
    return all(set(deployments[name].replica_states) == {"RUNNING"} for name in names)


def _until(found: Callable[[], bool], otherwise: str, seconds: float = _ANSWER) -> None:
    until = time.monotonic() + seconds
    while not found():
        if time.monotonic() > until:
            warnings.warn(otherwise, Notice, stacklevel=3)
            return
        time.sleep(0.1)


def wait() -> None:
    """Until a signal comes; then the application ends, with what it has begun done."""
    import signal
    import threading

    from ray import serve

    over = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: over.set())
    while not over.wait(1):  # a wait without an end would not let Python see the signal everywhere
        pass
    serve.delete(NAME)


def answers(host: str, port: int) -> bool:
    """Whether the server says that it can make images."""
    at = f"[{host}]" if ":" in host else host
    try:
        with urllib.request.urlopen(f"http://{at}:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
