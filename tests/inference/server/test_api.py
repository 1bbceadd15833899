"""The server as OpenAI's own client sees it, and what it refuses."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from learnt import ANSWER, QUESTION
from PIL import Image
from serving import Served


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def asking(picture: Path | bytes, text: str = QUESTION) -> list[dict[str, Any]]:
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
    parts = [{"type": "image_url", "image_url": {"url": data_url(data)}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=600)


def post(served: Served, body: bytes, **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """POST a body as it is; returns status, JSON and headers."""
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=600)
    sent = {"Content-Type": "application/json", **{key.replace("_", "-"): value for key, value in headers.items()}}
    connection.request("POST", "/v1/chat/completions", body, sent)
    response = connection.getresponse()
    return response.status, json.loads(response.read()), dict(response.getheaders())


def post_json(served: Served, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
    """POST a request."""
    return post(served, json.dumps(body).encode())


def health(served: Served) -> dict[str, Any]:
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=600)
    connection.request("GET", "/health")
    return json.loads(connection.getresponse().read())


def test_an_answer(served: Served, client: openai.OpenAI) -> None:
    said = client.chat.completions.create(model="tiny", messages=asking(served.picture), temperature=0)
    assert said.choices[0].message.content == ANSWER and said.choices[0].finish_reason == "stop"
    assert said.usage is not None and said.usage.completion_tokens > 5
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    short = client.chat.completions.create(model="tiny", messages=asking(served.picture), max_completion_tokens=3)
    assert short.choices[0].finish_reason == "length" and short.usage and short.usage.completion_tokens == 3
    assert ANSWER.startswith(short.choices[0].message.content or "x")
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"


def test_a_stream(served: Served, client: openai.OpenAI) -> None:
    events = list(
        client.chat.completions.create(
            model="tiny", messages=asking(served.picture), stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(texts) == ANSWER and sum(map(bool, texts)) > 3
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].usage is not None and events[-1].usage.completion_tokens > 5 and not events[-1].choices


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_cut_the_answer(stream: bool, served: Served, client: openai.OpenAI) -> None:
    said = client.chat.completions.create(
        model="tiny", messages=asking(served.picture), stop=["never", "</ref>"], stream=stream
    )
    if stream:
        choices = [event.choices[0] for event in said]
        text, finish = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        text, finish = said.choices[0].message.content, said.choices[0].finish_reason
    assert (text, finish) == ("The <ref>red disc", "stop")


def test_requests_side_by_side_get_what_they_get_alone(served: Served, client: openai.OpenAI) -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 2.0, "seed": 5, "max_tokens": 12},
        {"temperature": 2.0, "seed": 6, "max_tokens": 30},
        {"temperature": 0, "max_tokens": 4},
    ]

    def ask(kind: dict[str, Any]) -> str | None:
        messages = asking(served.picture, "Tell me a story, 1 2 3")
        return client.chat.completions.create(model="tiny", messages=messages, **kind).choices[0].message.content

    alone = [ask(kind) for kind in kinds]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, kinds)) == alone
    assert alone[1] != alone[2]


def test_several_choices(served: Served, client: openai.OpenAI) -> None:
    kind: dict[str, Any] = {
        "model": "tiny", "messages": asking(served.picture, "Tell me a story"), "temperature": 2.0, "max_tokens": 9
    }  # fmt: skip
    alone = [client.chat.completions.create(**kind, seed=seed) for seed in (5, 6, 7)]
    texts = [one.choices[0].message.content for one in alone]
    assert len(set(texts)) == 3
    said = client.chat.completions.create(**kind, seed=5, n=3)
    assert [(choice.index, choice.message.content) for choice in said.choices] == list(enumerate(texts))
    assert [choice.finish_reason for choice in said.choices] == [one.choices[0].finish_reason for one in alone]
    assert said.usage and said.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert said.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    parts, finish = ["", "", ""], {}
    usage = None
    for event in client.chat.completions.create(
        **kind, seed=5, n=3, stream=True, stream_options={"include_usage": True}
    ):
        usage = event.usage
        for choice in event.choices:
            parts[choice.index] += choice.delta.content or ""
            finish[choice.index] = choice.finish_reason
    assert parts == texts and usage == said.usage
    assert finish == {choice.index: choice.finish_reason for choice in said.choices}


def test_several_pictures_in_several_turns(served: Served, client: openai.OpenAI) -> None:
    one, two = asking(served.picture)[0], asking(png(20, 30), "And here?")[0]
    both = {"role": "user", "content": [*two["content"][:1], *one["content"]]}
    turns = [one, {"role": "assistant", "content": ANSWER}, two]

    def prompt_tokens(*messages: Any) -> int:
        said = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1)
        assert said.usage
        return said.usage.prompt_tokens

    texts = [{**turn, "content": turn["content"][1]["text"]} if turn["role"] == "user" else turn for turn in turns]
    # A picture is 4 features between two marks, and "Picture 1: " in front.
    assert prompt_tokens(*turns) - prompt_tokens(*texts) >= 12
    assert prompt_tokens(both) - prompt_tokens(one) >= 6
    said = client.chat.completions.create(model="tiny", messages=[both])
    assert said.choices[0].message.content


def test_turns_and_text_alone(served: Served, client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        *asking(served.picture),
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "Sure?"},
    ]
    said = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, user="me")
    assert said.choices[0].message.content
    assert client.chat.completions.create(model="tiny", messages=messages[3:], max_tokens=4).usage
    for given in ("", "<|im_start|>a<img>"):  # which a poor model may have answered
        messages[2]["content"] = given
        assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=1).usage


HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("change", "param", "reason"),
    [
        ({"messages": []}, "messages", "the list is empty"),
        ({"messages": None}, "messages", "it is missing"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role", "use system, user"),
        ({"messages": [*HELLO, {"role": "system", "content": "a"}]}, "messages.1.role", "only be the first"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "a"}]}, "messages", "the last must be the user's"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages.0.content", "it is empty"),
        ({"messages": [{"role": "user", "content": "a <img></img>"}]}, "messages.0.content", "may not hold <img>"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "messages", "control token"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0.type", "image_url"),
        ({"messages": asking(b"no picture")}, "messages.0.content.0.image_url", "image 1 cannot be used: not an"),
        ({"messages": asking(png(50, 50)[:90])}, "messages.0.content.0.image_url", "image 1 cannot be used"),
        ({"messages": asking(png(500, 401))}, "messages.0.content.0.image_url", "at most 200000"),
        ({"messages": asking(png(4, 4)) * 3}, "messages", "3 pictures, at most 2"),
        ({"temperature": -1}, "temperature", "must be 0 or more"),
        ({"temperature": "hot"}, "temperature", "a number"),
        ({"top_p": 1.5}, "top_p", "at most 1"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": True}, "max_tokens", "a whole number"),
        ({"max_tokens": 9999}, "max_tokens", "the context has 2048 tokens"),
        ({"max_completion_tokens": 9999}, "max_completion_tokens", "the context has 2048 tokens"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages", "the context has 2048 tokens"),
        ({"messages": [{"role": "user", "content": "word " * 99999}]}, "messages", "499995 characters"),
        ({"messages": HELLO * 5000}, "messages", "5000, at most 4096"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 5000}]},
            "messages.0.content",
            "5000 parts, at most 4096",
        ),
        ({"n": 5}, "n", "from 1 to 4"),
        ({"tools": [{"type": "function"}]}, "tools", "does not support it"),
        ({"response_format": {"type": "json_object"}}, "response_format", "does not support it"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "does not support it"),
        ({"top_logprobs": 3}, "top_logprobs", "only with logprobs=true"),
        ({"max_tokens": 10**400}, "max_tokens", "the context has 2048 tokens"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "does not support it"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "does not support it"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "does not support it"),
        ({"n": 0}, "n", "from 1 to 4"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "use system, user"),
        ({"stop": ["a"] * 5}, "stop", "up to 4 texts"),
        ({"stop": [""]}, "stop", "up to 4 texts"),
        ({"temprature": 1}, "temprature", "no such parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
        ({"stream": "yes"}, "stream", "true or false"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]}]},
            "messages.0.content.0.image_url",
            "data URLs only",
        ),
    ],
)
def test_wrong_requests_get_a_reason(change: dict[str, Any], param: str, reason: str, served: Served) -> None:
    body = {"model": "tiny", "messages": HELLO, **change}
    status, said, _ = post(served, json.dumps(body).encode())
    assert status == 400, said
    assert said["error"]["param"] == param and reason in said["error"]["message"]
    assert said["error"]["type"] == "invalid_request_error"


def test_neutral_values_are_taken(served: Served) -> None:
    body = {"model": "tiny", "messages": HELLO, "n": 1, "tools": [], "presence_penalty": 0.0, "max_tokens": 1}
    assert post(served, json.dumps(body).encode())[0] == 200


@pytest.mark.parametrize(
    "kind",
    [
        {"temperature": 1e-45}, {"temperature": 1e-300}, {"temperature": 1, "top_p": 0}, {"temperature": 0, "top_p": 0},
        {"temperature": 1e-7, "top_p": 1e-300}, {"temperature": 2, "top_k": 1},
    ],
)  # fmt: skip
def test_what_leaves_one_token_is_greedy(kind: dict[str, float], served: Served) -> None:
    status, said, _ = post_json(served, {"model": "tiny", "messages": asking(served.picture), **kind})
    assert status == 200 and said["choices"][0]["message"]["content"] == ANSWER


def test_log_probabilities(served: Served, client: openai.OpenAI) -> None:
    kind: dict[str, Any] = {"model": "tiny", "messages": asking(served.picture), "logprobs": True, "top_logprobs": 3}
    (whole,) = client.chat.completions.create(**kind).choices
    assert whole.logprobs is not None and whole.logprobs.content is not None
    entries = whole.logprobs.content
    assert "".join(entry.token for entry in entries) == whole.message.content == ANSWER
    for entry in entries:
        best = entry.top_logprobs
        assert len(best) == 3 and best[0].token == entry.token and best[0].logprob == entry.logprob <= 0
        assert best[0].logprob >= best[1].logprob >= best[2].logprob
        assert bytes(entry.bytes or []).decode() == entry.token
        assert sum(math.exp(one.logprob) for one in best) <= 1.0001
    streamed = []
    for event in client.chat.completions.create(**kind, stream=True):
        if event.choices and event.choices[0].logprobs:
            streamed += event.choices[0].logprobs.content or []
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    # They are the model's own, whatever the sampling makes of them; beside it, nobody else gets any.
    with ThreadPoolExecutor(2) as pool:
        drawn = pool.submit(client.chat.completions.create, **{**kind, "top_logprobs": 0}, temperature=2.0, seed=1)
        plain = pool.submit(client.chat.completions.create, model="tiny", messages=kind["messages"])
    (choice,) = drawn.result().choices
    assert choice.logprobs and choice.logprobs.content and not choice.logprobs.content[0].top_logprobs
    assert plain.result().choices[0].logprobs is None and plain.result().choices[0].message.content == ANSWER


def test_other_statuses(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])
    assert post(served, b"{")[0] == 400 and post(served, b"[]")[0] == 400
    assert post(served, b"[" * 100_000)[0] == 400
    for method, path, wanted in (("GET", "/v1/chat/completions", 405), ("POST", "/v1/embeddings", 404)):
        connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=600)
        connection.request(method, path, b"{}", {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == wanted and "message" in json.loads(response.read())["error"]
    assert post(served, b"{}", Content_Type="text/plain")[0] == 415
    status, said, _ = post(served, b" " * ((1 << 20) + 1))
    assert status == 413 and said["error"]["code"] == "request_too_large"
    with pytest.raises(openai.APIStatusError) as caught:  # in chunks, without a length
        client.post("/chat/completions", cast_to=object, content=iter([b" " * (1 << 19)] * 3),
                    options={"headers": {"Content-Type": "application/json"}})  # fmt: skip
    assert caught.value.status_code == 413


def test_a_full_server_says_so_and_recovers(served: Served) -> None:
    netloc = urlsplit(served.url)
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 1}).encode()
    begun = []
    try:
        for _ in range(8):  # 4 in a batch and 4 that wait: requests whose bodies do not come
            one = socket.create_connection((netloc.hostname, netloc.port), 10)
            one.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b"Content-Length: 500\r\n\r\n{"
            )
            begun.append(one)
        wait_until(lambda: health(served)["requests"] == 8)
        assert health(served)["status"] == "busy"
        status, said, headers = post(served, body)
        assert status == 429 and said["error"]["code"] == "queue_full" and int(headers["retry-after"]) >= 1
    finally:
        for one in begun:
            one.close()
    wait_until(lambda: health(served)["requests"] == 0)
    assert health(served)["status"] == "ready"
    assert post(served, body)[0] == 200


def test_a_client_that_leaves_frees_its_slot(served: Served, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=asking(served.picture), stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: health(served)["requests"] == 0)
    said = client.chat.completions.create(model="tiny", messages=asking(served.picture))
    assert said.choices[0].message.content == ANSWER


def wait_until(true: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.05)
