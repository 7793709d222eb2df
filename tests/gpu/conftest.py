"""Ranks with a GPU each, in place of those that tests of other folders get."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.adapter import COMPILING_S, NUM_GPUS, GpuPool


def pytest_configure(config: pytest.Config) -> None:
    """Tests of other folders have marks of a plugin that may not be installed where these run."""
    config.addinivalue_line("markers", "timeout(seconds): the most that a test may take")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels are compiled meanwhile, where the plugin is installed as well."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(500 + COMPILING_S), append=False)


@pytest.fixture(scope="session")
def pool() -> Iterator[GpuPool]:
    """As many rank processes as there are GPUs, four at most."""
    with GpuPool(min(NUM_GPUS, 4)) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def interpreted_pool(pool: GpuPool) -> GpuPool:
    """The same: here kernels are compiled."""
    return pool
