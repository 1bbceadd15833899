"""Prepare the device once, before any test module imports Megatron-Core; data that several rooms' tests use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from family_choice import (  # noqa: F401 - pytest finds them here
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_protocol,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

from megavlm.parallel.device import prepare_device

if TYPE_CHECKING:
    from run_data import RunData

prepare_device()


@pytest.fixture(scope="session")
def run_data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    """A small prepared data set with its recipe."""
    from run_data import make_run_data

    return make_run_data(tmp_path_factory.mktemp("data"))
