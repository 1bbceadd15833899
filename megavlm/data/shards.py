"""Writes webdatasets that Energon reads: tar files of samples, and their index; one, or one for each task."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from megavlm.config.prepared import META

NO_TASK = "none"
"""Folder of the samples that have no task."""
MAX_OPEN = 64
"""Files that are held open at once, whatever the number of tasks."""
_PIECE = 1 << 22
_LONGEST_NAME = 80
"""Bytes of a task that its folder is named by."""


class ShardWriter:
    """Writes samples into tar files of a fixed number of samples; equal input gives equal bytes.

    Args:
        directory: Where they go; it exists.
        samples_per_shard: Samples of one tar file.
    """

    def __init__(self, directory: Path, samples_per_shard: int) -> None:
        self.names: list[str] = []
        """Of the files so far."""
        self.samples = 0
        self.digest = hashlib.sha256()
        """Of all that was written so far: equal input gives equal bytes."""
        self.directory = directory
        self._limit = samples_per_shard
        self._file: BinaryIO | None = None
        self._size = 0
        """Bytes of the unfinished file; 0 where there is none."""

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish the last file, as ``tarfile`` does: two blocks of zeros, then up to a whole record."""
        if self._size:
            end = 2 * tarfile.BLOCKSIZE
            self._append(bytes(end + -(self._size + end) % tarfile.RECORDSIZE))
            self._size = 0
        self.release()

    def release(self) -> None:
        """Close the file for a while; the next sample, or the end, opens it again."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def write(self, key: str, members: Sequence[tuple[str, bytes | Path]]) -> None:
        """Add one sample: its members are ``<key>.<name>``, with these contents, or those of these files.

        Raises:
            OSError: A file cannot be read, or became shorter.
        """
        if self.samples % self._limit == 0:
            self.close()
            self.names.append(f"shard-{len(self.names):06d}.tar")
        for name, data in members:
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = data.stat().st_size if isinstance(data, Path) else len(data)
            info.mode = 0o644
            header, padding = info.tobuf(tarfile.USTAR_FORMAT, "utf-8"), bytes(-info.size % tarfile.BLOCKSIZE)
            if isinstance(data, Path):
                self._append(header)
                self._copy(data, info.size)
                self._append(padding)
            else:
                self._append(header + data + padding)
        self.samples += 1

    def _copy(self, path: Path, size: int) -> None:
        """Append a file, a piece at a time."""
        with path.open("rb") as file:
            while size:
                piece = file.read(min(size, _PIECE))
                if not piece:
                    raise OSError(errno.EIO, "the file became shorter while it was read", str(path))
                self._append(piece)
                size -= len(piece)

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self._file = (self.directory / self.names[-1]).open("ab")
        self._file.write(data)
        self.digest.update(data)
        self._size += len(data)


class TaskWriter:
    """Writes samples into one data set, or into one for each task, in a folder named after it.

    Args:
        root: Where they go; it exists.
        samples_per_shard: Samples of one tar file.
        by_task: Whether each task gets its own.
    """

    def __init__(self, root: Path, samples_per_shard: int, *, by_task: bool) -> None:
        self.sets: dict[str, ShardWriter] = {}
        """By task; the name of the only one is empty."""
        self._root, self._limit, self._by_task = root, samples_per_shard, by_task
        self._open: dict[str, ShardWriter] = {}
        """Those that hold an open file; the one that was used last is the last."""
        self._folders: set[str] = set()

    def __enter__(self) -> TaskWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.sets.values():
            writer.close()

    @property
    def shards(self) -> int:
        """Files so far."""
        return sum(len(writer.names) for writer in self.sets.values())

    def write(self, task: str, key: str, members: Sequence[tuple[str, bytes | Path]]) -> None:
        """Add one sample of a task (empty for none)."""
        label = (task or NO_TASK) if self._by_task else ""
        if label not in self.sets:
            self.sets[label] = ShardWriter(self._folder(label), self._limit)
        self._open.pop(label, None)
        self._open[label] = self.sets[label]
        while len(self._open) > MAX_OPEN:
            self._open.pop(next(iter(self._open))).release()
        self.sets[label].write(key, members)

    def _folder(self, label: str) -> Path:
        if not label:
            return self._root
        name = re.sub(r"[^\w-]+", "-", label)
        name = name.encode()[:_LONGEST_NAME].decode(errors="ignore")  # a file system counts bytes
        number = 2
        folder = name
        # Two names may differ in signs that a folder's does not have, or in capitals, which some disks do not tell.
        while folder.casefold() in self._folders:
            folder, number = f"{name}-{number}", number + 1
        self._folders.add(folder.casefold())
        (self._root / folder).mkdir()
        return self._root / folder


@contextlib.contextmanager
def _not_collected() -> Iterator[None]:
    """Keep forked processes from collecting what is this one's.

    Some of it, a film's encoder say, ends by waiting for threads, which a fork does not have: such a child never ends.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def write_metadata(directory: Path, shards: list[str], samples: int | None = None) -> None:
    """Write Energon's ``.nv-meta``: index, shard counts, the split (train only) and the data set's class.

    Args:
        directory: Of the data set.
        shards: Names of its tar files.
        samples: How many are in them.

    Raises:
        OSError: Not all are in the index: Energon's processes, which write it, could not read the shards.
    """
    from megatron.energon.flavors import CrudeWebdataset  # noqa: PLC0415 - loads torch

    # Energon reports its progress with print.
    with contextlib.redirect_stdout(io.StringIO()), _not_collected():
        CrudeWebdataset.prepare_dataset(
            directory,
            shards,
            split_parts_ratio=[("train", 1.0)],
            shuffle_seed=None,
            workers=min(4, len(shards)),
        )
    if samples is not None:
        counts = json.loads((directory / META / ".info.json").read_text(encoding="utf-8"))["shard_counts"]
        if sum(counts.values()) != samples:
            raise OSError(errno.EIO, f"{sum(counts.values())} of {samples} samples are in the index", str(directory))
    (directory / META / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n", encoding="utf-8"
    )
