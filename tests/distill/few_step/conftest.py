"""Few steps do not depend on a topology: `sd15` is the small pipeline here, and `sd15_full` the one of SD1.5."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def sd15(small) -> Path:
    return small
