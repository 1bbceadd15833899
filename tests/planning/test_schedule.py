"""The simulated schedules: the order of Megatron-Core's own, and times that can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import script

from megavlm.planning.schedule import around, rank_order, simulate

WORKER = Path(__file__).with_name("schedule_worker.py")
# Fewer micro-batches than stages, as many as the warm-up takes, and more.
PLACES = ("first_stage", "all_ranks")
TWO_RANKS = [(2, None, 1, PLACES[0]), (2, None, 5, PLACES[0]), (2, 2, 2, PLACES[0]), (2, 2, 6, PLACES[0])]
TWO_RANKS += [(2, 3, 4, PLACES[0]), (2, None, 5, PLACES[1]), (2, 2, 6, PLACES[1])]
FOUR_RANKS = [(4, None, 3, PLACES[0]), (4, None, 4, PLACES[0]), (4, None, 9, PLACES[1]), (4, 2, 4, PLACES[1])]
FOUR_RANKS += [(4, 2, 12, PLACES[0])]


@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)])
def test_megatron_core_runs_this_order(
    ranks: int, cases: list[tuple[int, int | None, int, str]], tmp_path: Path
) -> None:
    job, out = tmp_path / "job.json", tmp_path / "out.json"
    keys = ("pipeline", "virtual", "microbatches", "placement")
    job.write_text(json.dumps([dict(zip(keys, case, strict=True)) for case in cases]))
    script(WORKER, job, out, world=ranks, timeout=600)
    real = json.loads(out.read_text())
    for (pipeline, virtual, microbatches, placement), of_ranks in zip(cases, real, strict=True):
        apart = placement == "all_ranks"
        for rank, calls in enumerate(of_ranks):
            order = rank_order(rank, microbatches, pipeline=pipeline, virtual=virtual, apart=apart)
            assert [list(work) for work in order] == calls, (pipeline, virtual, microbatches, rank)
            seconds = [[1.0] * (pipeline * (virtual or 1))] * microbatches
            line = simulate(seconds, seconds, pipeline=pipeline, virtual=virtual)
            line = around(line, [1.0] * pipeline, [1.0] * pipeline) if apart else line
            assert [[op.kind, op.chunk, op.microbatch] for op in line.of(rank)] == calls


@pytest.mark.parametrize(("pipeline", "microbatches"), [(2, 2), (4, 8), (8, 3)])
def test_equal_stages_give_the_known_bubble(pipeline: int, microbatches: int) -> None:
    # (P - 1) / (M + P - 1), arXiv 2104.04473, section 2.2.
    line = simulate([[1.0] * pipeline] * microbatches, [[2.0] * pipeline] * microbatches, pipeline=pipeline)
    assert line.total == pytest.approx(3 * (microbatches + pipeline - 1))
    assert line.bubble == pytest.approx((pipeline - 1) / (microbatches + pipeline - 1))


def test_interleaving_divides_the_bubble_by_the_chunks() -> None:
    # Section 2.2 of the same: (P - 1) / V of the time of a micro-batch.
    line = simulate([[0.5] * 8] * 8, [[1.0] * 8] * 8, pipeline=4, virtual=2)
    assert line.total == pytest.approx(3 * 8 + 3 * 3 / 2)


def test_one_slow_stage_sets_the_pace() -> None:
    forward, backward = [[3.0, 1.0]] * 4, [[6.0, 2.0]] * 4
    line = simulate(forward, backward, pipeline=2)
    # The first stage works all the time but while it waits for the first gradient: F1 B1 of the other.
    assert line.busy == pytest.approx((36.0, 12.0))
    # F0 F1 of rank 0 take 6 s; F0 B0 of rank 1 are over at 6 s: the first rank never waits.
    assert line.total == pytest.approx(36.0)


def test_micro_batches_may_differ() -> None:
    # Rank 0: F0 0-1, F1 1-6; rank 1: F0 1-2, B0 2-3, F1 6-7, B1 7-8; rank 0: B0 6-7, B1 8-9.
    line = simulate([[1.0, 1.0], [5.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]], pipeline=2)
    assert line.total == pytest.approx(9.0)
    assert [(op.start, op.end) for op in line.of(1)] == [(1, 2), (2, 3), (6, 7), (7, 8)]


def test_messages_take_their_time() -> None:
    line = simulate([[1.0] * 4], [[1.0] * 4], pipeline=4, p2p_seconds=0.25)
    assert line.total == pytest.approx(8 + 6 * 0.25)
    assert simulate([[1.0]] * 2, [[1.0]] * 2, pipeline=1, p2p_seconds=9.0).total == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage_forward": [[1.0]], "pipeline": 2}, "times for 2 stages"),
        ({"stage_forward": [], "pipeline": 1}, "do not pair"),
        ({"stage_forward": [[1.0] * 4] * 3, "pipeline": 2, "virtual": 2}, "multiple of 2 micro-batches"),
        ({"stage_forward": [[1.0]], "pipeline": 1, "virtual": 1}, "needs 2 ranks"),
    ],
)
def test_wrong_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(**{"stage_backward": arguments["stage_forward"], **arguments})


def test_all_wait_for_the_slowest_encoder_and_for_the_first_stage() -> None:
    """One micro-batch on two ranks: 3 s for the slower encoder, 1 s handed over, 2 + 2 s of passes, and home."""
    alone = simulate([[1.0, 1.0]], [[1.0, 1.0]], pipeline=2)
    line = around(alone, [1.0, 3.0], [2.0, 6.0], handing=1.0)
    assert [(op.kind, op.start, op.end) for op in line.of(0)] == [
        ("E", 0, 1), ("F", 4, 5), ("B", 7, 8), ("R", 9, 11)
    ]  # fmt: skip
    assert line.of(1)[-1][-2:] == (9, 15) and line.total == 15
    assert line.bubble == pytest.approx(1 - (1 + 3 + 4 + 2 + 6) / 30)
