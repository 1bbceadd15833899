"""Hugging Face directories beside the checkpoints of a run: ``checkpoint.export_hf``.

Each is made of a published checkpoint by a ``megavlm convert`` of its own, which the first rank starts while training
goes on; it appears whole or not at all. One that fails is reported, and neither the run nor the checkpoint suffers. One
that is missing when the run is started again (it was stopped in between) is made then, if its checkpoint is there.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megavlm.checkpoint.base import holds_adapters
from megavlm.checkpoint.hf.command import ConvertProcess
from megavlm.checkpoint.paths import newest_first
from megavlm.config.schema import Recipe
from megavlm.weights.kinds import holds_model

logger = logging.getLogger(__name__)

FOLDER = "hf"
"""Of a run's directory."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _DirectoryToWrite:
    """One directory to write."""

    checkpoint: Path
    out: Path
    words: tuple[str, ...]

    def done(self) -> bool:
        """Whether it is there, made of this checkpoint and not of an earlier one of that name."""
        if not self.out.is_dir():
            return False
        return self.out.stat().st_mtime_ns >= (self.checkpoint / "run.json").stat().st_mtime_ns


class Exporter:
    """Exports the checkpoints of a run; on other ranks than the first, or without the key, it does nothing.

    Args:
        recipe: of the run.
        rank: of this process.
    """

    def __init__(self, recipe: Recipe, rank: int) -> None:
        self._rule = recipe.checkpoint.export_hf if rank == 0 else None
        self._root, self._last = Path(recipe.output_dir), recipe.training.steps
        load = recipe.checkpoint.load
        self._load = load
        self._base_name = str(Path(load).absolute()) if load is not None and holds_model(Path(load)) else ""
        self._waiting: deque[_DirectoryToWrite] = deque()
        self._now: tuple[_DirectoryToWrite, ConvertProcess] | None = None
        self._failed_of: set[Path] = set()

    def due(self, step: int) -> bool:
        """Whether the checkpoint of a step is exported."""
        if self._rule is None or self._rule == "last":
            return self._rule is not None and step == self._last
        return self._rule == "every" or step == self._last or step % int(self._rule) == 0

    def resumed(self, newest: Path) -> None:
        """Take up what an earlier start of the run has left out, up to the checkpoint that the run goes on from.

        Later ones are damaged, and will be replaced: an export that read one of them would lose it in the middle.
        """
        found = newest_first(newest.parent) if self._rule is not None else []
        for path in reversed([one for one in found if one.name <= newest.name]):
            self.published(path)

    def published(self, checkpoint: Path) -> None:
        """Export a checkpoint, if it is due."""
        if not self.due(int(checkpoint.name.rpartition("-")[2])):
            return
        self._failed_of.discard(checkpoint)
        out = self._root / FOLDER / checkpoint.name
        words = ("megatron-to-hf", "--megatron", str(checkpoint), "--out")
        adapters = holds_adapters(checkpoint)
        base = ("--base", self._load) if adapters and self._load is not None and not self._base_name else ()
        exports = [_DirectoryToWrite(checkpoint, out, (*words, str(out), *base))]
        if adapters:
            alone = out.with_name(f"{out.name}-adapter")
            named = ("--base-name", self._base_name) if self._base_name else ()
            exports.append(_DirectoryToWrite(checkpoint, alone, (*words, str(alone), "--adapter", *named)))
        self._waiting += [one for one in exports if not one.done()]
        self.poll()

    def needed(self) -> set[Path]:
        """Return the checkpoints that must stay for now: those of exports to come, and of those that failed."""
        return self._failed_of | {one.checkpoint for one in (*self._waiting, *([self._now[0]] if self._now else []))}

    def poll(self) -> bool:
        """Report what has ended, start what waits, and return whether something is still to be done."""
        if self._now is not None and not self._now[1].running:
            self._report(*self._now)
            self._now = None
        while self._now is None and self._waiting:  # one that cannot even be started is not the last
            self._start(self._waiting.popleft())
        return self._now is not None

    def finish(self, stopped: Callable[[], bool]) -> bool:
        """Wait for what is still to be done, or leave it for the next start if the run is stopped.

        Returns:
            Whether there were exports, and all are done or have failed: checkpoints that waited for them are
            :meth:`needed` no longer.
        """
        if self.poll():
            logger.info("waiting for exports to %s", self._root / FOLDER)
        while self.poll():
            if stopped():
                self.end()
                return False
            time.sleep(_POLL_SECONDS)
        return self._rule is not None

    def end(self) -> None:
        """End what is being written, which then does not appear."""
        left = [one.checkpoint.name for one in (*([self._now[0]] if self._now else []), *self._waiting)]
        self._waiting.clear()
        if self._now is not None:
            self._now[1].end()
            self._now = None
        if left:
            logger.info("not exported yet; the run's next start does it: %s", ", ".join(dict.fromkeys(left)))

    def _start(self, export: _DirectoryToWrite) -> None:
        try:
            export.out.parent.mkdir(parents=True, exist_ok=True)
            if export.out.exists():  # of a checkpoint that the run went back behind
                aside = next(
                    path
                    for i in range(1, 1000)
                    if not (path := export.out.with_name(f"{export.out.name}.{i}")).exists()
                )
                export.out.rename(aside)
                logger.warning("%s was of another checkpoint of that step; it is %s now", export.out, aside.name)
            self._now = (export, ConvertProcess(export.words, self._root / "export.log"))
        except OSError as error:
            self._failed(export, str(error))

    def _report(self, export: _DirectoryToWrite, process: ConvertProcess) -> None:
        if process.wait() == 0:
            logger.info("exported %s", export.out)
        else:
            self._failed(export, process.problem())

    def _failed(self, export: _DirectoryToWrite, problem: str) -> None:
        self._failed_of.add(export.checkpoint)
        logger.error(
            "checkpoint.export_hf: %s was not written, and the run goes on; its checkpoint stays: %s. Try again: "
            "megavlm convert %s",
            export.out,
            problem,
            shlex.join(export.words),
        )
