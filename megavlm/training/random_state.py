"""The random states of a process, as JSON: what a checkpoint keeps, so that a run draws on as if never stopped."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megavlm.parallel.device import device_random_state, restore_device_random_state

Plain = dict[str, Any]


def random_state() -> Plain:
    """Return the states of Python, NumPy, torch, the device and Megatron-Core's tracker."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    on_device = device_random_state()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": _encode(torch.get_rng_state()),
        "device": None if on_device is None else _encode(on_device),
        "tracker": {key: _encode(value) for key, value in get_cuda_rng_tracker().get_states().items()},
    }


def restore_random_state(plain: Plain) -> None:
    """Go on from what :func:`random_state` returned.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    version, internal, gauss_next = plain["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, *rest = plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_decode(plain["torch"]))
    if plain["device"] is not None:
        restore_device_random_state(_decode(plain["device"]))
    tracker = get_cuda_rng_tracker()  # a stream that is newer than the checkpoint (dropout was 0) stays as it is
    tracker.set_states(tracker.get_states() | {key: _decode(value) for key, value in plain["tracker"].items()})


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).clone()
