"""Prepare the device once, before any test module imports Megatron-Core; data that several rooms' tests use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from megavlm.parallel.device import prepare_device

if TYPE_CHECKING:
    from run_data import RunData

prepare_device()


@pytest.fixture(scope="session")
def run_data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    """A small prepared data set with its recipe."""
    from run_data import make_run_data

    return make_run_data(tmp_path_factory.mktemp("data"))
