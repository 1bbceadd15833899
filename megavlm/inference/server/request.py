"""A chat completion's JSON, checked: what is not understood is refused, never half obeyed.

Whatever was sent, what comes of it is a request or an ``ApiError``, and no message repeats more than a few characters.
"""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.schema import FILM_PLACEHOLDER, IMAGE_PLACEHOLDER, Turn, check_unicode
from megavlm.inference.sampling import Sampling
from megavlm.inference.server.errors import ApiError, bad_request, shown
from megavlm.inference.server.fields import check_fields, check_inner
from megavlm.inference.server.limits import Limits
from megavlm.inference.turns import without_control_tokens

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MESSAGE = frozenset(
    {
        "role", "content", "refusal", "tool_calls", "name", "annotations", "cache_control", "id", "metadata",
        "reasoning", "reasoning_content", "reasoning_details", "thinking_blocks", "provider_specific_fields",
    }
)  # fmt: skip
"""Fields of a message; those from ``name`` on are ignored, as they are no part of the prompt."""
_PART = frozenset({"type", "cache_control", "prompt_cache_breakpoint", "annotations", "uuid", "id"})
"""Fields of any part; those from ``cache_control`` on are ignored."""
_IMAGE = frozenset({"url", "detail", "format"})
"""Fields of an ``image_url``; each picture takes the same number of tokens, whatever ``detail`` says."""
_STREAM_OPTIONS = frozenset({"include_usage", "include_obfuscation"})
_STOPS = 4
_STOP_LENGTH = 256
_TOP_LOGPROBS = 20
_LARGEST = sys.float_info.max
_MOST = 4096
"""Messages of a request, and parts of a message."""


@dataclass(frozen=True)
class ImagePart:
    """A picture, or film, that is still to be loaded."""

    url: str
    param: str
    film: bool = False


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
    check_fields(body)
    asked = _typed(body, "model", str, required=True)
    if asked != model:
        raise ApiError(404, f"the model {shown(asked)} does not exist; this one does: {model}", param="model",
                       code="model_not_found")  # fmt: skip
    turns, images = _messages(body, limits)
    length_key, length = _max_tokens(body)
    stream = bool(_typed(body, "stream", bool))
    options = _typed(body, "stream_options", dict) or {}
    check_inner(options, _STREAM_OPTIONS, "stream_options")
    if any(options.values()) and not stream:
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


def _typed(body: dict[str, Any], key: str, kind: type, prefix: str = "", required: bool = False) -> Any:
    """Return a field, or None."""
    value = body.get(key)
    if value is None:
        if required:
            raise bad_request(f"{prefix}{key}: it is missing", prefix + key)
        return None
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {str: "text", int: "a whole number", bool: "true or false", dict: "an object", list: "a list"}
        raise bad_request(f"{prefix}{key}: it must be {names[kind]}, not {type(value).__name__}", prefix + key)
    return value


def _number(body: dict[str, Any], key: str, default: float, highest: float) -> float:
    """Return a field as a finite float; a lower bound is :class:`Sampling`'s to check."""
    value = body.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise bad_request(f"{key}: it must be a number", key)
    if not -_LARGEST < value < _LARGEST:  # also whole numbers that no float holds
        raise bad_request(f"{key}: {shown(value)} is too large; it must be at most {highest:g}", key)
    if value > highest:
        raise bad_request(f"{key}: {shown(value)} must be at most {highest:g}", key)
    return float(value)


def _sampling(body: dict[str, Any], defaults: Sampling) -> Sampling:
    seed = _typed(body, "seed", int)
    top_k = _typed(body, "top_k", int)
    try:
        return Sampling(
            _number(body, "temperature", defaults.temperature, 2.0),
            max(0, defaults.top_k if top_k is None else top_k),  # -1 also means all, elsewhere
            _number(body, "top_p", defaults.top_p, 1.0),
            _number(body, "repetition_penalty", defaults.repetition_penalty, 10.0),
            secrets.randbits(62) if seed is None else seed,
            _report(body),
        )
    except ApiError:
        raise
    except UserError as error:
        raise bad_request(str(error), str(error).partition(":")[0]) from None


def _report(body: dict[str, Any]) -> int | None:
    """Return how many tokens' log probabilities are wanted beside each token's own, or None for none at all."""
    wanted = _typed(body, "logprobs", bool)
    best = _typed(body, "top_logprobs", int) or 0
    if not 0 <= best <= _TOP_LOGPROBS:
        raise bad_request(f"top_logprobs: it must be from 0 to {_TOP_LOGPROBS}, not {shown(best)}", "top_logprobs")
    if best and not wanted:
        raise bad_request("top_logprobs: only with logprobs=true", "top_logprobs")
    return best if wanted else None


def _choices(body: dict[str, Any], limits: Limits) -> int:
    count = _typed(body, "n", int)
    if count is not None and not 1 <= count <= limits.batch:
        raise bad_request(f"n: it must be from 1 to {limits.batch}, not {shown(count)}", "n")
    return count or 1


