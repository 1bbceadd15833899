"""Writes webdatasets that Energon reads: tar files of samples, and their index; one, or one for each task."""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
from pathlib import Path

NO_TASK = "none"
"""Folder of the samples that have no task."""


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
        self.directory = directory
        self._limit = samples_per_shard
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish the last file."""
        if self._tar is not None:
            self._tar.close()

    def write(self, key: str, members: list[tuple[str, bytes]]) -> None:
        """Add one sample: its members are ``<key>.<name>``."""
        if self._tar is None or self.samples % self._limit == 0:
            self.close()
            self.names.append(f"shard-{len(self.names):06d}.tar")
            path = self.directory / self.names[-1]
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed in close
        for name, data in members:
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = len(data)
            info.mode = 0o644
            self._tar.addfile(info, io.BytesIO(data))
        self.samples += 1


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

    def __enter__(self) -> TaskWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.sets.values():
            writer.close()

    @property
    def shards(self) -> int:
        """Files so far."""
        return sum(len(writer.names) for writer in self.sets.values())

    def write(self, task: str, key: str, members: list[tuple[str, bytes]]) -> None:
        """Add one sample of a task (empty for none)."""
        label = (task or NO_TASK) if self._by_task else ""
        if label not in self.sets:
            self.sets[label] = ShardWriter(self._folder(label), self._limit)
        self.sets[label].write(key, members)

    def _folder(self, label: str) -> Path:
        if not label:
            return self._root
        name = re.sub(r"[^\w-]+", "-", label)[:80]
        taken = {writer.directory.name for writer in self.sets.values()}
        number = 2
        folder = name
        while folder in taken:  # two names may differ in signs that a folder's does not have
            folder, number = f"{name}-{number}", number + 1
        (self._root / folder).mkdir()
        return self._root / folder


def write_metadata(directory: Path, shards: list[str]) -> None:
    """Write Energon's ``.nv-meta``: index, shard counts, the split (train only) and the data set's class."""
    from megatron.energon.flavors import CrudeWebdataset  # noqa: PLC0415 - loads torch

    # Energon reports its progress with print.
    with contextlib.redirect_stdout(io.StringIO()):
        CrudeWebdataset.prepare_dataset(
            directory,
            shards,
            split_parts_ratio=[("train", 1.0)],
            shuffle_seed=None,
            workers=min(4, len(shards)),
        )
    (directory / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n", encoding="utf-8"
    )
