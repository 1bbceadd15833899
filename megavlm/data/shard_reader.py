"""Reading shards that may be damaged: what is wrong with a sample's bytes is said in the sample, never raised.

Energon's own reader raises where a tar file is cut or overwritten, and that ends its iteration. This one takes the
sample's bytes where the index says and reads them as a tar file of their own, so that neighbours never matter.
"""

from __future__ import annotations

import io
import re
import sqlite3
import tarfile
from bisect import bisect_right
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote

from megatron.energon import CrudeWebdataset, SavableDataset, WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.metadata import get_info_shard_files
from megatron.energon.source_info import SourceInfo

from megavlm.config.errors import MissingFileError, UserError
from megavlm.config.prepared import META
from megavlm.data.films.source import FilePart, opened
from megavlm.data.machine import is_machine_fault

DEFECT = "__defect__"
"""Key of a sample under which it is said what is wrong with its bytes."""

_FILM = re.compile(r"film\d+")
"""Names of members that are not read, but handed on by their place."""
_LARGE = 1 << 22
"""Bytes of a sample that are not read at once."""
CUT = "cut shard"
"""The shard ends before the sample does."""
BROKEN = "broken shard"
"""The sample's bytes are no tar entries of one sample."""
NO_INDEX = "broken index"
"""The shard's index does not say where the sample lies."""


class _DefectError(Exception):
    """The text is one of the causes above."""


class ShardReader(ShardInfosITarReader):
    """Random access to the samples of a data set's shards.

    Errors of the file system are raised: they may be gone when the run is started again, and then the samples must
    not have been left out.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._files: dict[int, BinaryIO] = {}

    def __getitem__(self, idx: int) -> Any:
        """Return a sample with its files, or with :data:`DEFECT`."""
        position = bisect_right(self.shard_count_cumsum, idx) - 1
        shard_index = self.shard_tar_file_idxs[position]
        shard = self.tar_filenames[shard_index]
        try:
            key, files = self._members(idx, shard_index)
        except _DefectError as error:
            number = idx - self.shard_count_cumsum[position]
            key, files = _key_in_index(Path(str(self.base_path)), shard, number), {DEFECT: str(error)}
        if self.sample_filter is not None and not self.sample_filter(f"{shard}/{key}"):
            return None
        source = SourceInfo(dataset_path=self.base_path, index=idx, shard_name=shard, file_names=tuple(files))
        return {
            **files,
            "__key__": key,
            "__shard__": shard,
            "__restore_key__": ("Webdataset", idx),
            "__sources__": (source,),
        }

    def _members(self, idx: int, shard_index: int) -> tuple[str, dict[str, Any]]:
        """Return a sample's key and files; of a film its place in the shard."""
        file, offset, size = self._find(idx, shard_index)
        path = str(self.tar_filepaths[shard_index])
        if size > _LARGE:  # only what is not a film is read
            with opened(FilePart(path, offset, size)) as window:
                return _read_members(window, size, path, offset)
        file.seek(offset)
        data = file.read(size)
        if len(data) < size:
            raise _DefectError(CUT)
        return _read_members(io.BytesIO(data), size, path, offset)

    def _find(self, idx: int, shard_index: int) -> tuple[BinaryIO, int, int]:
        """Return the shard, and where in it a sample begins, and its size."""
        try:
            pointer = self._get_itar_sample_pointer(idx)
        except (OSError, MemoryError):
            raise
        except Exception:  # IndexError where it is cut, struct.error, ...
            raise _DefectError(NO_INDEX) from None
        file = self._open(shard_index)
        size = file.seek(0, io.SEEK_END)
        if pointer.byte_offset + pointer.byte_size > size:
            raise _DefectError(CUT)
        if pointer.byte_size <= 0 or pointer.byte_offset < 0:
            raise _DefectError(NO_INDEX)
        return file, pointer.byte_offset, pointer.byte_size

    def _open(self, shard_index: int) -> BinaryIO:
        file = self._files.pop(shard_index, None)
        if file is None:
            file = self.tar_filepaths[shard_index].open(mode="rb")
        self._files[shard_index] = file  # the newest is the last
        while len(self._files) > self.itar_cache_size:
            self._files.pop(next(iter(self._files))).close()
        return file

    def close(self) -> None:
        """Close the files."""
        super().close()
        for file in self._files.values():
            file.close()
        self._files.clear()


