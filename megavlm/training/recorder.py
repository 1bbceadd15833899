"""Close looks at chosen steps: PyTorch's profiler, and the history of device memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megavlm.config.errors import RecipeError
from megavlm.config.logs import LoggingConfig
from megavlm.parallel.device import dump_memory_history, profiled_activities, records_memory, start_memory_history

logger = logging.getLogger(__name__)

FOLDER = "profile"


def check_recorder(settings: LoggingConfig) -> None:
    """Check that this machine has what the recipe wants recorded.

    Raises:
        RecipeError: it has not.
    """
    if settings.memory_snapshot_steps is not None and not records_memory():
        raise RecipeError(
            "logging.memory_snapshot_steps: records device memory, and this machine has no CUDA device; set it to null"
        )


class Recorder:
    """Profiles and memory snapshots of this rank, by ``logging.profile_*`` and ``logging.memory_snapshot_steps``.

    A run that is resumed inside of the chosen steps records those that it takes. One that ends inside of them, by an
    error too, writes what it has: what filled the memory is in the snapshot.

    Args:
        settings: the recipe's ``logging`` branch.
        directory: the run's.
        rank: of this process.
    """

    def __init__(self, settings: LoggingConfig, directory: Path, rank: int) -> None:
        chosen = rank in settings.profile_ranks
        self._folder, self._rank = directory / FOLDER, rank
        self._profile_steps = settings.profile_steps if chosen else None
        self._memory_steps = settings.memory_snapshot_steps if chosen else None
        self._profiler: Any = None
        self._annotation: Any = None
        self._profile_from = self._memory_from = self._last = 0

    def begin(self, step: int) -> None:
        """Step ``step`` begins."""
        if self._memory_from == 0 and _within(step, self._memory_steps):
            self._memory_from = step
            start_memory_history()
        if _within(step, self._profile_steps):
            if self._profiler is None:
                self._profile_from = step
                self._profiler = torch.profiler.profile(activities=profiled_activities(), record_shapes=True)
                self._profiler.start()
            self._annotation = torch.profiler.record_function(f"step {step}")
            self._annotation.__enter__()

    def end(self, step: int) -> None:
        """Step ``step`` has ended; writes what is complete."""
        self._last = step
        self._end_annotation()
        if self._profiler is not None and self._profile_steps is not None and step >= self._profile_steps[1]:
            self._write_profile()
        if self._memory_from and self._memory_steps is not None and step >= self._memory_steps[1]:
            self._write_memory()

    def close(self) -> None:
        """The run ends: write what there is."""
        self._end_annotation()
        if self._profiler is not None:
            self._write_profile()
        if self._memory_from:
            self._write_memory()

    def _end_annotation(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None

    def _write_profile(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        # The name that TensorBoard's profiler plugin looks for; chrome://tracing and ui.perfetto.dev read it too.
        self._write(
            self._name(self._profile_from) + ".pt.trace.json.gz", lambda p: profiler.export_chrome_trace(str(p))
        )

    def _write_memory(self) -> None:
        begin, self._memory_from, self._memory_steps = self._memory_from, 0, None
        self._write(self._name(begin) + ".memory.pickle", dump_memory_history)

    def _name(self, begin: int) -> str:
        return f"rank-{self._rank}-steps-{begin}-{max(begin, self._last)}"

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        path = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write(path)
        except (OSError, RuntimeError) as error:  # on one rank alone: the others would wait for it
            logger.warning("%s cannot be written: %s", path, error)
        else:
            logger.info("wrote %s", path)


def _within(step: int, steps: tuple[int, int] | None) -> bool:
    return steps is not None and steps[0] <= step <= steps[1]
