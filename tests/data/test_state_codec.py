"""A reader state survives JSON exactly, and a forged one builds nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint
from megatron.energon.state import FlexState

from megavlm.data.state_codec import from_plain, to_plain


def through_json(value: object) -> object:
    return from_plain(json.loads(json.dumps(to_plain(value))))


@pytest.mark.parametrize(
    "value",
    [
        None,
        [True, 1, -(2**70), 0.1, "text", "$tuple"],
        (1, ("a", (2, b"\x00\xff")), []),
        {"key": 1, 2: (3,), ("a", 1): None, "$dict": {}},
        {},
    ],
)
def test_plain_values_come_back_with_their_types(value: object) -> None:
    back = through_json(value)
    assert back == value and repr(back) == repr(value)


def test_energon_types_come_back() -> None:
    state = SavableDataLoaderState(
        worker_states=[
            SavableDatasetCheckpoint(state=None, offset=3),
            FlexState({"a": (1, SliceState(index=2, current=3))}),
        ],
        next_worker_id=1,
        micro_batch_size=None,
    )
    back = through_json(state)
    assert isinstance(back, SavableDataLoaderState) and back == state
    assert type(back.worker_states[1]) is FlexState and isinstance(back.worker_states[1]["a"][1], SliceState)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.bool_])
def test_arrays_and_tensors_come_back(dtype: type) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    back = through_json(array)
    assert back.dtype == array.dtype and np.array_equal(back, array) and back.flags.writeable
    tensor = through_json(torch.from_numpy(array))
    assert torch.equal(tensor, torch.from_numpy(array))


def test_what_is_not_on_the_list_is_not_written() -> None:
    for value in (object(), {1, 2}, np.array([object()]), [lambda: 0]):
        with pytest.raises(TypeError, match="a reader state cannot hold"):
            to_plain(value)


@pytest.mark.parametrize(
    "forged",
    [
        {"a": 1, "b": 2},
        {"$pickle": "gASV"},
        {"$class": ["Popen", {}]},
        {"$class": ["SavableDatasetCheckpoint", {"nonsense": 1}]},
        {"$class": 3},
        {"$array": ["object", [1], "AAAAAAAAAAA="]},
        {"$array": ["int64", [7], "AAAAAAAAAAA="]},
        {"$dict": [[1]]},
        {"$bytes": "?"},
        {"$tuple": 3},
    ],
)
def test_a_forged_state_is_refused(forged: object) -> None:
    with pytest.raises(ValueError):
        from_plain(forged)
