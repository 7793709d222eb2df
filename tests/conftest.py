"""What tests of every folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from crossdock.worlds import Pool
from tests.worlds.device_worlds import InterpretedPool, why_not_interpreted


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four rank processes, started by the first test that uses them and kept to the end."""
    with Pool(4) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def interpreted_pool() -> Iterator[Pool]:
    """The same, on which Triton interprets the kernels of the device calls."""
    if why_not_interpreted():
        pytest.skip(why_not_interpreted())
    with InterpretedPool(4) as ranks:
        yield ranks
