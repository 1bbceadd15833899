"""Steps that must not count: what is done about one that was skipped."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavlm.config.schema import TrainingConfig
from megavlm.parallel.lock import LockView
from megavlm.parallel.state import any_rank, is_logging_rank
from megavlm.training.lines import drop_steps_after
from megavlm.training.progress import Progress
from megavlm.training.step import StepResult

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped_steps.jsonl"
_WARM_STEPS = 20
_MEMORY = 0.98  # of the running mean: some 50 steps


class StepGuard:
    """Counts skipped steps and knows how high a loss may be.

    Args:
        settings: the recipe's ``training`` branch.
        progress: the run's counters, kept up to date here.
        directory: the run's, for the list of skipped steps; what an earlier start wrote there of steps that are taken
            again goes to another file.
        lock: of the directory; nothing is written once it is lost.
    """

    def __init__(
        self, settings: TrainingConfig, progress: Progress, directory: Path, lock: LockView | None = None
    ) -> None:
        self.settings, self.progress, self.directory, self._lock = settings, progress, directory, lock
        if is_logging_rank():
            drop_steps_after(directory / SKIPPED_FILE, progress.step)

    def largest_loss(self) -> float | None:
        """Return the loss above which a step is skipped, or None."""
        factor, mean = self.settings.loss_spike_factor, self.progress.running_loss
        if factor is None or mean is None or self.progress.running_loss_steps < _WARM_STEPS:
            return None
        return factor * mean

    def take(self, result: StepResult, samples: list[str] | None) -> None:
        """Take in a step; a collective if it was skipped.

        Args:
            result: the step, equal on all ranks.
            samples: keys of this reader's samples in it; None on ranks that read nothing.

        Raises:
            RuntimeError: too many steps in a row were skipped.
        """
        progress = self.progress
        if result.skipped is None:
            progress.skipped_in_row = 0
            mean = progress.running_loss
            progress.running_loss = result.loss if mean is None else _MEMORY * mean + (1 - _MEMORY) * result.loss
            progress.running_loss_steps += 1
            return
        if result.empty:  # nothing is wrong with the model; data.max_bad_fraction is there for data without use
            progress.empty_steps += 1
            self._record(result, samples)
            return
        progress.skipped_steps += 1
        progress.skipped_in_row += 1
        self._record(result, samples)
        if progress.skipped_in_row > self.settings.max_skipped_steps:
            raise RuntimeError(
                f"{progress.skipped_in_row} steps in a row were skipped, more than training.max_skipped_steps; the "
                f"last one as {result.skipped}. Start again to go on from the last checkpoint, with a lower "
                "optimizer.lr, or without the samples that "
                f"{self.directory / SKIPPED_FILE} lists"
            )

    def _record(self, result: StepResult, samples: list[str] | None) -> None:
        gathered: list[Any] | None = [None] * dist.get_world_size() if is_logging_rank() else None
        dist.gather_object(samples, gathered)
        if gathered is None or (self._lock is not None and self._lock.lost()):
            return
        keys = [key for part in gathered if part for key in part]
        step = self.progress.step + 1
        logger.warning("step %d changed nothing: %s; its samples: %s", step, result.skipped, ", ".join(keys[:8]))
        loss = None if result.empty else repr(result.loss)
        line = {"step": step, "why": result.skipped, "loss": loss, "samples": keys}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / SKIPPED_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # on one rank alone: the others would wait for it
            logger.warning("%s cannot be written: %s", self.directory / SKIPPED_FILE, error)


def check_finite(modules: list[Any]) -> None:
    """Refuse to save weights that are not finite; a collective.

    Raises:
        RuntimeError: some are not, on some rank.
    """
    poisoned = any(not bool(torch.isfinite(p).all()) for module in modules for p in module.parameters())
    if any_rank(poisoned):
        raise RuntimeError("the weights are not finite, so they were not saved; start again from the last checkpoint")