class ShardDataset(CrudeWebdataset):
    """A prepared data set, read by :class:`ShardReader`."""

    def build(self, worker_rotation_offset: int = 0) -> SavableDataset[Any]:
        """Build the chain that Energon builds, with another reader."""
        dataset: Any = super().build(worker_rotation_offset)
        (reader,) = dataset.dataset.join_readers
        dataset.dataset.join_readers = [
            ShardReader(
                self.path,
                self.shards,
                part_filter=reader.part_filter,
                sample_filter=reader.sample_filter,
                itar_cache_size=reader.itar_cache_size,
            )
        ]
        return dataset

    def check_shards(self) -> None:
        """Check that the shards are there, inside the data set's directory.

        Raises:
            MissingFileError: A shard, or its index, is missing.
            UserError: A shard's name leads out of the directory.
        """
        for shard in self.shards:
            name = PurePosixPath(shard.name)
            if name.is_absolute() or ".." in name.parts:
                raise UserError(f"data set {self.path}: {META} names the shard {shard.name!r} outside of it")
            path = Path(str(self.path)) / name
            for file in (path, path.with_suffix(".tar.idx")):
                if not file.is_file():
                    raise MissingFileError(f"{file} is missing, which {META} names; run megavlm prepare again")


def open_shards(path: str) -> ShardReader:
    """Open the training part of prepared data for reading in any order, outside of a training.

    Args:
        path: Directory of the prepared data.

    Raises:
        MissingFileError: A shard, or its index, is missing.
        UserError: A shard's name leads out of the directory.
    """
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = ShardDataset(EPath(Path(path)), split_part="train", training=False, worker_config=config, decoder=None)
    dataset.check_shards()
    return ShardReader(dataset.path, dataset.shards)


def _read_members(data: BinaryIO, size: int, path: str, offset: int) -> tuple[str, dict[str, Any]]:
    """Read the tar entries of one sample: its key, and the contents of its files by what stands behind the key.

    Args:
        data: The sample's bytes.
        size: How many these are.
        path: The shard.
        offset: Where in it the sample begins.
    """
    key: str | None = None
    files: dict[str, Any] = {}
    try:
        with tarfile.open(fileobj=data, mode="r:") as tar:
            for member in tar:
                match = split_name_re.match(member.name)
                # Links and devices are nothing that a sample has; nothing is ever written to disk.
                if not member.isfile() or skip_meta_re.match(member.name) or match is None:
                    continue
                if member.issparse() or member.size > size:  # a few bytes that stand for gigabytes
                    raise _DefectError(BROKEN)
                base, name = match.groups()
                content = tar.extractfile(member)
                if (key is not None and base != key) or name in files or name.startswith("__") or content is None:
                    raise _DefectError(BROKEN)
                key = base
                if _FILM.fullmatch(name):
                    files[name] = FilePart(path, offset + member.offset_data, member.size)
                    if member.offset_data + member.size > size:
                        raise _DefectError(BROKEN)
                else:
                    files[name] = content.read()
            end = tar.offset
    except (_DefectError, MemoryError):
        raise
    except OSError as error:
        if is_machine_fault(error):
            raise
        raise _DefectError(BROKEN) from None
    except Exception:  # of a few flipped bits tarfile makes TarError, OverflowError, ValueError, EOFError, ...
        raise _DefectError(BROKEN) from None
    # tarfile takes a broken header behind the first for the end of the file.
    if key is None or end < size:
        raise _DefectError(BROKEN)
    return key, files


def _key_in_index(directory: Path, shard: str, number: int) -> str:
    """Return what Energon's index calls a sample whose own bytes do not tell."""
    try:
        file_id = get_info_shard_files(EPath(directory)).index(shard)
        uri = f"file:{quote(str((directory / META / 'index.sqlite').resolve()))}?mode=ro&immutable=1"
        connection = sqlite3.connect(uri, uri=True)
        try:
            query = "SELECT sample_key FROM samples WHERE tar_file_id = ? AND sample_index = ?"
            row = connection.execute(query, (file_id, number)).fetchone()
        finally:
            connection.close()
    except Exception:  # what a foreign database, or a list of shards that is no JSON, makes of it
        row = None
    return str(row[0]) if row else f"sample {number}"
