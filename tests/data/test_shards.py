"""The index of a data set, which processes of Energon write: they end whatever this one has in its garbage."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from data_helpers import write_raw


class Waits:
    """As what ends by joining threads, which a fork does not have; it leaves a file where it should not be ended."""

    def __init__(self, file: Path) -> None:
        self.file, self.own, self.circle = file, os.getpid(), self

    def __del__(self) -> None:
        if os.getpid() != self.own:
            self.file.touch()


def test_forked_processes_collect_nothing_of_this_one(tmp_path: Path) -> None:
    looking = [True]
    os.register_at_fork(after_in_child=lambda: looking[0] and gc.collect() and None)
    gc.disable()
    try:
        Waits(tmp_path / "ended")
        write_raw(tmp_path / "data", [{"json": b"{}"}])
    finally:
        gc.enable()
        looking[0] = False
    assert not (tmp_path / "ended").exists()
    assert not gc.get_freeze_count()
