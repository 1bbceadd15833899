"""Answers that nobody waits for any more, and the server's end."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from learnt import ANSWER, Learnt
from serving import Served, started
from test_api import HELLO, asking, health, post_json, wait_until


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=600)


def test_a_body_that_does_not_come_gets_408(hooked: Served) -> None:
    netloc = urlsplit(hooked.url)
    with socket.create_connection((netloc.hostname, netloc.port), 10) as one:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 500\r\n"
        )
        one.sendall(f"{head}\r\n{{".encode())
        wait_until(lambda: health(hooked)["requests"] == 1)
        said = b""
        while b"}" not in said and (part := one.recv(65536)):  # head and body may come one after the other
            said += part
        assert b" 408 " in said and b"took longer than 4 s" in said
        while one.recv(65536):  # and it is closed
            pass
    wait_until(lambda: health(hooked)["requests"] == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_nobody_waits_for_is_not_computed_further(stream: bool, hooked: Served) -> None:
    wait_until(lambda: health(hooked)["requests"] == 0)
    before = health(hooked)["tokens"]
    body = json.dumps({"model": "tiny", "messages": asking(hooked.picture), "stream": stream})
    leaving = http.client.HTTPConnection(urlsplit(hooked.url).netloc, timeout=600)
    leaving.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    wait_until(lambda: health(hooked)["tokens"] > before)
    leaving.close()
    wait_until(lambda: health(hooked)["requests"] == 0)
    made = before
    while (now := health(hooked)["tokens"]) != made:  # a token may be in the making; one takes a tenth of this
        made = now
        time.sleep(1.0)
    assert 0 < made - before < 30  # of 34
    # Its place is free at once.
    assert post_json(hooked, {"model": "tiny", "messages": HELLO, "max_tokens": 1})[0] == 200


def test_sigterm_lets_answers_end_for_a_while(learnt: Learnt, tmp_path: Path) -> None:
    hooks = {"STEP_SECONDS": "0.3"}
    with (
        started(learnt.checkpoint, learnt.picture, tmp_path / "log", "--drain=4", hooks=hooks) as ending,
        ThreadPoolExecutor(2) as pool,
    ):
        client, messages = client_of(ending), asking(learnt.picture)

        def ask(**more: Any) -> str:
            events = client.chat.completions.create(model="tiny", messages=messages, stream=True, **more)
            return "".join(event.choices[0].delta.content or "" for event in events)

        assert health(ending)["status"] == "ready"
        first = iter(client.chat.completions.create(model="tiny", messages=HELLO, stream=True, max_tokens=5))
        next(first)
        short, long = pool.submit(ask, max_tokens=4), pool.submit(ask)  # which wait, and are answered together
        list(first)
        wait_until(lambda: health(ending)["tokens"] > 5)
        began = time.monotonic()
        ending.process.send_signal(signal.SIGTERM)
        wait_until(lambda: health(ending)["status"] == "stopping")
        status, said, headers = post_json(ending, {"model": "tiny", "messages": HELLO})
        assert status == 503 and said["error"]["code"] == "stopping" and int(headers["retry-after"]) > 0
        assert short.result() and ANSWER.startswith(short.result())
        with pytest.raises(openai.APIError, match="the server stopped before the answer's end"):
            long.result()
        assert time.monotonic() - began > 3.5  # it had its while
        assert ending.process.wait(300) == 0
        assert "stopped after" in ending.log.read_text()
