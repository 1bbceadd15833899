"""Whether a running ``megavlm serve`` survives its clients: mutated requests, torn connections, clients that leave.

``python benchmarks/soak_serve.py http://127.0.0.1:8000 --requests 3000``: several clients at once send requests that
were right before something in them was changed (a value, a message, a picture, bytes of the JSON). Among them are
untouched ones, whose answer must stay what it was. Each answer must be one of OpenAI's API, no error may be the
server's (5xx) or repeat much of what was sent, and nothing may be held afterwards. Prints a Markdown table; exit code 1
says that a rule was broken, and how. Bounded by ``--requests`` and ``--seconds``; the same ``--seed`` sends the same
requests.
"""

from __future__ import annotations

import argparse
import base64
import copy
import http.client
import io
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

LARGEST_ERROR = 2000
"""Bytes of an answer that is an error."""
_ENOUGH = 20
"""Broken rules after which no more is sent."""


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, 1.0, 2.0, 1e-5, 1e-45, 1e-300, 5e-324, 1e300, 1e308, 2**31, 2**63, 2**64,
    10**400, -(10**400), float("nan"), float("inf"), -float("inf"), "", " ", "\0", "a", "0", "1", "\ud800", "a\udfff",
    "\U0001f600", "\u2581", "<img>", "</img>", "<|im_start|>", "<|im_end|>\n<|im_start|>system\n", "A" * 100_000, [],
    {}, [[]],
    [None], {"": None}, {"type": "text"}, {"type": "json_object"}, ["text"], ["a", "b"], _nested(300), {"url": "x"},
)  # fmt: skip
_EXTREMES = (0.0, 5e-324, 1e-300, 1e-45, 1e-38, 1e-5, 1)
_FIELDS = (
    "model", "messages", "temperature", "temperature", "top_p", "top_p", "top_k", "repetition_penalty",
    "repetition_penalty", "max_tokens", "max_completion_tokens", "n", "seed", "stop", "stream", "stream_options",
    "logprobs", "top_logprobs", "tools", "tool_choice", "response_format", "logit_bias", "presence_penalty", "user",
    "metadata", "min_p", "skip_special_tokens", "guided_json", "best_of", "no_such_field", "\ud800", "A" * 5000,
)  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "User", "", None, 3, ["user"])
_URLS = (
    "", "data:", "data:,", "data:image/png;base64", "data:image/png;base64,", "data:image/png;base64,A", "http://",
    "http://[", "http://127.0.0.1:1/a.png", "http://a..b/", f"http://{'a' * 70}.example/", "file:///etc/passwd", "ftp://a",
    "data:image/svg+xml;base64,PHN2Zy8+", "A" * 100_000, "\ud800", "//a", "javascript:1",
)  # fmt: skip


def untouched(picture: bytes, rng: random.Random) -> dict[str, Any]:
    """Return a request that is right: text alone or with a picture, whole or streamed, greedy or drawn."""
    text = {"type": "text", "text": rng.choice(("Where is the red disc?", "Tell me a story.", "1 2 3 \u4e2d\u6587"))}
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    content: Any = [{"type": "image_url", "image_url": {"url": url}}, text] if rng.random() < 0.5 else text["text"]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if rng.random() < 0.3:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello."}, *messages]  # fmt: skip
    body = {"model": "", "messages": messages, "max_tokens": rng.randint(1, 6)}
    if rng.random() < 0.3:
        body |= {"temperature": 1.0, "top_p": 0.9, "seed": rng.randrange(99)}
    if rng.random() < 0.3:
        body["stream"] = True
    return body


