"""Helpers to read a config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megavlm.config.errors import UserError


def need(config: Mapping[str, Any], key: str, where: str) -> Any:
    """Return ``config[key]``.

    Raises:
        UserError: there is no such key.
    """
    if config.get(key) is None:
        raise UserError(f"{where}: has no {key!r}, which the model's shape follows from")
    return config[key]


def number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """Return the finite number ``config[key]``.

    Raises:
        UserError: it is none, or the key is missing and there is no default.
    """
    value = default if config.get(key) is None else config[key]
    value = need(config, key, where) if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {key} is {str(value)[:40]!r}, which is not a number; correct it")
    return value


def flag(config: Mapping[str, Any], key: str, where: str, *, default: bool) -> bool:
    """Return the switch ``config[key]``; null is off, as it is for the code that reads it.

    Raises:
        UserError: it is neither true nor false: the text "false" would switch it on.
    """
    value = config.get(key, default)
    if value not in (True, False, None):
        raise UserError(f"{where}: {key} is {str(value)[:40]!r}; it must be true or false")
    return bool(value)


def expect_kinds(config: Mapping[str, Any], where: str, **kinds: tuple[str, ...]) -> None:
    """Check what a whole model's configuration calls its parts.

    Args:
        config: of the whole model.
        where: its file, for messages.
        kinds: by the key of a part (``text_config``), words that its ``model_type`` may be, ``_text`` and ``_vision``
            behind them or not.

    Raises:
        UserError: a part is called otherwise.
    """
    for key, known in kinds.items():
        kind = (config.get(key) or {}).get("model_type")
        if kind is not None and str(kind).removesuffix("_text").removesuffix("_vision") not in known:
            raise UserError(
                f"{where}: model_type of {key} is {kind!r}; in a {config.get('model_type')} only "
                f"{' or '.join(map(repr, known))} is supported"
            )


def expect(config: Mapping[str, Any], where: str, **values: Any) -> None:
    """Check keys that the model here has one value for.

    Raises:
        UserError: a key has another value.
    """
    for key, value in values.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if key in config and config[key] is not None and config[key] not in allowed:
            raise UserError(f"{where}: {key} is {config[key]!r}; only {' or '.join(map(repr, allowed))} is supported")
