"""One Slurm for all tests of this directory, and the job scripts' variables on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    lacking = missing()
    if lacking:
        pytest.skip(f"Slurm is not installed ({', '.join(lacking)}); make test-slurm installs it")
    root = Path(tempfile.mkdtemp(prefix="slurm"))
    one = Cluster(root)
    try:
        one.start()
        yield one
    finally:
        one.stop()
        shutil.rmtree(root)
