"""A chat completion's JSON, checked: what is not understood is refused, never half obeyed.

Fields that change the answer and cannot be honoured are refused unless they hold their neutral value; fields that
change nothing about it (``user``, ``metadata``, ...) are taken and ignored; a field that is unknown is refused with its
name, as it may be a misspelt one.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any

from megavlm.data.schema import IMAGE_PLACEHOLDER, Turn
from megavlm.inference.sampling import Sampling
from megavlm.inference.server.errors import ApiError, bad_request
from megavlm.inference.server.limits import Limits
from megavlm.inference.turns import without_control_tokens

_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_READ = frozenset(
    {
        "model", "messages", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens",
        "max_completion_tokens", "n", "seed", "stop", "stream", "stream_options",
    }
)  # fmt: skip
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_STOPS = 4
_STOP_LENGTH = 256
_MOST = 4096
"""Messages of a request, and parts of a message."""


@dataclass(frozen=True)
class ImagePart:
    """A picture that is still to be loaded."""

    url: str
    param: str


@dataclass(frozen=True)
class ChatRequest:
    """A request whose fields are sound."""

    turns: tuple[Turn, ...]
    images: tuple[ImagePart, ...]
    sampling: Sampling
    max_new_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    choices: int = 1
    """Answers wanted."""
    length_key: str = "max_completion_tokens"
    """Which field gave the longest answer."""


def parse_request(body: Any, model: str, defaults: Sampling, limits: Limits) -> ChatRequest:
    """Check a request.

    Args:
        body: its JSON.
        model: the name of the model that is served.
        defaults: how tokens are chosen where the request does not say; its seed is not looked at.
        limits: of the server.

    Raises:
        ApiError: a field is missing, wrong, unknown or not supported (400), or the model is another (404).
    """
    if not isinstance(body, dict):
        raise bad_request(f"the body must be a JSON object, not {type(body).__name__}")
    body = {key: value for key, value in body.items() if value is not None}
    for key, value in body.items():
        if key in _NEUTRAL and not any(value == one and type(value) is type(one) for one in _neutral(key)):
            raise bad_request(f"{key}: this server does not support it; leave it out", key, "unsupported_parameter")
        if key not in _NEUTRAL and key not in _IGNORED and key not in _READ:
            raise bad_request(f"{key}: there is no such parameter", key, "unknown_parameter")
    asked = _typed(body, "model", str, required=True)
    if asked != model:
        raise ApiError(404, f"the model {asked[:100]!r} does not exist; this one does: {model}", param="model",
                       code="model_not_found")  # fmt: skip
    turns, images = _messages(body, limits)
    length_key, length = _max_tokens(body)
    stream = bool(_typed(body, "stream", bool))
    options = _typed(body, "stream_options", dict) or {}
    if options and not stream:
        raise bad_request("stream_options: only with stream=true", "stream_options")
    return ChatRequest(
        tuple(turns),
        tuple(images),
        _sampling(body, defaults),
        length,
        _stop(body),
        stream,
        bool(_typed(options, "include_usage", bool, "stream_options.")),
        _choices(body, limits),
        length_key,
    )


def _neutral(key: str) -> tuple[Any, ...]:
    values = _NEUTRAL[key]
    return (*values, *(float(one) for one in values if type(one) is int))


def _typed(body: dict[str, Any], key: str, kind: type, prefix: str = "", required: bool = False) -> Any:
    """Return a field, or None."""
    value = body.get(key)
    if value is None:
        if required:
            raise bad_request(f"{prefix}{key}: it is missing", prefix + key)
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {str: "text", int: "a whole number", bool: "true or false", dict: "an object", list: "a list"}
        raise bad_request(f"{prefix}{key}: it must be {names[kind]}, not {type(value).__name__}", prefix + key)
    return value


def _sampling(body: dict[str, Any], defaults: Sampling) -> Sampling:
    def number(key: str, default: float, highest: float) -> float:
        value = body.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise bad_request(f"{key}: it must be a number", key)
        if value > highest:
            raise bad_request(f"{key}: {value} must be at most {highest:g}", key)
        return float(value)

    seed = _typed(body, "seed", int)
    top_k = _typed(body, "top_k", int)
    try:
        return Sampling(
            number("temperature", defaults.temperature, 2.0),
            max(0, defaults.top_k if top_k is None else top_k),  # -1 also means all, elsewhere
            number("top_p", defaults.top_p, 1.0),
            number("repetition_penalty", defaults.repetition_penalty, 10.0),
            secrets.randbits(62) if seed is None else seed,
        )
    except ApiError:
        raise
    except ValueError as error:
        raise bad_request(str(error), str(error).partition(":")[0]) from None


def _choices(body: dict[str, Any], limits: Limits) -> int:
    count = _typed(body, "n", int)
    if count is not None and not 1 <= count <= limits.batch:
        raise bad_request(f"n: it must be from 1 to {limits.batch}, not {count}", "n")
    return count or 1


def _max_tokens(body: dict[str, Any]) -> tuple[str, int | None]:
    """Return which field says how long an answer may be, and what it says."""
    keys = ("max_completion_tokens", "max_tokens")
    for key in keys:
        value = _typed(body, key, int)
        if value is not None and value < 1:
            raise bad_request(f"{key}: it must be at least 1, not {value}", key)
    return next(((key, body[key]) for key in keys if key in body), (keys[0], None))


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    good = isinstance(stops, list) and len(stops) <= _STOPS
    if not good or not all(isinstance(one, str) and 0 < len(one) <= _STOP_LENGTH for one in stops):
        raise bad_request(f"stop: up to {_STOPS} texts of 1 to {_STOP_LENGTH} characters", "stop")
    return tuple(stops)


def _messages(body: dict[str, Any], limits: Limits) -> tuple[list[Turn], list[ImagePart]]:
    messages = _typed(body, "messages", list, required=True)
    if not messages:
        raise bad_request("messages: the list is empty", "messages")
    if len(messages) > _MOST:
        raise bad_request(f"messages: {len(messages)}, at most {_MOST}", "messages")
    turns: list[Turn] = []
    images: list[ImagePart] = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        if not isinstance(message, dict):
            raise bad_request(f"{where}: it must be an object", where)
        role = _ROLES.get(_typed(message, "role", str, f"{where}.", required=True))
        if role is None:
            raise bad_request(f"{where}.role: use system, user or assistant", f"{where}.role")
        if role == "system" and index:
            raise bad_request(f"{where}.role: a system message can only be the first", f"{where}.role")
        if message.get("tool_calls"):
            raise bad_request(f"{where}.tool_calls: this server has no tools", where, "unsupported_parameter")
        text, shown = _content(message.get("content"), f"{where}.content", role == "assistant")
        if shown and role != "user":
            raise bad_request(f"{where}: only the user's messages may have pictures", where)
        turns.append(Turn(role, text))
        images += shown
    if turns[-1].role != "user":
        raise bad_request("messages: the last must be the user's", "messages")
    if len(images) > limits.images:
        raise bad_request(f"messages: {len(images)} pictures, at most {limits.images}", "messages", "too_many_images")
    return turns, images


def _content(content: Any, where: str, answer: bool) -> tuple[str, list[ImagePart]]:
    """Return a message's text, with placeholders for pictures in Qwen-VL's form, and its pictures.

    An answer that this server gave is taken back whatever it holds: nothing, or control tokens, which are left out.
    """
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise bad_request(f"{where}: it must be text or a list of parts", where)
    if len(parts) > _MOST:
        raise bad_request(f"{where}: {len(parts)} parts, at most {_MOST}", where)
    text, images = "", []
    for index, part in enumerate(parts):
        param = f"{where}.{index}" if parts is content else where
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text += _text(part.get("text"), param, answer)
        elif kind == "image_url":
            inner = part.get("image_url")
            url = inner.get("url") if isinstance(inner, dict) else None
            if not isinstance(url, str):
                raise bad_request(f'{param}.image_url: it must be {{"url": "..."}}', f"{param}.image_url")
            images.append(ImagePart(url, f"{param}.image_url"))
            begin = "" if not text or text.endswith("\n") else "\n"
            text += f"{begin}Picture {len(images)}: {IMAGE_PLACEHOLDER}\n"
        else:
            raise bad_request(f"{param}.type: use text or image_url, not {kind!r}", f"{param}.type")
    if not text.strip() and not answer:
        raise bad_request(f"{where}: it is empty", where)
    return text or " ", images


def _text(text: Any, where: str, answer: bool) -> str:
    if not isinstance(text, str):
        raise bad_request(f"{where}.text: it must be text", where)
    if answer:
        text = without_control_tokens(text)
    if "<img>" in text or "</img>" in text:
        raise bad_request(f"{where}: text may not hold <img> or </img>; send a picture as an image_url part", where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request(f"{where}: it is not valid Unicode text", where) from None
    return text
