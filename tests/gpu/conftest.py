"""Ranks with a GPU each, in place of those that tests of other folders get."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu.adapter import NUM_GPUS, GpuPool


def pytest_configure(config: pytest.Config) -> None:
    """Tests of other folders have marks of a plugin that may not be installed where these run."""
    config.addinivalue_line("markers", "timeout(seconds): the most that a test may take")


@pytest.fixture(scope="session")
def pool() -> Iterator[GpuPool]:
    """As many rank processes as there are GPUs, four at most."""
    with GpuPool(min(NUM_GPUS, 4)) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def interpreted_pool(pool: GpuPool) -> GpuPool:
    """The same: here kernels are compiled."""
    return pool
