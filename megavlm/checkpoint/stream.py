"""Megatron distributed checkpoints, a tensor at a time: torch's own writer and reader, without the model in memory.

What :class:`CheckpointWriter` leaves loads with ``megatron.core.dist_checkpointing.load`` at any layout, as if a
training run of one process had saved it.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view

from megavlm.checkpoint.ahead import ReadAhead
from megavlm.checkpoint.checksum import checksum
from megavlm.checkpoint.lost import other_shape
from megavlm.checkpoint.readback import ReadBack, Region
from megavlm.checkpoint.safe import behind, read_metadata
from megavlm.checkpoint.slots import METADATA, Slot
from megavlm.config.errors import UserError

_SMALL_BYTES = 1 << 16
"""An archive of so few bytes is read at once; of a larger one no more than what is not numbers."""
_MANY_CHUNKS, _STACKED = 64, 2
"""From so many chunks on they are found by their place on the axes of layers and experts."""
CHUNK_BYTES = 128 << 20
"""A tensor is written in chunks of rows of at most about this size, so that no rank has to read much more
than its own part, and no more than a chunk is held in memory."""


@dataclass(frozen=True)
class ParameterToWrite:
    """One parameter to be written: its slot, number type, and how to get it (whole, or a view of a mapped file)."""

    slot: Slot
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.slot.shape) * self.dtype.itemsize

    def chunks(self) -> list[tuple[int, int]]:
        """Return rows [start, stop) of each chunk."""
        if not self.slot.shape:
            return [(0, 0)]
        rows = self.slot.shape[0]
        row_bytes = max(1, math.prod(self.slot.shape[1:]) * self.dtype.itemsize)
        step = max(1, CHUNK_BYTES // row_bytes)
        return [(start, min(rows, start + step)) for start in range(0, max(rows, 1), step)]


class _OwnFiles(FileSystem):
    """Torch's file system, with the file that is being written at hand."""

    def __init__(self) -> None:
        self.path, self.stream = Path(), cast(BinaryIO, None)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a file."""
        self.path = Path(path)
        with super().create_stream(path, mode) as stream:
            self.stream = cast(BinaryIO, stream)
            yield stream


@dataclass
class _Watched:
    """Hands each chunk to a :class:`ReadBack` once torch's writer is through with it: when it asks for the next one."""

    read_back: ReadBack
    files: _OwnFiles
    places: dict[MetadataIndex, tuple[int, int]] = field(default_factory=dict)
    """Where chunks begin, and their lengths."""
    _open: tuple[MetadataIndex, int, int, int] | None = None
    """The chunk that is being written: its index, where it begins, digest and bytes of its numbers."""

    def begin(self, index: MetadataIndex, tensor: Tensor) -> None:
        """A chunk is about to be written."""
        self._open = index, self.files.stream.tell(), checksum(tensor), tensor.nbytes

    def end(self) -> None:
        """What was begun is written, or nothing was."""
        if self._open is None:
            return
        index, start, digest, size = self._open
        self._open = None
        if not self.files.stream.closed:
            self.files.stream.flush()
        stop = self.files.path.stat().st_size
        self.places[index] = start, stop - start
        self.read_back.expect(Region(self.files.path, start, stop, digest, size, index.fqn, archive=True))

    def finish(self, results: Sequence[WriteResult]) -> None:
        """Hold the index against where the chunks were."""
        self.end()
        told = {one.index: (one.storage_data.offset, one.storage_data.length) for one in results}
        assert told == self.places, "torch's writer says another place than it wrote to"


class _Planner(SavePlanner):
    """Tells torch's writer what there is, and fetches it when its turn comes."""

    def __init__(
        self,
        pieces: Sequence[ParameterToWrite],
        progress: Callable[[int], Any],
        watched: _Watched | None,
        ahead: ReadAhead[Tensor],
    ) -> None:
        self.progress, self.watched, self.ahead = progress, watched, ahead
        self.sources: dict[MetadataIndex, tuple[ParameterToWrite, int, int]] = {}
        self.items: list[WriteItem] = []
        self.tensors: dict[str, TensorStorageMetadata] = {}
        self.last: tuple[ParameterToWrite | None, Tensor | None] = (None, None)
        for piece in pieces:
            for start, stop in piece.chunks():
                self._add(piece, start, stop)

    def _add(self, piece: ParameterToWrite, start: int, stop: int) -> None:
        slot = piece.slot
        size, properties = torch.Size(slot.global_shape), TensorProperties(piece.dtype)
        tensor = self.tensors.setdefault(slot.key, TensorStorageMetadata(properties, size, []))
        assert tensor.properties.dtype is piece.dtype and tensor.size == size, slot.key
        offsets, sizes = list(slot.offsets), list(slot.local_shape)
        if slot.shape:
            offsets[len(slot.place)] = start
            sizes[len(slot.place)] = stop - start
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        index = MetadataIndex(slot.key, chunk.offsets, len(tensor.chunks))
        tensor.chunks.append(chunk)
        self.sources[index] = (piece, start, stop)
        data = TensorWriteData(chunk=chunk, properties=properties, size=size)
        self.items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Nothing to set up."""

    def create_local_plan(self) -> SavePlan:
        """Return all items."""
        return SavePlan(self.items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return the plans and the index of the checkpoint."""
        return all_plans, Metadata(dict(self.tensors))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Fetch the chunk that is written next."""
        if self.watched is not None:
            self.watched.end()
        piece, start, stop = self.sources[write_item.index]
        if self.last[0] is not piece:
            self.last = (None, None)  # free the one before first
            tensor = self.ahead.read(piece)
            assert tuple(tensor.shape) == piece.slot.shape and tensor.dtype is piece.dtype, piece.slot
            self.last = (piece, tensor)
        whole = self.last[1]
        assert whole is not None
        part = whole[start:stop] if piece.slot.shape else whole
        self.progress(part.nbytes)
        part = _alone_in_storage(part.contiguous())
        part = part.view((*(1 for _ in piece.slot.place), *part.shape))
        if self.watched is not None:
            self.watched.begin(write_item.index, part)
        return part


def _alone_in_storage(tensor: Tensor) -> Tensor:
    """Return a view whose storage ends where it ends: torch's writer copies any other, to write no more than it."""
    if not tensor.numel():
        return tensor.clone()
    return torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)


