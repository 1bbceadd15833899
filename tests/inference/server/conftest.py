"""One learnt checkpoint and one server for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from learnt import Learnt, make_learnt
from run_data import RunData
from serving import Served, serving


@pytest.fixture(scope="session")
def learnt(run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    return make_learnt(run_data, tmp_path_factory.mktemp("learnt"))


@pytest.fixture(scope="session")
def served(learnt: Learnt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    words = ("--web", "--batch=4", "--queue=4", "--body-mib=1", "--images=2", "--pixels=200000", "--new-tokens=40")
    with serving(learnt.checkpoint, learnt.picture, log, *words) as running:
        yield running
