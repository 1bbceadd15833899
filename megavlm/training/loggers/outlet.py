"""The run's side of its loggers: hands figures and pictures to their processes, and never waits for them."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megavlm.config.help import to_tree, to_yaml
from megavlm.config.schema import Recipe
from megavlm.training.loggers.known import FOLDER, Known, wanted

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0
"""What a logger has at the end of the run to send what it still has."""
_PENDING, _PICTURES = 20_000, 50
"""Items, and pictures among them, that wait for a server at most; later ones are left out and counted."""


def open_outlets(recipe: Recipe, step: int) -> list[Outlet]:
    """Start the loggers that a recipe asks for; what goes wrong with one is said, and leaves it out.

    Args:
        recipe: the run.
        step: the one that it goes on from.
    """
    folder, outlets = Path(recipe.output_dir) / FOLDER, []
    for known, setting in wanted(recipe.logging):
        start = {
            "name": Path(recipe.output_dir).resolve().name, "setting": setting, "folder": str(folder.resolve()),
            "recipe": to_tree(recipe), "recipe_yaml": to_yaml(recipe), "step": step,
        }  # fmt: skip
        try:
            folder.mkdir(parents=True, exist_ok=True)
            outlets.append(Outlet(known, start))
        except OSError as error:
            logger.warning("%s: cannot be started, and the run goes on without it: %s", known.title, error)
    return outlets


class Outlet:
    """One logger's process.

    Args:
        known: which.
        start: what :mod:`megavlm.training.loggers.process` reads first.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, known: Known, start: Mapping[str, Any]) -> None:
        self.title, self._left_out = known.title, 0
        self._given = self._sent = self._pictures = 0
        self._closing = False
        self._log = Path(start["folder"]) / f"{known.key}.log"
        words = [sys.executable, "-m", "megavlm.training.loggers.process", known.key]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        self._items: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        self._items.put(start)
        self._threads = [
            threading.Thread(target=work, name=f"{known.key}-{work.__name__}", daemon=True)
            for work in (self._write, self._read)
        ]
        for thread in self._threads:
            thread.start()

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Hand over figures of a step."""
        self._put({"step": step, "values": dict(values)})

    def picture(self, name: str, pixels_HWC: NDArray[np.uint8], step: int) -> None:
        """Hand over a picture, [H, W, 3]."""
        if self._pictures >= _PICTURES:
            self._leave_out()
            return
        self._pictures += 1
        self._put({"step": step, "name": name, "pixels": pixels_HWC.copy()})

    def _put(self, item: Mapping[str, Any]) -> None:
        if self._given - self._sent >= _PENDING:
            self._leave_out()
        else:
            self._given += 1
            self._items.put(item)

    def _leave_out(self) -> None:
        if not self._left_out:
            logger.warning("%s: too much waits for it; what comes now is in metrics.jsonl only", self.title)
        self._left_out += 1

    def close(self, done: bool | None) -> None:
        """Wait until all is sent, at most CLOSE_SECONDS.

        Args:
            done: the run is complete; False where it was stopped, None where it failed.
        """
        self._closing, deadline = True, time.monotonic() + CLOSE_SECONDS
        self._items.put({"end": done})
        self._items.put(None)
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):  # with what it has started itself
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            logger.warning("%s: did not end within %g seconds (%s)", self.title, CLOSE_SECONDS, self._log)
        for thread in self._threads:
            thread.join(max(1.0, deadline - time.monotonic()))
        missing = self._given - self._sent + self._left_out
        if missing:
            logger.warning(
                "%s: %d figures or pictures were not sent; figures are in metrics.jsonl", self.title, missing
            )

    def _write(self) -> None:
        """Hand items on, on a thread: the pipe is full where the process is stuck."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it ended; whoever reads from it says so
            while (item := self._items.get()) is not None:
                if "pixels" in item:
                    self._pictures -= 1
                    item = {"step": item["step"], "name": item["name"], "png": _png(item["pixels"])}
                self._process.stdin.write(json.dumps(item).encode() + b"\n")
                self._process.stdin.flush()
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _read(self) -> None:
        """Tell what comes back."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            self._sent += message.get("sent", 0)
            if "say" in message:
                logger.info("%s", message["say"])
        if not self._closing:
            logger.warning("%s: its process ended, and the run goes on without it; see %s", self.title, self._log)


def _png(pixels_HWC: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