def write_checkpoint(
    directory: Path,
    pieces: Sequence[ParameterToWrite],
    progress: Callable[[int], Any],
    read_back: ReadBack | None = None,
) -> None:
    """Write the tensors of a checkpoint into an existing directory.

    Args:
        directory: where to.
        pieces: every parameter, in the order in which they are read and written.
        progress: told the bytes of each chunk as it is written.
        read_back: compares each with what the disk holds.

    Raises:
        OSError: the disk is full, say.
        MachineError: the disk holds something else.
    """
    files = _OwnFiles()
    watched = _Watched(read_back, files) if read_back is not None else None
    ahead = ReadAhead(pieces)
    planner = _Planner(pieces, progress, watched, ahead)
    # One thread: torch's writer loses the errors of its other threads. It fetches nothing ahead: a chunk is in the file
    # when the next one is asked for. What is read ahead is the parameter behind it (ReadAhead).
    writer = FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0)
    writer.fs = files
    writer.set_up_storage_writer(is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    (plan,) = writer.prepare_global_plan(plans)
    try:
        done = writer.write_data(plan, planner)
        done.wait()
        if watched is not None:
            watched.finish(done.value())
        writer.finish(metadata, [done.value()])
        # What dist_checkpointing.save leaves beside the tensors.
        with (directory / "common.pt").open("wb") as file:
            torch.save({"content_metadata": METADATA}, file)
    except RuntimeError as error:
        raise behind(error) from None
    finally:
        ahead.close()
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


def _room(sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor to be filled, in large pages where the system has them: small ones cost more than the copy."""
    size = math.prod(sizes) * dtype.itemsize
    if not size or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(sizes, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*sizes)


_modes = threading.local()


def _imagined() -> FakeTensorMode:
    """Return this thread's mode of tensors without memory: each that is made keeps where it was made, line by line."""
    if not hasattr(_modes, "one"):
        _modes.one = FakeTensorMode()
    return cast(FakeTensorMode, _modes.one)


class CheckpointReader:
    """Reads single parameters of a checkpoint that was saved at any layout.

    Files are mapped into memory: a parameter that lies in one piece is read when it is looked at, without a copy.

    Raises:
        FileNotFoundError, ValueError: there is no index, or it is not to be trusted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = read_metadata(path)
        self._files: dict[str, tuple[Any, mmap.mmap]] = {}
        stored = self.metadata.state_dict_metadata
        self._entries = {key: entry for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
        self._by_place: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._fakes: dict[tuple[bytes, bytes], Tensor] = {}

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return shape, number type and chunks of every tensor, by key."""
        return self._entries

    def dtype(self, slot: Slot) -> torch.dtype:
        """Return the number type of a parameter."""
        return self._entry(slot).properties.dtype

    def read(self, slot: Slot) -> Tensor:
        """Return a parameter, possibly a view of a file: not to be written to.

        Raises:
            UserError: the checkpoint lacks it, or has it in another shape, or its file is damaged.
        """
        self._entry(slot)
        return self._region(slot.key, slot.offsets, slot.local_shape, slot)[(0,) * len(slot.place)]

    def read_region(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return a part of a tensor of the checkpoint, possibly a view of a file: not to be written to.

        Args:
            key: of the tensor.
            offsets: where the part begins, on each axis.
            sizes: its shape.

        Raises:
            UserError: not all of it is there, or its file is damaged.
        """
        return self._region(key, offsets, sizes)

    def _region(self, key: str, offsets: Sequence[int], sizes: Sequence[int], slot: Slot | None = None) -> Tensor:
        dtype = self._entries[key].properties.dtype
        items, parts = self._parts(key, offsets, sizes, slot)
        if len(parts) == 1:
            return parts[0]
        whole = _room(sizes, dtype)
        for item, part in zip(items, parts, strict=True):
            narrow_tensor_by_index(whole, item.dest_offsets, item.lengths).copy_(part)
        return whole

    def check(self, slot: Slot) -> None:
        """Check that all chunks of a parameter are there, of its type and shape, without looking at their numbers.

        Raises:
            UserError: as of :meth:`read`.
        """
        self._entry(slot)
        self._parts(slot.key, slot.offsets, slot.local_shape, slot)

    def _chunks_near(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[ChunkStorageMetadata]:
        """Return the chunks of a tensor that may have something of a part: of a layer's expert, that expert's alone.

        Torch looks through all that it is given, and a tensor of experts has thousands.
        """
        chunks: list[ChunkStorageMetadata] = self._entries[key].chunks
        if len(chunks) < _MANY_CHUNKS or len(sizes) <= _STACKED or any(size != 1 for size in sizes[:_STACKED]):
            return chunks
        if key not in self._by_place:
            alone = all(size == 1 for chunk in chunks for size in chunk.sizes[:_STACKED])
            found: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in chunks if alone else ():
                found.setdefault(tuple(chunk.offsets[:_STACKED]), []).append(chunk)
            self._by_place[key] = found
        by_place = self._by_place[key]
        return by_place.get(tuple(offsets[:_STACKED]), []) if by_place else chunks

    def _parts(
        self, key: str, offsets: Sequence[int], sizes: Sequence[int], slot: Slot | None = None
    ) -> tuple[list[ReadItem], list[Tensor]]:
        """Return what each chunk has of a part of a tensor, as views of the files.

        Raises:
            UserError: as of :meth:`read_region`.
        """
        entry = self._entries[key]
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        near = replace(entry, chunks=self._chunks_near(key, offsets, sizes))
        items = create_read_items_for_chunk_list(key, near, [wanted])
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            named = key if slot is None else slot.words
            raise UserError(f"{self.path}: {named} is not whole; save the checkpoint again")
        dtype = entry.properties.dtype
        try:
            parts = [self._part(item, dtype) for item in items]
        except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.path}: {key} cannot be read, a file is damaged: {reason}") from None
        return items, parts

    def _part(self, item: ReadItem, dtype: torch.dtype) -> Tensor:
        """Return what one stored chunk has of a parameter, a view of the mapped file."""
        info = self.metadata.storage_data.get(item.storage_index)
        if info is None:
            raise UserError("the index does not say where it lies")
        if info.transform_descriptors:
            raise UserError("it is compressed, which is not supported")
        file, mapped = self._open(info.relative_path)
        view = cast(BinaryIO, _create_file_view(file, info.offset, info.length))
        if info.length < _SMALL_BYTES:
            view = io.BytesIO(mapped[info.offset : info.offset + info.length])
        fake, begin = self._described(view)
        if not isinstance(fake, Tensor) or fake.dtype is not dtype:
            raise UserError(f"it is no tensor of {dtype}, as the index says")
        storage = fake.untyped_storage()
        if not storage.nbytes():
            return torch.empty(fake.shape, dtype=fake.dtype)
        start = info.offset + begin
        if hasattr(
            mmap, "MADV_WILLNEED"
        ):  # the disk begins with all of it; page by page it is asked for little at a time
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, page, start + storage.nbytes() - page)
        with warnings.catch_warnings(action="ignore"):  # that it cannot be written to
            count = storage.nbytes() // fake.dtype.itemsize
            numbers = torch.frombuffer(mapped, dtype=fake.dtype, count=count, offset=start)
        stored = numbers.as_strided(fake.shape, fake.stride(), int(fake.storage_offset()))
        return narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)

    def _described(self, view: BinaryIO) -> tuple[Any, int]:
        """Return a tensor without memory that is as the one in an archive, and where in it that one's numbers begin.

        What torch pickled of it is the same of all of its shape, and read once: to unpickle it takes a millisecond.
        """
        archive: Any = torch._C.PyTorchFileReader(view)  # whose types lack where records begin
        words = archive.get_record("data.pkl"), archive.get_record("byteorder")
        if words in self._fakes:
            return self._fakes[words], archive.get_record_offset("data/0")
        view.seek(0)
        with _imagined():
            fake = torch.load(view, weights_only=True)
        if not isinstance(fake, Tensor) or not fake.untyped_storage().nbytes():
            return fake, 0
        begin = cast(int, fake.untyped_storage()._checkpoint_offset)
        if begin == archive.get_record_offset("data/0"):
            self._fakes[words] = fake
        return fake, begin

    def _open(self, name: str) -> tuple[Any, mmap.mmap]:
        if name not in self._files:
            file = (self.path / name).open("rb")
            self._files[name] = file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._files[name]

    def _entry(self, slot: Slot) -> TensorStorageMetadata:
        entry = self.metadata.state_dict_metadata.get(slot.key)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.path}: has no tensor {slot.key}; is it a checkpoint of another model?")
        stored, wanted = tuple(entry.size), slot.global_shape
        padded = slot.vocabulary and stored[1:] == wanted[1:] and stored[0] > wanted[0]
        if stored != wanted and not padded:
            raise UserError(other_shape(self.path, slot.key, stored, wanted))
        return entry
