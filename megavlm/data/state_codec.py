"""Energon's loader state as plain JSON values and back: nothing read from disk is ever unpickled.

Types that JSON lacks are written as an object with one key that starts with ``$``. Dataclasses are only those of
a fixed list, so a forged state can build nothing else.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState

_DATACLASSES = {
    cls.__name__: cls
    for cls in (SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SliceState, SystemRngState)
}
_DTYPES = {"bool", "uint8", "int8", "int16", "int32", "uint32", "int64", "uint64", "float32", "float64"}


def to_plain(value: Any) -> Any:
    """Turn a state into JSON values.

    Raises:
        TypeError: It holds a type that is not on the list.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [to_plain(item) for item in value]}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        pairs = [[to_plain(key), to_plain(item)] for key, item in value.items()]
        return {"$flex" if isinstance(value, FlexState) else "$dict": pairs}
    if isinstance(value, torch.Tensor):
        return {"$tensor": _array_to_plain(value.numpy())}
    if isinstance(value, np.ndarray):
        return {"$array": _array_to_plain(value)}
    name = type(value).__name__
    if _DATACLASSES.get(name) is type(value):
        return {"$class": [name, {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}]}
    raise TypeError(f"a reader state cannot hold {type(value)}")


def from_plain(value: Any) -> Any:
    """Undo :func:`to_plain`.

    Raises:
        ValueError: The values were not made by :func:`to_plain`.
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("broken reader state: an object must have one key")
    ((tag, content),) = value.items()
    if tag not in _DECODERS:
        raise ValueError(f"broken reader state: unknown tag {tag!r}")
    try:
        return _DECODERS[tag](content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"broken reader state in {tag}: {error}") from None


def _array_to_plain(array: np.ndarray) -> list[Any]:
    if array.dtype.name not in _DTYPES:
        raise TypeError(f"a reader state cannot hold arrays of {array.dtype}")
    return [array.dtype.name, list(array.shape), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()]


def _bytes_from_plain(content: str) -> bytes:
    return base64.b64decode(content, validate=True)


def _array_from_plain(content: list[Any]) -> np.ndarray:
    dtype, shape, data = content
    if dtype not in _DTYPES:
        raise ValueError(f"broken reader state: array of {dtype!r}")
    return np.frombuffer(_bytes_from_plain(data), np.dtype(dtype)).reshape(shape).copy()


def _class_from_plain(content: list[Any]) -> Any:
    name, fields = content
    return _DATACLASSES[name](**{key: from_plain(item) for key, item in fields.items()})


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$tuple": lambda content: tuple(from_plain(item) for item in content),
    "$bytes": _bytes_from_plain,
    "$dict": lambda content: {from_plain(key): from_plain(item) for key, item in content},
    "$flex": lambda content: FlexState((from_plain(key), from_plain(item)) for key, item in content),
    "$tensor": lambda content: torch.from_numpy(_array_from_plain(content)),
    "$array": _array_from_plain,
    "$class": _class_from_plain,
}
