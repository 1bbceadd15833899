"""Whole runs on two readers whose data is damaged: what is counted, listed and shown, over a kill, and when it ends."""

from __future__ import annotations

import json
import signal
import struct
from pathlib import Path

import pytest
from run_data import RunData, make_run_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_faults import run, tensors

from megavlm.data.quarantine import read_list

pytestmark = pytest.mark.reliability

LIMITS = ("data.max_bad_fraction=0.6", "logging.tensorboard=true")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    """The data set of 160 samples, of which 40 are cut off."""
    data = make_run_data(tmp_path_factory.mktemp("damaged"))
    shard = data.root / "train" / "shard-000000.tar"
    index = shard.with_suffix(".tar.idx").read_bytes()
    offsets = struct.unpack(f"<{len(index) // 8}Q", index)
    with shard.open("r+b") as file:
        file.truncate(offsets[120] + 1)
    return data


def counters(output: Path) -> dict:
    state = json.loads((output / "checkpoints" / "step-00000006" / "run.json").read_text())
    return {key: state[key] for key in ("samples", "skipped_samples", "tokens")}


@pytest.mark.dist
def test_a_killed_run_skips_counts_and_lists_what_an_uninterrupted_one_does(damaged: RunData, tmp_path: Path) -> None:
    code, text = run(damaged, tmp_path / "whole", *LIMITS, ranks=2)
    assert code == 0, text
    code, text = run(damaged, tmp_path / "run", *LIMITS, ranks=2, fault="step.end:rank1:step5:kill")
    assert code != 0 and f"-{signal.SIGKILL.value}" in text, text
    code, text = run(damaged, tmp_path / "run", *LIMITS, ranks=2)
    assert code == 0 and "at step 4" in text, text
    assert "samples so far: cut shard" in text and "| skipped samples " in text

    whole = counters(tmp_path / "whole")
    assert counters(tmp_path / "run") == whole
    assert tensors(tmp_path / "run") == tensors(tmp_path / "whole")
    causes = whole["skipped_samples"]
    assert set(causes) == {"cut shard", "too long"} and whole["samples"] > sum(causes.values())
    listed = []
    for name in ("quarantine-0.jsonl", "quarantine-1.jsonl"):
        if (tmp_path / "whole" / name).is_file() or (tmp_path / "run" / name).is_file():
            samples = list(read_list(tmp_path / "whole" / name))
            # The killed run had seen one more step.
            assert list(read_list(tmp_path / "run" / name)) == samples
            listed += samples
    assert len(set(listed)) == len(listed) > 0
    assert {(s.dataset, s.shard, s.cause) for s in listed} == {("pictures", "shard-000000.tar", c) for c in causes}
    for output in (tmp_path / "whole", tmp_path / "run"):
        events = EventAccumulator(str(output / "tensorboard")).Reload()
        values = {tag: events.Scalars(f"data/skipped/{tag}")[-1].value for tag in ("total", "cut-shard", "too-long")}
        assert values == {
            "total": sum(causes.values()), "cut-shard": causes["cut shard"], "too-long": causes["too long"]
        }  # fmt: skip


@pytest.mark.dist
def test_too_many_bad_samples_end_the_run_on_all_ranks(damaged: RunData, tmp_path: Path) -> None:
    words = ("data.max_bad_fraction=0.01", "data.max_bad_after_samples=20")
    code, text = run(damaged, tmp_path / "run", *words, ranks=2)
    assert code == 1, text
    # torchrun ends the other rank when the first has left; both had raised, or this would have waited for a time-out.
    assert "samples read cannot be used (" in text and "more than data.max_bad_fraction (0.01); repair those" in text
    assert " cut shard" in text and " too long" in text
    assert str(tmp_path / "run" / "quarantine-*.jsonl") in text
    assert list(tmp_path.glob("run/quarantine-*.jsonl"))
