"""Writing a Hugging Face directory shard by shard, each tensor straight to disk."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megavlm.checkpoint.checksum import checksum_of
from megavlm.checkpoint.readback import PIECE_BYTES, ReadBack, Region

_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int32: "I32",
}  # fmt: skip
SHARD_BYTES = 5_000_000_000
"""Size of a shard, as Transformers' ``max_shard_size="5GB"``."""


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardedWriter:
    """Safetensors shards with their index, filled in the order of ``entries``.

    The safetensors library writes a file from tensors that are all in memory; its format (a length, a JSON header,
    the bytes) is simple enough to be written as the tensors come.

    Args:
        directory: an existing directory.
        entries: every tensor, in the order in which :meth:`put` will be called.
        shard_bytes: largest size of a file, but for a single tensor that is larger.
        read_back: compares what was written with what the disk holds.
    """

    def __init__(
        self,
        directory: Path,
        entries: Sequence[Entry],
        shard_bytes: int = SHARD_BYTES,
        read_back: ReadBack | None = None,
    ) -> None:
        self.directory, self._read_back = directory, read_back
        self.shards: list[list[Entry]] = [[]]
        filled = 0
        for entry in entries:
            if self.shards[-1] and filled + entry.nbytes > shard_bytes:
                self.shards.append([])
                filled = 0
            self.shards[-1].append(entry)
            filled += entry.nbytes
        self._expected = [(shard, entry) for shard, group in enumerate(self.shards) for entry in group]
        self._file: BinaryIO | None = None
        self._shard = -1

    def put(self, name: str, tensor: Tensor, progress: Callable[[int], Any] = lambda _: None) -> None:
        """Write the next tensor."""
        shard, entry = self._expected.pop(0)
        assert (name, tuple(tensor.shape), tensor.dtype) == (entry.name, entry.shape, entry.dtype), (name, entry)
        if shard != self._shard:
            self._start(shard)
        if tensor.numel():
            self._write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, name)
        progress(tensor.nbytes)

    def _write(self, data: memoryview, name: str) -> None:
        """Write bytes, and have them read back in pieces."""
        assert self._file is not None
        start = self._file.tell()
        self._file.write(data)
        if self._read_back is None:
            return
        self._file.flush()
        path = self.directory / self._file_name(self._shard)
        for first in range(0, len(data), PIECE_BYTES):
            size = min(PIECE_BYTES, len(data) - first)
            digest = checksum_of(data, first, size)
            self._read_back.expect(Region(path, start + first, start + first + size, digest, size, name))

    def close(self) -> None:
        """Finish the last file and write the index."""
        assert not self._expected, f"{self._expected[0][1].name} was not written"
        self._end()
        if len(self.shards) > 1:
            weight_map = {e.name: self._file_name(i) for i, group in enumerate(self.shards) for e in group}
            total = sum(e.nbytes for group in self.shards for e in group)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            path = self.directory / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def abort(self) -> None:
        """Close the file that is open; what was written is worth nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _file_name(self, shard: int) -> str:
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def _start(self, shard: int) -> None:
        self._end()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in self.shards[shard]:
            stop = offset + entry.nbytes
            shape = list(entry.shape)
            header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": shape, "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts aligned
        self._file = (self.directory / self._file_name(shard)).open("wb")
        self._shard = shard
        self._write(memoryview(bytearray(struct.pack("<Q", len(text)) + text)), "the header")

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class FolderedWriter:
    """A :class:`ShardedWriter` for each folder: what stands in front of the last slash of a name is its folder.

    Its arguments and methods are those of one.
    """

    def __init__(
        self,
        directory: Path,
        entries: Sequence[Entry],
        shard_bytes: int = SHARD_BYTES,
        read_back: ReadBack | None = None,
    ) -> None:
        groups: dict[str, list[Entry]] = {}
        for entry in entries:
            folder, _, own = entry.name.rpartition("/")
            groups.setdefault(folder, []).append(replace(entry, name=own))
        for folder in groups:
            (directory / folder).mkdir(parents=True, exist_ok=True)
        self._writers = {
            folder: ShardedWriter(directory / folder, own, shard_bytes, read_back) for folder, own in groups.items()
        }

    @property
    def files(self) -> int:
        """Files of weights."""
        return sum(len(writer.shards) for writer in self._writers.values())

    def put(self, name: str, tensor: Tensor, progress: Callable[[int], Any] = lambda _: None) -> None:
        """Write the next tensor of its folder."""
        folder, _, own = name.rpartition("/")
        self._writers[folder].put(own, tensor, progress)

    def close(self) -> None:
        """Finish all."""
        for writer in self._writers.values():
            writer.close()

    def abort(self) -> None:
        """Close the files that are open."""
        for writer in self._writers.values():
            writer.abort()