def _max_tokens(body: dict[str, Any]) -> tuple[str, int | None]:
    """Return which field says how long an answer may be, and what it says."""
    keys = ("max_completion_tokens", "max_tokens")
    given = {key: _typed(body, key, int) for key in keys}
    for key, value in given.items():
        if value is not None and value < 1:
            raise bad_request(f"{key}: it must be at least 1, not {shown(value)}", key)
    return next(((key, value) for key, value in given.items() if value is not None), (keys[0], None))


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stops = ([stop] if stop else []) if isinstance(stop, str) else stop
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
    system: list[str] = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        turn, shown_here = _message(message, where)
        if turn.role == "system" and not turn.text.strip():
            continue  # clients send their empty setting: it is no system message of its own
        if turn.role == "system":
            if turns:
                raise bad_request(f"{where}.role: a system message can only be the first", f"{where}.role")
            system.append(turn.text)
            continue
        turns.append(turn)
        images += shown_here
    if not turns or turns[-1].role != "user":
        raise bad_request("messages: the last must be the user's", "messages")
    if len(images) > limits.images:
        raise bad_request(f"messages: {len(images)} pictures, at most {limits.images}", "messages", "too_many_images")
    return [*([Turn("system", "\n\n".join(system))] if system else []), *turns], images


def _message(message: Any, where: str) -> tuple[Turn, list[ImagePart]]:
    """Return a message as a turn, whose text is empty only where it is the system's, and its pictures."""
    if not isinstance(message, dict):
        raise bad_request(f"{where}: it must be an object", where)
    role = _ROLES.get(_typed(message, "role", str, f"{where}.", required=True))
    if role is None:
        raise bad_request(f"{where}.role: use system, user or assistant", f"{where}.role")
    if message.get("tool_calls"):
        raise bad_request(f"{where}.tool_calls: this server has no tools", where, "unsupported_parameter")
    check_inner(message, _MESSAGE, where)
    content = message.get("content")
    if role == "assistant" and content in (None, "", []):
        content = _typed(message, "refusal", str, f"{where}.")
    if content is None and role != "user":
        content = ""
    text, images = _content(content, f"{where}.content", role)
    if images and role != "user":
        raise bad_request(f"{where}: only the user's messages may have pictures", where)
    if not text.strip() and role == "user":
        raise bad_request(f"{where}.content: it is empty", f"{where}.content")
    return Turn(role, text or (" " if role == "assistant" else "")), images


def _content(content: Any, where: str, role: str) -> tuple[str, list[ImagePart]]:
    """Return a message's text, with placeholders for pictures in Qwen-VL's form, and its pictures and films."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise bad_request(f"{where}: it must be text or a list of parts", where)
    if len(parts) > _MOST:
        raise bad_request(f"{where}: {len(parts)} parts, at most {_MOST}", where)
    done, text, images = "", "", []
    for index, part in enumerate(parts):
        param = f"{where}.{index}" if parts is content else where
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" or (kind == "refusal" and role == "assistant"):
            check_inner(part, _PART | {kind}, param)
            if not isinstance(part.get(kind), str):
                raise bad_request(f"{param}.{kind}: it must be text", param)
            text += part[kind]
        elif kind in ("image_url", "video_url"):
            images.append(_image(part, param, kind))
            done += _text(text, where, role)
            number = sum(not one.film for one in images)
            here = FILM_PLACEHOLDER if images[-1].film else f"Picture {number}: {IMAGE_PLACEHOLDER}\n"
            done, text = done + here, ""
        else:
            raise bad_request(f"{param}.type: use text, image_url or video_url, not {shown(kind)}", f"{param}.type")
    return done + _text(text, where, role), images


def _image(part: dict[str, Any], where: str, kind: str) -> ImagePart:
    """Return the picture or film of a part, whose URL may also stand there by itself."""
    check_inner(part, _PART | {kind, "detail"}, where)
    inner = part.get(kind)
    if isinstance(inner, dict):
        check_inner(inner, _IMAGE, f"{where}.{kind}")
        inner = inner.get("url")
    if not isinstance(inner, str):
        raise bad_request(f'{where}.{kind}: it must be {{"url": "..."}}', f"{where}.{kind}")
    return ImagePart(inner, f"{where}.{kind}", kind == "video_url")


def _text(text: str, where: str, role: str) -> str:
    """Return the text between two pictures, checked as a whole: parts may make up what none of them holds.

    An answer that this server gave is taken back whatever it holds; what would be refused is left out of it.
    """
    if role == "assistant":
        text = without_control_tokens(text)
    if "<img>" in text or "</img>" in text:
        raise bad_request(f"{where}: text may not hold <img> or </img>; send a picture as an image_url part", where)
    if FILM_PLACEHOLDER in text:
        raise bad_request(f"{where}: text may not hold U+0000 before 'film'; send a film as a video_url part", where)
    try:
        check_unicode(text, f"{where}: the text")
    except UserError as error:
        raise bad_request(str(error), where) from None
    return text
