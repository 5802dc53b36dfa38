"""The application as Ray Serve has it: a front with the APIs, and the replicas of each model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..app import create
from ..limits import Limits
from ..metrics import Metrics
from ..models import Settings
from .remote import Remote
from .replica import Replica
from .scale import Scale

NAME = "accel"
FRONT = "front"


class Front:
    """The APIs over models that are elsewhere; one process, which loads none.

    Args:
        models: settings and digest of each.
        handles: of their deployments.
        limits, key, hosts: as `app.create` takes them.
    """

    def __init__(
        self,
        models: Sequence[tuple[Settings, str]],
        handles: Sequence[Any],
        limits: Limits,
        key: str | None,
        hosts: Sequence[str],
    ):
        from ray import exceptions as ray_errors
        from ray.serve import exceptions as serve_errors

        lost = (
            ray_errors.RayActorError,
            ray_errors.ObjectLostError,
            ray_errors.WorkerCrashedError,
            ray_errors.NodeDiedError,
            serve_errors.ReplicaUnavailableError,
        )
        full = (serve_errors.BackPressureError,)
        self._models = [
            Remote(settings, digest, handle, lost, full, partial(states, deployment_name(settings.name)))
            for (settings, digest), handle in zip(models, handles, strict=True)
        ]
        self._how: dict[str, Any] = dict(limits=limits, key=key, hosts=hosts)

    def __serve_build_asgi_app__(self) -> Any:  # the name that Ray Serve asks for
        return create(self._models, Metrics(), **self._how)


def deployment_name(model: str) -> str:
    """What Ray calls the replicas of a model."""
    return re.sub(r"[^\w.-]+", "-", model)


def states(deployment: str) -> Mapping[str, int]:
    """How many replicas of a deployment are in which state, such as {"RUNNING": 2}."""
    from ray import serve

    found = serve.status().applications.get(NAME)
    about = found.deployments.get(deployment) if found else None
    return {} if about is None else {str(getattr(k, "value", k)): v for k, v in about.replica_states.items()}


def build(
    models: Sequence[tuple[Settings, str]],
    scale: Scale,
    *,
    limits: Limits,
    key: str | None,
    hosts: Sequence[str],
    spare: bool,
) -> Any:
    """A `ray.serve.Application`.

    One replica is replaced after another, and an old one ends when what it was making is done.

    Args:
        models: settings and digest of each.
        scale: of the replicas, settled.
        spare: whether there is room for one more, so that a replacement can start before the old replica stops.
    """
    from ray import serve

    patience = dict(graceful_shutdown_timeout_s=limits.seconds, health_check_period_s=5, max_constructor_retry_count=3)
    handles = []
    for settings, digest in models:
        options = scale.options(settings.batch or 8)
        one = serve.deployment(
            Replica,
            name=deployment_name(settings.name),
            max_ongoing_requests=limits.queue,
            max_queued_requests=limits.queue,
            max_surge_percent=int(spare),  # rounded up to one replica
            rolling_update_percentage=0.01,
            **options,
            **patience,
        )
        handles.append(one.bind(settings, digest))
    front = serve.deployment(
        serve.ingress()(Front),
        name=FRONT,
        max_ongoing_requests=100_000,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 0},
        **patience,
    )
    return front.bind(list(models), handles, limits, key, list(hosts))
