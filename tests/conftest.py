"""Prepare the device once, before any test module imports Megatron-Core; data that several rooms' tests use."""

from __future__ import annotations

import gc
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mark_choice
import proof_record
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


def pytest_collection_finish() -> None:
    """Keep what was imported out of the search for garbage: a third of the processor time of tests that build much."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    """Let outcomes of ``pytest.mark.proves`` be recorded; leave out files in which ``-m`` finds nothing."""
    config.pluginmanager.register(proof_record, "proof-record")
    config.pluginmanager.register(mark_choice, "mark-choice")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let a worker of pytest-xdist report tests that wrote what is no Unicode, which cannot be sent otherwise."""
    return _sendable((yield))


_THREADS = 600
"""So many more than were left the last time, and what tests left is collected. A group of Gloo's has two, which sleep;
to search all objects takes half a second."""
_left = [0]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """Collect process groups that tests have left."""
    if _threads() > _left[0] + _THREADS:
        gc.collect()
        _left[0] = _threads()


def _threads() -> int:
    tasks = Path("/proc/self/task")
    return sum(1 for _ in tasks.iterdir()) if tasks.is_dir() else 0


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
