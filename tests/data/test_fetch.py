"""Pictures are fetched only where that was allowed, only from public addresses, and within limits."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from data_helpers import encode_image, prepare
from PIL import Image
from test_prepare import chat, members

from megavlm.data import fetch
from megavlm.data.fetch import FetchError

PICTURE = encode_image(Image.new("RGB", (40, 30), (9, 99, 199)))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.split("/")[-1]
        if name == "slow":
            for _ in range(600):
                self.wfile.write(b"H")
                self.wfile.flush()
                time.sleep(0.1)
        elif name in ("there", "round", "inside", "file"):
            port = self.server.server_address[1]
            to = {
                "there": "a.jpg",
                "round": "round",
                "inside": f"http://127.0.0.2:{port}/a.jpg",
                "file": "file:///etc/passwd",
            }
            self.send_response(302)
            self.send_header("Location", to[name])
            self.end_headers()
        else:
            body = PICTURE if name == "a.jpg" else b"x" * 5000
            self.send_response(404 if name == "absent" else 200)
            if name != "unsaid":
                self.send_header("Content-Length", str(len(body) + 10 * (name == "cut")))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server on 127.0.0.1, which alone counts as a public address."""
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("address", "public"),
    [("8.8.8.8", True), ("2606:4700::1111", True), ("64:ff9b::808:808", True), ("127.0.0.1", False), ("::1", False),
     ("10.1.2.3", False), ("192.168.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False),
     ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False), ("2002:7f00:1::", False), ("fe80::1%eth0", False),
     ("fc00::1", False), ("224.0.0.1", False), ("fec0::1", False),
     ("255.255.255.255", False), ("::", False)],
)  # fmt: skip
def test_what_is_public(address: str, public: bool) -> None:
    assert fetch.is_public(address) is public


def test_a_local_server_is_not_asked() -> None:
    asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *_: asked.append(1)) as running:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(FetchError, match="has an address that is not public"):
                fetch.fetch(f"http://{host}:{running.server_address[1]}/a.jpg")
    assert not asked


def test_pictures_and_redirects(server: str) -> None:
    assert fetch.fetch(f"{server}/a.jpg") == PICTURE
    assert fetch.fetch(f"{server}/there") == PICTURE
    assert fetch.fetch(f"{server}/unsaid") == b"x" * 5000


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/inside", "127.0.0.2 has an address that is not public"),
        ("/file", "only http and https"),
        ("/round", "more than 3 redirects"),
        ("/absent", "answered 404"),
        ("/big", "5,000 bytes, at most 4,000"),
        ("/unsaid", "more than 4,000 bytes"),
        ("/slow", "took too long"),
        ("/a b", "spaces"),
    ],
)
def test_what_is_refused(server: str, path: str, reason: str) -> None:
    started = time.monotonic()
    with pytest.raises(FetchError, match=reason):
        fetch.fetch(server + path, max_bytes=4000, timeout=0.5 if path == "/slow" else 300)
    assert time.monotonic() - started < 50  # the slow one takes 60 s


def test_a_cut_answer_is_refused(server: str) -> None:
    with pytest.raises(FetchError):
        fetch.fetch(f"{server}/cut")


def test_prepare_fetches_only_if_allowed(tmp_path: Path, server: str) -> None:
    (tmp_path / "images").mkdir()
    records = [chat(f"<img>{server}/a.jpg</img>What?"), chat(f"<img> {server}/absent </img>"), chat("text only")]
    out = prepare(tmp_path, records, name="off", images=tmp_path / "images")
    assert sorted(members(out)) == ["off-00000002.json"]
    out = prepare(tmp_path, records, name="on", images=tmp_path / "images", allow_urls=True)
    found = members(out)
    assert sorted(found) == ["on-00000000.img0", "on-00000000.json", "on-00000002.json"]
    assert found["on-00000000.img0"] == PICTURE
    assert b"http" not in found["on-00000000.json"]
    (rejected,) = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert rejected["cause"] == "image not fetched"
