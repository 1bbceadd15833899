"""Work that a thread does while its caller goes on."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megavlm.parallel.device import has_cuda, use_local_device


@functools.cache
def _side_stream() -> Any:
    """Return the stream of all such work.

    One for good: the allocator keeps freed memory for the stream that it was made on, and torch goes round 32 streams.
    """
    return torch.cuda.Stream()


_NICENESS = 10
"""On a CPU, of the thread: the caller gets nine tenths of a core that both want, and it is what others wait for."""


class SideWork:
    """Makes tensors in a thread, without gradients; on a GPU on a stream beside the caller's.

    What the work reads must not change until :meth:`result`. It may call no collective, and draw no random number:
    others do meanwhile.

    Args:
        work: what to do.
    """

    def __init__(self, work: Callable[[], Sequence[Tensor]]) -> None:
        self._work, self._made = work, list[Tensor]()
        self._error: BaseException | None = None
        self._stream = _side_stream() if has_cuda() else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        self._thread = threading.Thread(target=self._run, name="megavlm-side-work", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        use_local_device()
        if self._stream is None and sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)
        stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        try:
            with stream, torch.no_grad():
                self._made = list(self._work())
        except BaseException as error:  # the caller's, in :meth:`result`
            self._error = error

    def result(self) -> list[Tensor]:
        """Wait for the work, and return what it made.

        Raises:
            BaseException: what it raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            for one in self._made:
                one.record_stream(current)
        return self._made
