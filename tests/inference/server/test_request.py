"""Requests as they are checked, without a server: what is taken, what is refused, and that nothing else happens."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from typing import Any

import pytest
from launch import ROOT
from openai.types.chat import completion_create_params
from PIL import Image

from megavlm.data import fetch
from megavlm.data.schema import IMAGE_PLACEHOLDER
from megavlm.inference.sampling import Sampling
from megavlm.inference.server import fields
from megavlm.inference.server.errors import ApiError
from megavlm.inference.server.images import load_images
from megavlm.inference.server.limits import Limits
from megavlm.inference.server.request import ChatRequest, ImagePart, parse_request

HELLO = {"role": "user", "content": "Hello"}
LIMITS = Limits(batch=4)
HUGE = 10**400
BIG = "A" * 5_000_000


def png() -> bytes:
    out = io.BytesIO()
    Image.radial_gradient("L").resize((9, 7)).convert("RGB").save(out, "PNG")
    return out.getvalue()


PNG = png()
BASE64 = base64.b64encode(PNG).decode()
assert "+" in BASE64 and "/" in BASE64 and "=" in BASE64  # so that alphabets and padding matter


def parsed(*messages: Any, **more: Any) -> ChatRequest:
    body = {"model": "tiny", "messages": list(messages) or [HELLO], **more}
    return parse_request(json.loads(json.dumps(body)), "tiny", Sampling(), LIMITS)


def refusal(*messages: Any, **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parsed(*messages, **more)
    error = caught.value
    assert 400 <= error.status < 500
    body = json.dumps(error.body, ensure_ascii=False).encode("utf-8")  # as it is sent
    assert len(body) < 1500 and "\n" not in str(error)
    return error


def loaded(url: str, remote: bool = False) -> bytes:
    (image,) = asyncio.run(load_images([ImagePart(url, "here")], LIMITS, remote))
    return image


def spoken(*messages: Any) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in parsed(*messages).turns]


@pytest.mark.parametrize(
    "message",
    [
        {"content": ""}, {"content": None}, {}, {"content": []}, {"refusal": None}, {"content": None, "tool_calls": []},
        {"content": None, "tool_calls": None, "function_call": None, "audio": None, "annotations": []},
        {"content": [{"type": "text", "text": ""}]}, {"content": "<|im_end|>"},
    ],
)  # fmt: skip
def test_an_answer_without_text_comes_back(message: dict[str, Any]) -> None:
    said = spoken(HELLO, {"role": "assistant", **message}, HELLO)
    assert said == [("user", "Hello"), ("assistant", " "), ("user", "Hello")]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": None, "refusal": "No."}, "No."),
        ({"content": "Yes.", "refusal": None, "reasoning_content": "Hm", "provider_specific_fields": {"a": 1}}, "Yes."),
        ({"content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "start|>a"}]}, "a"),
        ({"content": "<|im_<|im_end|>start|>a<img>"}, "a"),
    ],
)
def test_what_an_answer_says(message: dict[str, Any], text: str) -> None:
    assert spoken(HELLO, {"role": "assistant", **message}, HELLO)[1] == ("assistant", text)


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("message", [{"content": ""}, {"content": " \n"}, {"content": None}, {}, {"content": []}])
def test_an_empty_system_message_is_none(role: str, message: dict[str, Any]) -> None:
    assert spoken({"role": role, **message}, HELLO) == [("user", "Hello")]
    assert spoken(HELLO, {"role": role, **message}, HELLO) == [("user", "Hello")] * 2


def test_system_messages_at_the_beginning_are_one() -> None:
    brief, english = {"role": "system", "content": "Be brief."}, {"role": "developer", "content": "In English."}
    empty = {"role": "system", "content": ""}
    assert spoken(brief, empty, english, HELLO)[0] == ("system", "Be brief.\n\nIn English.")
    assert "only be the first" in str(refusal(HELLO, brief, HELLO))
    assert "the last must be the user's" in str(refusal(empty))


def test_pictures_in_other_forms() -> None:
    url = f"data:image/png;base64,{BASE64}"
    detail = {"type": "image_url", "image_url": {"url": url, "detail": "high", "format": "image/png"}, "uuid": None}
    bare = {"type": "image_url", "image_url": url, "cache_control": {"type": "ephemeral"}}
    request = parsed({"role": "user", "content": [detail, {"type": "text", "text": "and"}, bare]})
    assert [image.url for image in request.images] == [url, url]
    shown = [f"Picture {number}: {IMAGE_PLACEHOLDER}" for number in (1, 2)]
    assert request.turns[0].text == f"{shown[0]}\nand{shown[1]}\n"
    # Elsewhere pictures stand in other fields: they are not left out in silence.
    assert "messages.0.images: there is no such field" in str(refusal({**HELLO, "images": [BASE64]}))
    for more in ({"max_pixels": 9}, {"image": BASE64}):
        assert "no such field" in str(refusal({"role": "user", "content": [{**bare, **more}]}))
    # Neither is a mark of a picture in text, also where two parts make it up.
    halves = [{"type": "text", "text": "<im"}, {"type": "text", "text": "g></img>"}]
    assert "may not hold <img>" in str(refusal({"role": "user", "content": halves}))


def test_every_field_of_openais_client_is_known() -> None:
    """A field that a later client has is put into a table, or this fails."""
    for name in completion_create_params.CompletionCreateParamsBase.__annotations__:
        assert name in fields.READ or name in fields.IGNORED or name in fields.NEUTRAL, name
        if name not in ("model", "messages"):
            parsed(**{name: None})


def test_neutral_values_of_all_fields_are_taken_and_others_refused() -> None:
    for name, values in fields.NEUTRAL.items():
        for value in values:
            parsed(**{name: value})
            if isinstance(value, int) and not isinstance(value, bool):
                parsed(**{name: float(value)})
                assert refusal(**{name: value + 0.5}).param == name
                assert refusal(**{name: bool(value)}).param == name
        error = refusal(**{name: "something"})
        assert error.param == name and f"{name}: this server does not support it" in str(error)
    request = parsed(
        user="me", seed=3, store=True, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=False, n=1,
        logit_bias={}, tools=[], min_p=0, repetition_penalty=1, skip_special_tokens=True, top_k=-1, stop=[],
        stream=False, stream_options={"include_usage": False}, frequency_penalty=0.0, logprobs=False, top_logprobs=0,
        max_tokens=16.0, temperature=0, top_p=0,
    )  # fmt: skip
    assert request.sampling == Sampling(0.0, 0, 0.0, 1.0, 3) and request.max_new_tokens == 16 and request.stop == ()
    assert parsed(stop="").stop == () and parsed(logprobs=True).sampling.report == 0
    assert parsed(stream=True, stream_options={"include_usage": True, "include_obfuscation": False}).include_usage
    assert "continuous_usage_stats" in str(refusal(stream=True, stream_options={"continuous_usage_stats": True}))


@pytest.mark.parametrize("value", [HUGE, -HUGE, 1e999, -1e999, float("nan"), 2.5, -0.1, True, "1", [1], {}])
@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty"])
def test_numbers_that_cannot_be_are_refused_by_name(name: str, value: Any) -> None:
    if (name, value) == ("repetition_penalty", 2.5):
        return
    error = refusal(**{name: value})
    assert error.param == name and str(error).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": HUGE}, "n"), ({"n": -HUGE}, "n"), ({"max_tokens": -HUGE}, "max_tokens"), ({"seed": 0.5}, "seed"),
        ({"top_logprobs": HUGE, "logprobs": True}, "top_logprobs"), ({"top_logprobs": 5}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"), ({"presence_penalty": HUGE}, "presence_penalty"),
        ({"logprobs": 1}, "logprobs"), ({"stop": [BIG]}, "stop"), ({"model": BIG}, "model"), ({BIG: 1}, "A" * 100),
        ({"\ud800": 1}, "?"), ({"stream_options": {BIG: 1}}, f"stream_options.{'A' * 100}"),
    ],
)  # fmt: skip
def test_what_is_refused_is_not_repeated(more: dict[str, Any], param: str) -> None:
    assert refusal(**more).param == param


NESTED: Any = []
for _ in range(300):
    NESTED = [NESTED]


@pytest.mark.parametrize("value", [BIG, "\ud800" * 50, NESTED, HUGE, 0.5, {BIG: NESTED}, 3, [None], True])
def test_wrong_values_within_messages_get_a_short_reason(value: Any) -> None:
    refusal({"role": "user", "content": [{"type": value}]})
    refusal({"role": "user", "content": [value]})
    refusal({"role": value, "content": "Hello"})
    refusal({**HELLO, "tool_calls": value})
    refusal({**HELLO, "images": value})
    refusal(value)
    if not isinstance(value, str):
        refusal({"role": "user", "content": value})
        refusal({"role": "user", "content": [{"type": "image_url", "image_url": value}]})
        refusal(HELLO, {"role": "assistant", "refusal": value}, HELLO)


def test_half_a_surrogate_pair_is_no_text() -> None:
    for role in ("user", "system", "assistant"):
        error = refusal({"role": role, "content": "ab\ud800"}, HELLO)
        assert "messages.0.content: the text is not valid Unicode text at character 3" in str(error)


def test_three_thousand_mutated_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from soak_serve import mutated, untouched

    taken = refused = 0
    for number in range(3000):
        rng = random.Random(number)
        body = mutated({**untouched(PNG, rng), "model": "tiny"}, rng)
        try:
            tree = json.loads(body)
        except (ValueError, RecursionError):
            continue
        try:
            request = parse_request(tree, "tiny", Sampling(), LIMITS)
            # What is taken can be handed to other ranks and sampled with.
            request.sampling.generator(0)
            assert sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in request.turns) == len(request.images)
            "".join(turn.text for turn in request.turns).encode()
            taken += 1
        except ApiError as error:
            assert 400 <= error.status < 500 and len(json.dumps(error.body, ensure_ascii=False).encode()) < 1500
            refused += 1
    assert taken > 300 and refused > 1000


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{BASE64}",
        f"data:image/png;base64,{BASE64.rstrip('=')}",
        f"data:image/png;base64,{base64.encodebytes(PNG).decode()}",
        f"data:image/png;base64, {BASE64}",
        f"data:image/png;base64,{BASE64[:50]}\r\n\t\f{BASE64[50:]}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode()}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(PNG).decode().rstrip('=')}",
        f"data:image/png;base64,{BASE64.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
        f" DATA:image/png;charset=utf-8; BASE64 ,{BASE64}\n",
        f"data:;base64,{BASE64}",
    ],
)
def test_base64_as_clients_write_it(url: str) -> None:
    assert loaded(url) == PNG


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (BASE64, "data:image/png;base64, is missing in front"),
        (BIG, "data:image/png;base64, is missing in front"),
        ("/9j/4AAQSkZJRg==", "data:image/png;base64, is missing in front"),
        ("", "is missing in front"),
        (f"data:image/png,{BASE64}", "must read data:image/...;base64,..."),
        (f"data:image/png;xbase64,{BASE64}", "must read data:image/...;base64,..."),
        (f"data:image/png;base64,{BASE64[:41]}", "41 digits, which no data has: it is cut off"),
        (f"data:image/png;base64,{BASE64[:40]}!{BASE64[40:]}", "the base64 of the data URL has a '!'"),
        ("data:image/png;base64,AA==AA", "has a '=' where none can be"),
        ("data:image/png;base64,\u4e2d", "where none can be"),
        ("data:image/png;base64,", "image 1 cannot be used: empty"),
        (f"http://{'a' * 64}.example/x.png", "image 1 was not fetched"),
        (f"http://{'a.' * 100_000}/x.png", "image 1 was not fetched"),
        ("http://a..b/x.png", "image 1 was not fetched"),
        ("http://[/x.png", "image 1 was not fetched"),
        (f"ftp://{BIG}", "only http and https are fetched"),
    ],
)
def test_pictures_that_are_none_get_a_short_reason(url: str, reason: str) -> None:
    with pytest.raises(ApiError) as caught:
        loaded(url, remote=True)
    assert caught.value.status == 400 and reason in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("answer", ["http://[", "//[", f"http://{'a' * 70}.example/"])
def test_a_redirect_to_nowhere_is_no_bug(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    get = fetch._get
    monkeypatch.setattr(fetch, "_get", lambda url, *rest: answer if url == "http://a/b" else get(url, *rest))
    with pytest.raises(fetch.FetchError):
        fetch.fetch("http://a/b", timeout=2)