def mutated(body: dict[str, Any], rng: random.Random) -> bytes:
    """Return a request as JSON with one to three things changed in it."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        rng.choice((_change_field, _change_sampling, _change_message, _change_content, _change_picture))(body, rng)
    data = json.dumps(body, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    return _change_bytes(data, rng) if rng.random() < 0.2 else data


def _change_field(body: dict[str, Any], rng: random.Random) -> None:
    body[rng.choice(_FIELDS)] = copy.deepcopy(rng.choice(_VALUES))


def _change_sampling(body: dict[str, Any], rng: random.Random) -> None:
    """Ask for what is allowed and hard to compute."""
    body.setdefault("temperature", 1.0)
    body[rng.choice(("temperature", "top_p", "repetition_penalty"))] = rng.choice(_EXTREMES)


def _change_message(body: dict[str, Any], rng: random.Random) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return
    place = rng.randrange(len(messages))
    message = messages[place]
    kind = rng.randrange(6)
    if kind == 0:
        messages.insert(place, copy.deepcopy(message))
    elif kind == 1:
        messages.pop(place)
    elif kind == 2:
        messages[place] = copy.deepcopy(rng.choice(_VALUES))
    elif isinstance(message, dict) and kind == 3:
        message["role"] = rng.choice(_ROLES)
    elif isinstance(message, dict) and kind == 4:
        message[rng.choice(("name", "refusal", "tool_calls", "audio", "images", "\ud800"))] = rng.choice(_VALUES)
    elif isinstance(message, dict):
        message.pop(rng.choice(sorted(message)) if message else "", None)


def _change_content(body: dict[str, Any], rng: random.Random) -> None:
    messages = body.get("messages")
    message = rng.choice(messages) if isinstance(messages, list) and messages else None
    if not isinstance(message, dict):
        return
    parts = message.get("content")
    if not isinstance(parts, list) or not parts or rng.random() < 0.3:
        message["content"] = copy.deepcopy(rng.choice(_VALUES))
        return
    part = rng.choice(parts)
    if isinstance(part, dict) and rng.random() < 0.8:
        part[rng.choice(("type", "text", "image_url", "refusal", "extra"))] = copy.deepcopy(rng.choice(_VALUES))
    else:
        parts[rng.randrange(len(parts))] = rng.choice(({"type": "text", "text": "<im"}, part, *_VALUES))


def _change_picture(body: dict[str, Any], rng: random.Random) -> None:
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            inner = part.get("image_url") if isinstance(part, dict) else None
            if isinstance(inner, dict) and isinstance(inner.get("url"), str):
                inner["url"] = _changed_url(inner["url"], rng)


def _changed_url(url: str, rng: random.Random) -> str:
    head, _, digits = url.partition(",")
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(_URLS)
    if kind == 1:
        return f"{head},{digits.rstrip('=')}"
    if kind == 2:
        return f"{head},{digits[:40]}\n {digits[40:]}"
    if kind == 3:
        return f"{head},{digits[: rng.randrange(len(digits) + 1)]}"
    if kind == 4:
        return digits
    try:
        data = bytearray(base64.b64decode(digits))
    except ValueError:
        return digits
    for _ in range(rng.randint(1, 8)):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    return f"{head},{base64.b64encode(data).decode()}"


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.randbytes(rng.randint(1, 4)) + data[place:]
    if kind == 2:
        return data[:place] + data[place + rng.randint(1, 8) :]
    return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))


@dataclass
class Report:
    """What came back."""

    statuses: Counter[str] = field(default_factory=Counter)
    """By status; ``left`` where the client left on purpose."""
    faults: list[str] = field(default_factory=list)
    """Each broken rule, with the request."""
    seconds: list[float] = field(default_factory=list)
    """Of each answer."""


def soak(
    url: str, picture: bytes, count: int, *, seed: int, clients: int, seconds: float = float("inf"), leave: float = 0.05
) -> Report:
    """Send requests and look at what comes back.

    Args:
        url: of the server, without /v1.
        picture: an image file for those that show one.
        count: most requests.
        seed: what they are follows from it.
        clients: how many ask at once.
        seconds: after which no more are sent.
        leave: share of clients that leave before their answer.
    """
    netloc, report = urlsplit(url).netloc, Report()
    model = json.loads(_got(netloc, "/v1/models"))["data"][0]["id"]
    known = _known(netloc, model, picture)
    deadline = time.monotonic() + seconds

    def ask(number: int) -> None:
        if time.monotonic() > deadline or len(report.faults) >= _ENOUGH:
            return
        try:
            ask_once(number)
        except (OSError, http.client.HTTPException) as error:
            report.faults.append(f"request {number}: no answer: {type(error).__name__}: {error}")

    def ask_once(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        began = time.monotonic()
        if number % 10 == 9:
            status, said = _posted(netloc, json.dumps(known.body).encode())
            fault = _fault(status, said) or known.fault(status, said)
            sent = b"the untouched request"
        else:
            sent = mutated({**untouched(picture, rng), "model": model}, rng)
            if rng.random() < leave:
                _torn(netloc, sent, rng)
                report.statuses["left"] += 1
                return
            status, said = _posted(netloc, sent)
            fault = _fault(status, said)
        report.seconds.append(time.monotonic() - began)
        report.statuses[str(status)] += 1
        if fault is not None:
            report.faults.append(f"request {number}: {fault}; sent: {sent[:300]!r}")

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(count)))
    _wait_until_free(netloc, report)
    return report


@dataclass(frozen=True)
class _Known:
    """A request and the answer that it has."""

    body: dict[str, Any]
    answer: str

    def fault(self, status: int, said: bytes) -> str | None:
        """Return what is wrong with another answer to it."""
        answer = _answer(said) if status == 200 else None
        return None if answer == self.answer else f"{status}, {answer!r} for {self.answer!r}"


def _known(netloc: str, model: str, picture: bytes) -> _Known:
    body = {**untouched(picture, random.Random(0)), "model": model, "temperature": 0, "stream": False}
    status, said = _posted(netloc, json.dumps(body).encode())
    if status != 200:
        raise SystemExit(f"the server does not answer a request that is right: {status} {said[:300]!r}")
    return _Known(body, _answer(said))


def _answer(said: bytes) -> str:
    text: str = json.loads(said)["choices"][0]["message"]["content"]
    return text


def _got(netloc: str, path: str) -> bytes:
    connection = http.client.HTTPConnection(netloc, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


def _posted(netloc: str, body: bytes) -> tuple[int, bytes]:
    """Return status and answer; 429 is obeyed, as OpenAI's client does."""
    while True:
        connection = http.client.HTTPConnection(netloc, timeout=120)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            said = response.read()
        finally:
            connection.close()
        if response.status != 429:
            return response.status, said
        time.sleep(0.2)


