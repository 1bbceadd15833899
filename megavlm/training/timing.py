"""Where the time of a step goes over all ranks: stages, pipeline bubble, communication, the slowest rank, memory."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megavlm.config.logs import LoggingConfig
from megavlm.parallel.device import local_device, peak_memory_gib, synchronize
from megavlm.parallel.stopwatch import StepTimes, Stopwatch

STRAGGLER = 1.1
"""A rank that computes this much longer than its stage's mean is worth a word on the console."""


@dataclass(frozen=True)
class RankTimes:
    """The mean timed step of one rank."""

    stage: int
    """Its pipeline stage."""
    replica: int
    """Its data-parallel rank."""
    memory_gib: float
    """Its peak memory so far: of its device, or of its process where it computes on a CPU."""
    times: StepTimes | None
    """None where no step was timed."""

    @property
    def passes(self) -> float:
        """Seconds in forward and backward passes."""
        return self.times.forward + self.times.backward if self.times else 0.0

    @property
    def encoding(self) -> float:
        """Seconds in the tower, where all ranks encode."""
        return self.times.encode + self.times.vision_backward if self.times else 0.0

    @property
    def compute(self) -> float:
        """Both without waiting for others: the rank's own work."""
        return self.passes + self.encoding - (self.times.waiting_in_compute if self.times else 0.0)


class StepTiming:
    """Times every ``logging.timing_interval``-th step and makes figures of what all ranks saw.

    Args:
        settings: the recipe's ``logging`` branch.
        configs: Megatron-Core's configuration of each model chunk of this rank.
    """

    def __init__(self, settings: LoggingConfig, configs: Sequence[Any]) -> None:
        self._settings = settings
        self._stopwatch = Stopwatch(configs)
        self._steps: list[StepTimes] = []
        self._hosts: list[str] = []

    def begin(self, step: int) -> None:
        """Begin a step: it is timed where its turn has come, unless a recording slows some rank down in it."""
        interval, settings = self._settings.timing_interval, self._settings
        recorded = (settings.profile_steps, settings.memory_snapshot_steps)
        slowed = any(steps is not None and steps[0] <= step <= steps[1] for steps in recorded)
        if interval is not None and step % interval == 0 and not slowed:
            self._stopwatch.start()

    def fetched(self) -> None:
        """The step's data is there."""
        self._stopwatch.fetched()

    def end(self) -> None:
        """End the step, and wait for the device."""
        if self._stopwatch.running:
            times = self._stopwatch.stop(synchronize)
            if times is not None:
                self._steps.append(times)
        else:
            synchronize()

    def cancel(self) -> None:
        """Stop timing, where a step ends with an error."""
        self._stopwatch.cancel()

    def collect(self) -> dict[str, float | str]:
        """Return the figures of the steps that were timed since the last call; a collective."""
        if not self._hosts:
            self._hosts = [""] * dist.get_world_size()
            dist.all_gather_object(self._hosts, socket.gethostname())
        ranks = self._gather()
        self._steps = []
        memory = [rank.memory_gib for rank in ranks]
        largest = memory.index(max(memory))
        values: dict[str, float | str] = {"memory_gib": memory[largest], "memory_rank": float(largest)}
        if all(rank.times is not None for rank in ranks):
            values |= figures(ranks)
            slowest = int(values["slowest_rank"])
            values["slowest_host"] = self._hosts[slowest]
        return values

    def _gather(self) -> list[RankTimes]:
        steps = self._steps
        mean = [fmean(column) for column in zip(*map(astuple, steps), strict=True)] if steps else []
        row = [
            float(mpu.get_pipeline_model_parallel_rank()),
            float(mpu.get_data_parallel_rank()),
            peak_memory_gib(),
            float(len(steps)),
            *(mean or [0.0] * len(fields(StepTimes))),
        ]
        own = torch.tensor(row, dtype=torch.float64).to(local_device())
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, own)
        found = []
        for stage, replica, memory, count, *seconds in torch.stack(rows).tolist():
            found.append(RankTimes(int(stage), int(replica), memory, StepTimes(*seconds) if count else None))
        return found


