"""What tests of every folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from crossdock.worlds import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four rank processes, started by the first test that uses them and kept to the end."""
    with Pool(4) as ranks:
        yield ranks
