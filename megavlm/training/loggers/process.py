"""A logger's own process: takes figures and pictures from the run, and brings them to the package's server.

A server that is slow or down, a package that hangs or prints or dies cannot hold up training, and neither can signals
that are meant for the run end this process before it has sent what it has. It reads JSON lines from stdin (the first
one says what run it is, the last one how it ended) and answers with JSON lines: ``{"say": text}`` for people,
``{"sent": count}``. Whatever the packages print goes to ``loggers/NAME.log`` in the run's directory.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from megavlm.training.loggers import backends
from megavlm.training.loggers.backends import Backend, Start, one_line
from megavlm.training.loggers.known import LOGGERS


class KeptRun:
    """What the run's directory keeps of a logger's run, so that a restart goes on with it: id, and the last step sent.

    Args:
        path: a file of JSON.
        step: the one that the run goes on from. One that begins anew gets a new run.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self.run: str | None = None
        self.sent = 0
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if step > 0 and isinstance(found["run"], str):
                self.run, self.sent = found["run"], int(found["step"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or cut off by a crash: a new run

    def write(self, run: str, sent: int) -> None:
        """Keep them.

        Raises:
            OSError: the disk is full, say, which packages that write there themselves do not always tell.
        """
        self.run, self.sent = run, sent
        beside = self._path.with_name(f"{self._path.name}.new")
        beside.write_text(json.dumps({"run": run, "step": sent}), encoding="utf-8")
        beside.replace(self._path)


class Answers:
    """What goes back to the run.

    Args:
        title: how people call the logger.
        out: a line each.
    """

    def __init__(self, title: str, out: TextIO) -> None:
        self._title, self._out = title, out

    def say(self, text: str) -> None:
        """Tell people."""
        self._write({"say": f"{self._title}: {text}"})

    def sent(self) -> None:
        """An item is there."""
        self._write({"sent": 1})

    def _write(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the run was killed
            print(json.dumps(message), file=self._out, flush=True)


class Sender:
    """Brings items to a backend, each once, in order, again and again until it takes them.

    Args:
        backend: what takes them.
        state: of its run.
        answers: to the run.
        again_seconds: between attempts where a server does not answer.
    """

    def __init__(self, backend: Backend, state: KeptRun, answers: Answers, again_seconds: float = 15.0) -> None:
        self._backend, self._state, self._answers = backend, state, answers
        self._again_seconds = again_seconds
        self._open = self._troubled = False
        self._floor, self._step = state.sent, 0
        self.ended = threading.Event()
        """No more items come: what the backend does not take at once is given up."""

    def run(self, items: Iterator[Mapping[str, Any]]) -> None:
        """Send all items; the last one may say how the run ended."""
        done: bool | None = None
        self._begin()  # at once: a login that is missing is said before the first step
        for item in items:
            if "end" in item:
                done = item["end"]
                continue
            # Else it is there already: the run takes the step again.
            if item["step"] > self._floor and not self._bring(item):
                break
            self._answers.sent()
        if not self._open:
            return
        try:
            if self._step and self._state.run is not None:
                self._state.write(self._state.run, self._step)
            self._backend.close(done)
        except Exception as error:  # of packages that we do not know
            if not self._troubled:
                self._answers.say(f"{one_line(error)} It may not have all figures; they are in metrics.jsonl.")

    def _begin(self) -> bool:
        """Begin or go on with a run, if it is not done yet; returns whether it is."""
        try:
            if not self._open:
                run, where = self._backend.open()
                self._open = True
                self._answers.say(where)
                self._state.write(run, self._state.sent)
        except Exception as error:
            self._trouble(error)
        return self._open

    def _bring(self, item: Mapping[str, Any]) -> bool:
        """Send an item; False where the backend never took it."""
        while True:
            if self._begin():
                try:
                    self._send(item)
                except (ValueError, TypeError) as error:  # of the item, not of the server
                    self._answers.say(f"{one_line(error)} Figures of step {item['step']} are in metrics.jsonl only.")
                    return True
                except Exception as error:
                    self._trouble(error)
                else:
                    if self._troubled:
                        self._troubled = False
                        self._answers.say("it answers again; nothing was lost.")
                    return True
            if self.ended.wait(self._again_seconds):
                return False

    def _trouble(self, error: Exception) -> None:
        """Say what is wrong, once until it is mended."""
        if not self._troubled:
            self._troubled = True
            self._answers.say(
                f"{one_line(error)} Training goes on; figures are in metrics.jsonl, and are sent once it answers."
            )

    def _send(self, item: Mapping[str, Any]) -> None:
        step = item["step"]
        if self._step and step > self._step and self._state.run is not None:
            self._state.write(self._state.run, self._step)  # all of that step is sent
        if "png" in item:
            self._backend.picture(item["name"], base64.b64decode(item["png"]), step)
        else:
            self._backend.figures(item["values"], step)
        self._step = step


def _items(source: BinaryIO, ended: threading.Event) -> Iterator[Mapping[str, Any]]:
    """Yield what the run sends; a thread reads, so that the end is seen while an item waits for its server."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        for line in source:
            lines.put(line)
            if line.startswith(b'{"end"'):
                break
        ended.set()
        lines.put(b"")

    threading.Thread(target=read, name="items", daemon=True).start()
    while line := lines.get():
        yield json.loads(line)


def main(key: str) -> None:
    """Be the process of the logger called ``key``."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print goes where the run has put our errors: the log file
    first = json.loads(sys.stdin.buffer.readline())
    folder = Path(first["folder"])
    known = next(one for one in LOGGERS if one.key == key)
    state = KeptRun(folder / f"{key}.json", first["step"])
    start = Start(first["name"], first["setting"], folder, first["recipe"], first["recipe_yaml"], state.run)
    answers = Answers(known.title, own)
    backend: Backend = getattr(backends, known.backend)(start, answers.say)
    sender = Sender(backend, state, answers)
    sender.run(_items(sys.stdin.buffer, sender.ended))


if __name__ == "__main__":
    main(sys.argv[1])
