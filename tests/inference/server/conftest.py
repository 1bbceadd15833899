"""One learnt checkpoint and one server for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from learnt import Learnt, make_learnt
from run_data import RunData
from serving import Served, serving, started
from web_server import web_server


@pytest.fixture(scope="session")
def learnt(run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    return make_learnt(run_data, tmp_path_factory.mktemp("learnt"))


@pytest.fixture(scope="session")
def served(learnt: Learnt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    words = ("--web", "--batch=4", "--queue=4", "--body-mib=1", "--images=2", "--pixels=200000", "--new-tokens=40")
    with serving(learnt.checkpoint, learnt.picture, log, *words) as running:
        yield running


@pytest.fixture(scope="session")
def hooked(learnt: Learnt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with tight limits, a slow model and a made-up Internet (see ``hooked.py``)."""
    log = tmp_path_factory.mktemp("hooked") / "log"
    words = ("--web", "--allow-remote-images", "--batch=2", "--queue=2", "--body-mib=1", "--images=4", "--seconds=4")
    with web_server() as port:
        hooks = {"STEP_SECONDS": "0.1", "WEB_PORT": str(port)}
        with started(learnt.checkpoint, learnt.picture, log, *words, hooks=hooks) as running:
            yield running
