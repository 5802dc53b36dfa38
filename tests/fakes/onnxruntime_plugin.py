"""A plugin provider of ONNX Runtime that is not there: devices that it offers, and sessions that compute on the CPU.

Stricter than what it stands for: it takes only the options that are given to it as known, only strings, and only a
device that it offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort


def device(provider: str, kind: str, number: int = 0) -> Any:
    """What `onnxruntime.get_ep_devices` lists: a provider and the hardware that it can run on."""
    hardware = SimpleNamespace(type=SimpleNamespace(name=kind), vendor="Fake", device_id=number)
    return SimpleNamespace(ep_name=provider, ep_metadata={}, device=hardware)


@dataclass
class World:
    """What the fake offers, and what was asked of it.

    Attributes:
        offers: the devices that appear when the library is registered.
        known: names of the options that the provider has; None takes any.
        leaves: kinds of operators that the provider leaves to the CPU.
        takes: whether the provider takes any operator.
        sessions: (devices, options) of each session.
    """

    offers: Sequence[Any] = ()
    known: Iterable[str] | None = None
    leaves: tuple[str, ...] = ()
    takes: bool = True
    registered: list[tuple[str, str]] = field(default_factory=list)
    sessions: list[tuple[list[Any], dict[str, str]]] = field(default_factory=list)


def install(monkeypatch: Any, world: World) -> None:
    """Put the fake where ONNX Runtime has its own."""
    real_devices, real_session, real_options = ort.get_ep_devices, ort.InferenceSession, ort.SessionOptions

    def register(name: str, path: str) -> None:
        assert (name, path) not in world.registered, "registered twice"
        world.registered.append((name, path))

    class Options(real_options):
        chosen: tuple[list[Any], dict[str, str]] | None = None

        def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
            assert devices and all(any(d is offered for offered in world.offers) for d in devices)
            assert all(isinstance(value, str) for value in options.values())
            assert world.known is None or set(options) <= set(world.known), options
            self.chosen = devices, options

    class Session(real_session):
        def __init__(self, file: Any, options: Any, **more: Any):
            self.chosen = options.chosen
            super().__init__(file, options, **({"providers": ["CPUExecutionProvider"]} if self.chosen else {}) | more)
            if self.chosen:
                assert more["enable_fallback"] == 0
                world.sessions.append(self.chosen)

        def get_providers(self) -> list[str]:
            return [*([self.chosen[0][0].ep_name] if self.chosen else []), *super().get_providers()]

        def get_provider_graph_assignment_info(self) -> list[Any]:
            """As the CPU provider tells it, with what the fake takes under the fake's name."""
            parts = []
            for part in super().get_provider_graph_assignment_info():
                for node in part.get_nodes():
                    ours = world.takes and node.op_type not in world.leaves
                    name = self.chosen[0][0].ep_name if ours else part.ep_name
                    parts.append(SimpleNamespace(ep_name=name, get_nodes=lambda node=node: [node]))
            return parts

    monkeypatch.setattr(ort, "register_execution_provider_library", register)
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [*real_devices(), *(world.offers if world.registered else ())])
    monkeypatch.setattr(ort, "SessionOptions", Options)
    monkeypatch.setattr(ort, "InferenceSession", Session)
