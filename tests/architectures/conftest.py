"""One process that is a job of its own: Megatron-Core's groups for the models built in these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megavlm.config.schema import ParallelConfig
from megavlm.parallel.state import process_groups


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Hold the groups of a single process while a module's tests run."""
    with process_groups(ParallelConfig(), seed=1234):
        yield
