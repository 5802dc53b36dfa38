"""A bundle that a test may break, opened."""

from __future__ import annotations

import pytest

from accel.bundle import Bundle


@pytest.fixture
def bundle(bundle_copy):
    return Bundle.open(bundle_copy)
