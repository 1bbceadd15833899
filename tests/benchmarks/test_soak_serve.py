"""The server's soak finds a server that breaks the rules, and sends the same for the same seed."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from launch import ROOT


@pytest.fixture
def soak_serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import soak_serve

    return soak_serve


@contextmanager
def answering(*answers: tuple[int, bytes]) -> Iterator[str]:
    """A server whose first answer is right, and whose further ones are ``answers`` in turn."""
    right = json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()
    asked = iter([(200, right)])
    count = 0

    class Handler(BaseHTTPRequestHandler):
        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._send(200, json.dumps({"data": [{"id": "tiny"}], "requests": 0}).encode())

        def do_POST(self) -> None:
            nonlocal count
            self.rfile.read(int(self.headers["Content-Length"]))
            count += 1
            self._send(*next(asked, answers[count % len(answers)]))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ((500, b'{"error": {"message": "failed"}}'), "500"),
        ((400, json.dumps({"error": {"message": "A" * 9000}}).encode()), "400 with 9"),
        ((400, b"no"), "no JSON"),
        ((200, b'{"choices": [{"message": {"content": "no"}}]}'), "'no' for 'yes'"),
        ((200, b'data: {"choices": []}\n\n'), "the stream ends with"),
    ],
)
def test_each_rule_is_found(answer: tuple[int, bytes], rule: str, soak_serve: Any) -> None:
    lines: list[str] = []
    with answering(answer) as url:
        assert soak_serve.main([url, "--requests=12", "--clients=2", "--seed=3"], lines.append) == 1
    assert any(line.startswith("- request") and rule in line for line in lines), lines


def test_a_server_that_keeps_them_passes(soak_serve: Any) -> None:
    lines: list[str] = []
    with answering((200, b'{"choices": [{"message": {"content": "yes"}}]}')) as url:
        assert soak_serve.main([url, "--requests=12", "--clients=2"], lines.append) == 0
    assert lines[0].startswith("| requests |") and lines[2].startswith("| 12 |") and lines[2].endswith("| 0 |\n")


def test_the_same_seed_sends_the_same(soak_serve: Any) -> None:
    def sent() -> list[bytes]:
        rngs = [random.Random(f"7/{number}") for number in range(50)]
        return [soak_serve.mutated({**soak_serve.untouched(b"picture", rng), "model": "tiny"}, rng) for rng in rngs]

    assert sent() == sent() and len(set(sent())) > 45
