"""One binding for each thread and shape; addresses are bound again only where they have changed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
import torch

from accel.providers.bindings import Bindings
from accel.providers.gpu import PRODUCT


class Watched:
    """A session that counts what it is asked for."""

    def __init__(self):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
        self.made, self.bound, self.options = 0, [], []

    def io_binding(self):
        self.made += 1
        binding, watched = self.session.io_binding(), self

        class Counted:
            own = binding

            def bind_input(self, name, *where):
                watched.bound.append(name)
                binding.bind_input(name, *where)

            def bind_output(self, name, *where):
                watched.bound.append(name)
                binding.bind_output(name, *where)

        return Counted()

    def run_with_iobinding(self, binding, options):
        self.options.append(options)
        self.session.run_with_iobinding(binding.own, options)


@pytest.fixture
def watched():
    return Watched()


def test_what_lies_where_it_lay_is_not_bound_again(watched):
    bindings = Bindings(watched, "cpu")
    x, y = torch.randn(2, 2), torch.empty(2, 2)
    for _ in range(3):
        x.add_(1)
        bindings.run({"x": x}, {"y": y})
        assert torch.allclose(y, x @ x)
    assert watched.made == 1 and watched.bound == ["x", "y"]
    other = torch.randn(2, 2)
    bindings.run({"x": other}, {"y": y})
    assert torch.allclose(y, other @ other) and watched.bound == ["x", "y", "x"] and watched.made == 1


def test_each_thread_has_its_own(watched):
    bindings = Bindings(watched, "cpu")

    def product(seed: int) -> bool:
        x, y = torch.full((2, 2), float(seed)), torch.empty(2, 2)
        bindings.run({"x": x}, {"y": y})
        return torch.equal(y, x @ x)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(product, range(40)))
    assert 1 <= watched.made <= 4


def test_only_a_run_on_a_stream_is_not_waited_for(watched):
    x, y = torch.eye(2), torch.empty(2, 2)
    Bindings(watched, "cpu").run({"x": x}, {"y": y})
    Bindings(watched, "cpu", queued=True).run({"x": x}, {"y": y})
    waited, queued = watched.options
    assert waited is None
    assert queued.get_run_config_entry("disable_synchronize_execution_providers") == "1"
    assert np.array_equal(y, np.eye(2))
