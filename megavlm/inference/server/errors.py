"""Errors as OpenAI's API words them: a status, a message, a type, the parameter and a code."""

from __future__ import annotations

from typing import Any


class ApiError(ValueError):
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
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

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
