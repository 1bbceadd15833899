"""The server's parts by themselves: stop texts, remote pictures, dropped conversations, several ranks."""

from __future__ import annotations

import argparse
import ipaddress
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest
from learnt import ANSWER, QUESTION, Learnt
from serving import serving
from test_api import asking

from megavlm.cli import main
from megavlm.data.schema import Turn
from megavlm.inference.checkpoint import add_model_arguments, model_of
from megavlm.inference.sampling import Sampling
from megavlm.inference.server.remote import RemoteError, fetch, is_public
from megavlm.inference.server.stops import StopScanner
from megavlm.inference.session import Asked, session
from megavlm.inference.turns import user_turn


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stop_texts_are_found_however_a_text_is_cut(size: int) -> None:
    text = "abcab</s>cabcd rest"
    pieces = [text[k : k + size] for k in range(0, len(text), size)]

    def shown(*stops: str) -> tuple[str, bool]:
        scanner = StopScanner(stops)
        said = [scanner.feed(piece, last=k == len(pieces) - 1) for k, piece in enumerate(pieces)]
        return "".join(said), scanner.hit

    assert shown("abcd") == ("abcab</s>c", True)
    assert shown("abcd", "</s>") == ("abcab", True)
    assert shown("rest of") == (text, False) and shown() == (text, False)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1",
        "::", "fec0::1",
    ],
)  # fmt: skip
def test_inner_addresses_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


def test_outer_addresses_are_public() -> None:
    assert all(is_public(ipaddress.ip_address(one)) for one in ("8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"))


class _Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        where = self.path.strip("/")
        if where == "slow":
            self.send_response(200)
            for _ in range(50):  # a byte now and then, for ever
                time.sleep(0.1)
                try:
                    self.wfile.write(b"X")
                except OSError:
                    return
            return
        self.send_response(302 if where in ("again", "inside") else 404 if where == "none" else 200)
        if where in ("again", "inside"):
            self.send_header("Location", "/again" if where == "again" else "http://192.168.0.1/")
        self.end_headers()
        self.wfile.write(b"x" * (3 << 20 if where == "large" else 10))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def _local(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_loopback


def test_remote_pictures_have_bounds(site: str) -> None:
    site = site.replace("localhost", "127.0.0.1")
    assert fetch(f"{site}/a.png?b=c", limit=100, seconds=5, allowed=_local) == b"x" * 10
    for path, reason in (
        ("large", "larger than 1 MiB"),
        ("none", "answered 404"),
        ("again", "more than 3 redirects"),
        ("inside", "private"),
    ):
        with pytest.raises(RemoteError, match=reason):
            fetch(f"{site}/{path}", limit=1 << 20, seconds=5, allowed=_local)
    began = time.monotonic()
    with pytest.raises(RemoteError, match="took too long"):
        fetch(f"{site}/slow", limit=1 << 20, seconds=0.5, allowed=_local)
    assert time.monotonic() - began < 3


def test_remote_pictures_are_no_way_in(site: str) -> None:
    with pytest.raises(RemoteError, match="private"):
        fetch(f"{site}/a.png", limit=100, seconds=5)
    for url in ("file:///etc/passwd", "ftp://a/b", "http://me@8.8.8.8/", "http:///a", "gopher://a"):
        with pytest.raises(RemoteError, match="only http and https"):
            fetch(url, limit=100, seconds=5)
    for url in ("http://127.1/", "http://2130706433/", "http://[::1]/", "http://[::ffff:127.0.0.1]/"):
        with pytest.raises(RemoteError, match=r"private|not known"):
            fetch(url, limit=100, seconds=5)


def test_each_conversation_has_its_own_sampling_and_length_and_may_be_dropped(learnt: Learnt) -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    recipe, checkpoint, tokenizer = model_of(parser.parse_args([str(learnt.checkpoint)]))
    shown = Asked((user_turn(QUESTION, 1),), (learnt.picture.read_bytes(),))
    plain = Asked((Turn("user", "Tell me a story"),))
    asked, most = [shown, plain, plain, shown], [40, 9, 30, 5]
    kinds = [Sampling(), Sampling(temperature=2.0, seed=3), Sampling(temperature=1.5, top_p=0.9, seed=4), Sampling()]
    with session(recipe, checkpoint, tokenizer) as model:
        alone = []
        for one, new, kind in zip(asked, most, kinds, strict=True):
            alone.append(list(model.ask(one, max_new_tokens=new, sampling=kind)))
        said: list[list] = [[], [], [], []]
        for pieces in model.ask_all(asked, max_new_tokens=most, sampling=kinds):
            for i, piece in pieces.items():
                said[i].append(piece)
        assert said == alone and "".join(piece.text for piece in said[0]) == ANSWER and len(said[3]) == 5
        gone: list[list] = [[], [], [], []]
        for pieces in model.ask_all(
            asked, max_new_tokens=most, sampling=kinds, dropped=lambda: [0, 2] if len(gone[0]) >= 3 else []
        ):
            for i, piece in pieces.items():
                gone[i].append(piece)
        assert gone == [alone[0][:3], alone[1], alone[2][:3], alone[3]]


def test_two_ranks_serve_as_one(learnt: Learnt, tmp_path: Path) -> None:
    words = ("parallel.pipeline_model_parallel_size=2",)
    with serving(learnt.checkpoint, learnt.picture, tmp_path / "log", *words, ranks=2) as two:
        client = openai.OpenAI(base_url=f"{two.url}/v1", api_key="none", max_retries=0, timeout=60)
        messages = asking(two.picture)
        with client.chat.completions.create(model="tiny", messages=messages, stream=True) as stream:
            next(iter(stream))  # and leaves
        with pytest.raises(openai.BadRequestError, match="image 1"):
            client.chat.completions.create(model="tiny", messages=asking(b"broken"))
        assert client.chat.completions.create(model="tiny", messages=messages).choices[0].message.content == ANSWER


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--batch=0",), "--batch must be at least 1"),
        (("--pixels=99999999",), "--pixels must be at most"),
        (("--temperature=-1",), "temperature: -1.0 must be 0 or more"),
        (("--host=256.0.0.1",), "cannot listen there"),
        (("--port=99999",), "cannot listen there"),
    ],
)
def test_wrong_arguments_cost_a_line(words: tuple[str, ...], reason: str, learnt: Learnt, capsys) -> None:
    assert main(["serve", str(learnt.checkpoint), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and reason in error[0]
