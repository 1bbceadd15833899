"""What one rank runs into, all ranks leave by."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch.distributed as dist
from lost_peer_cases import PATIENCE
from ranks import script

from megavlm.parallel.state import is_lost_peer


def test_a_failure_on_one_rank_reaches_all_and_stages_draw_apart() -> None:
    text = script(Path(__file__).with_name("state_worker.py"), world=2, timeout=600).output
    other = "OtherRankError: the work failed on another rank; its message says why"
    # Two ranks may write on one line.
    assert f"rank 0: {other} | none | True | False | True | True | draws apart" in text
    assert "rank 1: ValueError: disk full | none | True | False | False | False | draws apart" in text


@pytest.mark.parametrize(("late", "said"), [(False, "by peer"), (True, f"Timed out waiting {PATIENCE}000ms")])
def test_a_collective_that_breaks_is_told_from_other_errors(late: bool, said: str) -> None:
    found = ranks.run("lost_peer_cases:lost", late, world=2)[0]
    assert said in found[0][0]
    assert len(found) == 3 and all(lost for _, lost in found), found


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cannot read runs/gloo/step-1: timed out"),
        RuntimeError("NCCL_DEBUG is not a number"),
        OSError("[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer"),
        TimeoutError("timed out"),
        BrokenPipeError("Broken pipe"),
        # A bug: tensors of unequal sizes.
        RuntimeError("[enforce fail at /b/third_party/gloo/gloo/allreduce.cc:84] op.nbytes. 4 vs 2"),
    ],
    ids=repr,
)
def test_what_only_speaks_of_them_is_no_lost_peer(error: Exception) -> None:
    assert not is_lost_peer(error)
    assert is_lost_peer(dist.DistBackendError("NCCL communicator was aborted"))