def _torn(netloc: str, body: bytes, rng: random.Random) -> None:
    """Leave after a part of the request, or before the answer."""
    connection = http.client.HTTPConnection(netloc, timeout=60)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[: rng.choice((len(body), len(body) // 2))])
    time.sleep(rng.choice((0, 0.02)))
    connection.close()


def _fault(status: int, said: bytes) -> str | None:
    """Return what is wrong with an answer, or None."""
    if status == 200 and said.startswith(b"data: "):
        events = [line[len(b"data: ") :] for line in said.split(b"\n\n") if line]
        if events[-1] != b"[DONE]":
            return f"the stream ends with {events[-1][-200:]!r}"
        errors = [event for event in events[:-1] if b'"error"' in event[:20]]
        return f"an error in the stream: {errors[0][:300]!r}" if errors else None
    try:
        answer = json.loads(said)
    except ValueError:
        return f"{status}, which is no JSON: {said[:300]!r}"
    if status == 200:
        return None if answer.get("choices") else f"200 without an answer: {said[:300]!r}"
    if status >= 500 or not isinstance(answer.get("error", {}).get("message"), str):
        return f"{status} {said[:300]!r}"
    return f"{status} with {len(said)} bytes" if len(said) > LARGEST_ERROR else None


def _wait_until_free(netloc: str, report: Report) -> None:
    """Nothing may be held when nobody asks."""
    deadline = time.monotonic() + 60
    try:
        while (held := json.loads(_got(netloc, "/health"))["requests"]) and time.monotonic() < deadline:
            time.sleep(0.1)
    except (OSError, http.client.HTTPException) as error:
        report.faults.append(f"the server is gone: {type(error).__name__}: {error}")
        return
    if held:
        report.faults.append(f"{held} requests are held though nobody asks")


def _table(report: Report, seconds: float) -> Iterator[str]:
    yield "| requests | seconds | " + " | ".join(sorted(report.statuses)) + " | slowest answer, s | rules broken |"
    yield "|" + "---|" * (4 + len(report.statuses))
    counts = " | ".join(str(report.statuses[name]) for name in sorted(report.statuses))
    slowest = max(report.seconds, default=0.0)
    yield f"| {report.statuses.total()} | {seconds:.0f} | {counts} | {slowest:.2f} | {len(report.faults)} |"


def main(argv: Sequence[str] | None = None, write: Callable[[str], object] = sys.stdout.write) -> int:
    """Soak and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, without /v1")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no more are sent")
    parser.add_argument("--clients", type=int, default=8, help="how many ask at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", type=Path, help="the picture (default: a drawn one)")
    args = parser.parse_args(argv)
    if args.image is None:
        out = io.BytesIO()
        Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(out, "PNG")
        picture = out.getvalue()
    else:
        picture = args.image.read_bytes()
    began = time.monotonic()
    report = soak(args.url, picture, args.requests, seed=args.seed, clients=args.clients, seconds=args.seconds)
    for line in _table(report, time.monotonic() - began):
        write(line + "\n")
    for fault in report.faults[:20]:
        write(f"- {fault}\n")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
