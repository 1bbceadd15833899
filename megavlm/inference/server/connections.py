"""Connections with a bound on their number and on their idleness, which uvicorn by itself does not have.

A client holds a slot of the worker only once its request has begun; before that, and while it does not read its answer,
it costs a connection. Here are those bounds: OWASP's "slow HTTP" attacks, and clients that have been forgotten.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

from uvicorn.protocols.http.h11_impl import H11Protocol

from megavlm.inference.server.errors import ApiError, bad_request


def guarded(connections: int, seconds: float) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol, bounded.

    It is the one on h11, which also bounds the size of a request's head.

    Args:
        connections: most of them at once, more get 503.
        seconds: after which one is closed that has not sent a request's head, or does not read what waits for it.
    """

    class Guarded(H11Protocol):
        """A bounded connection."""

        _head: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > connections:
                message = f"the server has {connections} connections, its most"
                transport.write(_whole(ApiError(503, message, code="too_many_connections", retry_after=5)))
                transport.close()
                return
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self.transport.write(_whole(bad_request(msg)))
            self.transport.close()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait_for_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()

        def _wait_for_head(self) -> None:
            if self._head is not None:
                self._head.cancel()
            self._head = self.loop.call_later(seconds, self._check_head)

        def _check_head(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

        def _forget(self) -> None:
            for timer in (self._head, self._unread):
                if timer is not None:
                    timer.cancel()

    return Guarded


def _whole(error: ApiError) -> bytes:
    """Return an answer to what never was a request."""
    body = json.dumps(error.body)
    lines = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **error.headers,
    }
    head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
    return (head + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n" + body).encode()
