"""Errors as OpenAI's API words them: a status, a message, a type, the parameter and a code."""

from __future__ import annotations

import reprlib
from typing import Any

from megavlm.config.errors import UserError

_MOST = 600
"""Characters of a message, and of a parameter's name: what was sent is not sent back."""
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60


class ApiError(UserError):
    """What a client did wrong, or what the server cannot do now.

    Args:
        status: of HTTP.
        message: what is wrong and what would be right, in a line.
        param: the field of the request, as ``messages.0.content.1``.
        code: a word that programs look at.
        retry_after: seconds after which trying again may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(_printable(message))
        self.param = None if param is None else _printable(param)
        self.status, self.code, self.retry_after = status, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that can never be answered."""
    return ApiError(400, message, param=param, code=code)


def shown(value: object) -> str:
    """Return a client's value as a message may repeat it: in a few characters, whatever it is."""
    try:
        return _SHOWN.repr(value)
    except (ValueError, RecursionError):  # a number of very many digits
        return f"this {type(value).__name__}"


def _printable(text: str) -> str:
    """Return a text in a bounded number of characters, all of which UTF-8 can write."""
    cut = text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."
    return cut.encode("utf-8", "replace").decode("utf-8")