def figures(ranks: Sequence[RankTimes]) -> dict[str, float | str]:
    """Return what the times of all ranks come to: seconds of a step, and shares.

    The bubble of a rank is the share of its replica's schedule in which it does neither a forward nor a backward pass.
    The schedule lasts until the last stage of the replica is through: from the same begin, which the hand-out of the
    data makes. For equal stages and free communication, 1F1B has (p - 1) / (m + p - 1) (arXiv 2104.04473).

    Args:
        ranks: every rank of the job, in order; all timed.
    """
    timed = [(rank, rank.times) for rank in ranks if rank.times is not None]
    assert len(timed) == len(ranks)
    windows: dict[int, float] = {}
    for rank, times in timed:
        windows[rank.replica] = max(windows.get(rank.replica, 0.0), times.schedule)
    values: dict[str, float | str] = {
        "timed_step_seconds": max(times.step for _, times in timed),
        "data_seconds": fmean(times.data for _, times in timed),
        "schedule_seconds": fmean(windows[rank.replica] for rank, _ in timed),
    }
    # What is left after the replica's last backward pass; the rank's own update begins earlier, and waits for that one.
    values["update_seconds"] = fmean(times.update - (windows[rank.replica] - times.schedule) for rank, times in timed)
    stages = sorted({rank.stage for rank in ranks})
    bubbles = []
    for stage in stages:
        members = [(rank, times) for rank, times in timed if rank.stage == stage]
        values[f"stage_seconds/{stage}"] = fmean(rank.passes for rank, _ in members)
        values[f"stage_forward_seconds/{stage}"] = fmean(times.forward for _, times in members)
        values[f"stage_backward_seconds/{stage}"] = fmean(times.backward for _, times in members)
        bubbles.append(fmean(1.0 - rank.passes / windows[rank.replica] for rank, _ in members))
    if len(stages) > 1:
        values |= {"bubble_fraction": fmean(bubbles), "bubble_fraction_largest": max(bubbles)}
        values |= {f"bubble_fraction/{stage}": bubble for stage, bubble in zip(stages, bubbles, strict=True)}
    for name in ("in_compute", "between", "after"):
        waits = [getattr(times, f"waiting_{name}") / times.step for _, times in timed]
        values[f"communication_fraction/{name}"] = fmean(waits)
    values["communication_fraction"] = sum(
        float(values[f"communication_fraction/{name}"]) for name in ("in_compute", "between", "after")
    )
    values |= _vision_figures(timed)
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].compute)
    peers = fmean(rank.compute for rank in ranks if rank.stage == ranks[slowest].stage)
    values["slowest_rank"] = float(slowest)
    values["slowest_rank_seconds"] = ranks[slowest].compute
    values["slowest_rank_ratio"] = ranks[slowest].compute / peers
    return values


def _vision_figures(timed: Sequence[tuple[RankTimes, StepTimes]]) -> dict[str, float | str]:
    """Return what the two phases in which all ranks encode come to; nothing where the first stage encodes.

    The imbalance of a replica is the most that one of its ranks has to do over their mean: 1 is even. That of the job
    is the same of all ranks, so that it shows replicas which others wait for.
    """
    if not any(times.vision for _, times in timed):
        return {}
    imbalances = []
    for replica in {rank.replica for rank, _ in timed}:
        work = [rank.encoding for rank, _ in timed if rank.replica == replica]
        if sum(work) > 0:
            imbalances.append(max(work) / fmean(work))
    job = [rank.encoding for rank, _ in timed]
    return {
        "vision_encode_seconds": fmean(times.encode for _, times in timed),
        "vision_backward_seconds": fmean(times.vision_backward for _, times in timed),
        "vision_imbalance": fmean(imbalances) if imbalances else 1.0,
        "vision_job_imbalance": max(job) / fmean(job) if sum(job) > 0 else 1.0,
        # Of all ranks' time: in the two phases, and the part of it in which they wait or hand over.
        "vision_fraction": fmean(times.vision / times.step for _, times in timed),
        "vision_lost_fraction": fmean((times.vision - rank.encoding) / times.step for rank, times in timed),
    }
