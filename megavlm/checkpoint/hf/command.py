"""``megavlm convert`` in a process of its own, started by a run: it has one rank, no GPU, and may fail alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megavlm.parallel.processes import signalled_at_parents_end

_OF_A_JOB = ("TORCHELASTIC_", "SLURM_", "PMI_", "OMPI_")
_OF_A_RANK = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_DEVICE_MAX_CONNECTIONS",
}  # fmt: skip
_ERROR = "megavlm: error: "


class ConvertProcess:
    """A ``megavlm convert`` that runs beside this process.

    Args:
        words: what stands behind ``megavlm convert``.
        log: file that its output goes to; written anew.
    """

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self.log = log
        environment = {
            key: value for key, value in os.environ.items() if key not in _OF_A_RANK and not key.startswith(_OF_A_JOB)
        }
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the weights are only copied; a run's GPUs are full
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megavlm", "convert", *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=signalled_at_parents_end(signal.SIGTERM),
            )

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Return its exit code, once it has ended."""
        return self._process.wait()

    def end(self) -> None:
        """End it; what it was writing does not appear."""
        self._process.terminate()
        self._process.wait()

    def said(self) -> list[str]:
        """Return its lines."""
        try:
            return self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []

    def problem(self) -> str:
        """Return what went wrong, in a line."""
        lines = [line for line in self.said() if line.strip()]
        told = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
        code = self._process.returncode
        last = lines[-1] if lines else "it said nothing"
        return "; ".join(told) if told else f"{last} (exit code {code}; its output is in {self.log})"
