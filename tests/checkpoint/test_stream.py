"""A checkpoint's parameters one at a time: as they were written, in chunks or not, by us or by torch."""

from __future__ import annotations

import functools
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megavlm.checkpoint import ahead, stream
from megavlm.checkpoint.slots import Slot
from megavlm.config.errors import UserError


def _write(directory: Path, tensors: dict[Slot, Tensor]) -> stream.CheckpointReader:
    directory.mkdir()
    pieces = [stream.ParameterToWrite(slot, tensor.dtype, lambda t=tensor: t) for slot, tensor in tensors.items()]
    told: list[int] = []
    stream.write_checkpoint(directory, pieces, told.append)
    assert sum(told) == sum(tensor.nbytes for tensor in tensors.values())
    return stream.CheckpointReader(directory)


@pytest.mark.parametrize("chunk_bytes", [40, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
    whole = torch.randn(30, 7).to(dtype)
    tensors = {
        Slot("a", (7, 5)): torch.randn(7, 5).to(dtype),
        Slot("views", (9, 7)): whole[3:12],  # of something larger
        Slot("columns", (7, 30)): whole.T,
        Slot("scalar", ()): torch.tensor(2.5, dtype=dtype),
        **{Slot("stack", (5, 3), i, 3): torch.randn(5, 3).to(dtype) for i in range(3)},
    }
    reader = _write(tmp_path / "c", tensors)
    for slot, tensor in tensors.items():
        back = reader.read(slot)
        assert back.dtype is dtype and torch.equal(back, tensor), slot
    if chunk_bytes > 100:  # no more of a view than the view is written
        size = (tmp_path / "c" / "__0_0.distcp").stat().st_size
        assert size < len(tensors) * 2000 + sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("waiting", [16, 32])
def test_no_more_is_read_ahead_than_may_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int) -> None:
    monkeypatch.setattr(ahead, "AHEAD_BYTES", 16)
    monkeypatch.setattr(ahead, "WAITING_BYTES", waiting)
    (tmp_path / "c").mkdir()
    alive: list[weakref.ref[Tensor]] = []
    most, readers = 0, {}

    def reads(name: str, size: int) -> Tensor:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        readers[name] = threading.current_thread()
        if name == "f":
            raise UserError("its file is damaged")
        tensor = torch.full((size,), 1.0)
        alive.append(weakref.ref(tensor))
        return tensor

    sizes = {"a": 4, "b": 4, "c": 4, "large": 5, "d": 4, "e": 4}
    pieces = [
        stream.ParameterToWrite(Slot(name, (size,)), torch.float32, functools.partial(reads, name, size))
        for name, size in sizes.items()
    ]
    stream.write_checkpoint(tmp_path / "c", pieces, lambda _: None)
    here = threading.main_thread()
    assert {name for name, thread in readers.items() if thread is here} == {"a", "large"}
    assert most <= waiting // 16, "the one that is being written, and those that wait but for the one that is read"
    assert not readers["b"].is_alive() and not any(one() is not None for one in alive)
    # What is wrong with a parameter ends the writing, and the thread, when its turn comes.
    broken = stream.ParameterToWrite(Slot("f", (4,)), torch.float32, lambda: reads("f", 4))
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="its file is damaged"):
        stream.write_checkpoint(tmp_path / "d", [*pieces[:2], broken, pieces[4]], lambda _: None)
    assert readers["f"] is not here and not readers["f"].is_alive()


def test_strides_of_another_writer_are_heeded(tmp_path: Path) -> None:
    state = {"transposed": torch.randn(6, 4).T, "middle": torch.randn(5, 6)[:, 2:4], "odd": torch.randn(3)}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    reader = stream.CheckpointReader(tmp_path / "c")
    for key, tensor in state.items():
        assert torch.equal(reader.read(Slot(key, tuple(tensor.shape))), tensor)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    slots = {Slot("a", (64, 64)): torch.randn(64, 64), Slot("b", (64, 64)): torch.randn(64, 64)}
    _write(tmp_path / "c", slots)
    file = tmp_path / "c" / "__0_0.distcp"
    content = file.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) * 3 // 4, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="b cannot be read, a file is damaged"):
            stream.CheckpointReader(tmp_path / "c").read(Slot("b", (64, 64)))
    file.unlink()
    with pytest.raises(ValueError, match="a cannot be read, a file is damaged"):
        stream.CheckpointReader(tmp_path / "c").read(Slot("a", (64, 64)))
