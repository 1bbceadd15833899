"""Clients that are slow, silent or many: what a connection may cost, on a real uvicorn with a small application."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from megavlm.inference.server.connections import guarded

SECONDS = 1.2
"""Of silence. What breaks this bound ends no connection at all: Uvicorn's own limit is far beyond (``PATIENCE``)."""
PATIENCE = 300
MOST = 4
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
Server = tuple[tuple[str, int], set[Any]]


async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Say hello; on ``/slow`` later than the bound on silence, on ``/endless`` more than buffers take."""
    if scope["path"] == "/slow":
        await asyncio.sleep(3 * SECONDS)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/endless":
        for _ in range(10_000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Its address, and the connections that it has; a parameter is the bound on silence."""
    config = uvicorn.Config(
        application, http=guarded(MOST, getattr(request, "param", SECONDS)), lifespan="off", log_config=None,
        timeout_graceful_shutdown=1, timeout_keep_alive=PATIENCE,
    )  # fmt: skip
    running = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=running.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname(), running.server_state.connections
        finally:
            running.should_exit = True
            thread.join(PATIENCE)
    assert not thread.is_alive()


def answer(one: socket.socket, until: bytes = b"hello") -> bytes:
    said = b""
    while until not in said and (data := one.recv(65536)):
        said += data
    return said


def ends_after(one: socket.socket) -> float:
    """Seconds until the server closes."""
    began = time.monotonic()
    one.settimeout(PATIENCE)
    try:
        while one.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - began


def test_silence_ends_a_connection(server: Server) -> None:
    with socket.create_connection(server[0], PATIENCE) as one:
        assert SECONDS / 2 < ends_after(one) < PATIENCE


def test_a_head_that_trickles_ends_a_connection(server: Server) -> None:
    head = GET[:-4] + b"A" * 1000  # which would take minutes
    with socket.create_connection(server[0], PATIENCE) as one, pytest.raises(OSError):
        for byte in head:
            one.sendall(bytes([byte]))
            time.sleep(SECONDS / 10)


def test_what_is_no_http_gets_a_reason(server: Server) -> None:
    for sent in (b"hello\r\n\r\n", GET[:-2] + b"A: " + b"a" * 100_000):
        with socket.create_connection(server[0], PATIENCE) as one:
            one.sendall(sent)
            said = answer(one, b"}}")
            assert b" 400 " in said and b"invalid_request_error" in said


def test_so_does_silence_after_an_answer_but_not_waiting_for_one(server: Server) -> None:
    with socket.create_connection(server[0], PATIENCE) as one:
        for path in (b"/", b"/slow", b"/"):
            one.sendall(GET.replace(b"/ ", path + b" "))
            assert b"200 OK" in answer(one)
            time.sleep(SECONDS / 12)
        assert ends_after(one) < PATIENCE


@pytest.mark.parametrize("server", [PATIENCE], indirect=True)  # none ends meanwhile
def test_more_connections_are_refused_with_a_reason(server: Server) -> None:
    held = [socket.create_connection(server[0], PATIENCE) for _ in range(MOST)]
    try:
        while len(server[1]) < MOST:
            time.sleep(0.01)
        with socket.create_connection(server[0], PATIENCE) as one:
            said = answer(one, b"}}")
        assert b" 503 " in said and b"too_many_connections" in said and b"Retry-After" in said
    finally:
        for one in held:
            one.close()
    while server[1]:
        time.sleep(0.01)
    with socket.create_connection(server[0], PATIENCE) as one:
        one.sendall(GET)
        assert b"200 OK" in answer(one)


def test_an_answer_that_is_not_read_ends_a_connection(server: Server) -> None:
    with socket.create_connection(server[0], PATIENCE) as one:
        one.sendall(GET.replace(b"/ ", b"/endless "))
        deadline = time.monotonic() + PATIENCE
        while not server[1] or not any(each.flow.write_paused for each in server[1]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        while server[1]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
