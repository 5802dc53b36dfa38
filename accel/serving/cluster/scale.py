"""How many replicas a model has, and what each of them takes of a cluster."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import UserError


@dataclass(frozen=True)
class Scale:
    """Replicas of each model.

    Attributes:
        least, most: how many; with a range, Ray adds and removes them by load.
        cpus: cores of a replica, and the threads of its engine; None to share out what there is.
        gpus: GPUs of a replica, such as 0.5; None for one where there are any.
    """

    least: int = 1
    most: int = 1
    cpus: float | None = None
    gpus: float | None = None

    @classmethod
    def of(cls, replicas: str, cpus: float | None, gpus: float | None) -> Scale:
        """Of what the command line says: "2", or "1-4".

        Raises:
            UserError: for what is no number of replicas, cores or GPUs.
        """
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", replicas)
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most:
            raise UserError(
                f"invalid replicas: {replicas}", "--replicas 2, or --replicas 1-4 for as many as the load asks"
            )
        if cpus is not None and not 0 < cpus < math.inf:
            raise UserError(f"invalid cores of a replica: {cpus:g}", "--cpus-per-replica 2")
        if gpus is not None and not (0 <= gpus <= 1 or 1 < gpus < math.inf and gpus.is_integer()):
            raise UserError(f"invalid GPUs of a replica: {gpus:g}", "--gpus-per-replica 0.5, or a whole number")
        return cls(least, most, cpus, gpus)

    def settled(self, nodes: Sequence[Mapping[str, float]], models: int, device: str | None) -> Scale:
        """With cores and GPUs that were left open.

        Args:
            nodes: resources of each node, such as {"CPU": 8, "GPU": 1}.
            models: how many models have so many replicas each.
            device: that was asked for; "cpu" takes no GPU.
        """
        gpus = self.gpus
        if gpus is None:
            gpus = 1.0 if device != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
        cpus = self.cpus
        if cpus is None:
            abreast = math.ceil(self.most * models / max(len(nodes), 1))
            cpus = max(1.0, min((node.get("CPU", 0) for node in nodes), default=1) // abreast)
        return replace(self, cpus=float(cpus), gpus=float(gpus))

    def room(self, nodes: Sequence[Mapping[str, float]]) -> int:
        """How many replicas the nodes have room for."""
        cpus, gpus = self.cpus or 0, self.gpus or 0
        by_cpus = [node.get("CPU", 0) // cpus if cpus else math.inf for node in nodes]
        return int(sum(min(c, _fit(node.get("GPU", 0), gpus)) for c, node in zip(by_cpus, nodes, strict=True)))

    def missing(self, nodes: Sequence[Mapping[str, float]], models: int) -> str:
        """What the nodes lack for the least replicas of so many models; "" where they have it."""
        wanted, room = self.least * models, self.room(nodes)
        if room >= wanted:
            return ""
        has = [f"{node.get('CPU', 0):g} cores and {node.get('GPU', 0):g} GPUs" for node in nodes]
        each = f"{self.cpus:g} cores" + f" and {self.gpus:g} GPUs" * bool(self.gpus)
        return f"{wanted} replicas of {each} do not fit: there is room for {room} ({'; '.join(has) or 'no node'})"

    def options(self, rows: int) -> dict[str, Any]:
        """Ray Serve's options of a deployment.

        Args:
            rows: of a replica's largest UNet call: with as many orders it is busy.
        """
        actor = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.least == self.most:
            return {"num_replicas": self.least, "ray_actor_options": actor}
        auto = {"min_replicas": self.least, "max_replicas": self.most, "target_ongoing_requests": rows}
        return {"autoscaling_config": auto, "ray_actor_options": actor}


def _fit(gpus: float, each: float) -> float:
    """How many replicas the GPUs of a node have room for; a share of a GPU lies on one GPU."""
    if not each:
        return math.inf
    return gpus // each if each >= 1 else int(gpus) * (1 // each)
