"""Prepare the device once, before any test module imports Megatron-Core; data that several rooms' tests use."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest
from family_choice import (  # noqa: F401 - pytest finds them here
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_protocol,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

from megavlm.parallel.device import prepare_device

if TYPE_CHECKING:
    from run_data import RunData

prepare_device()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let a worker of pytest-xdist report tests that wrote what is no Unicode, which cannot be sent otherwise."""
    return _sendable((yield))


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _sendable(one) for key, one in value.items()}
    return type(value)(map(_sendable, value)) if isinstance(value, list | tuple) else value


@pytest.fixture(scope="session")
def run_data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    """A small prepared data set with its recipe."""
    from run_data import make_run_data

    return make_run_data(tmp_path_factory.mktemp("data"))
