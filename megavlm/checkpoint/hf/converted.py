"""Conversions of Hugging Face directories that runs start from: made once, published whole, found again by digest.

A conversion has no layout, so every later run of the same directory takes it, at any TP x PP, and adapters have a base
that stays. Its name holds the digest of what it was made of: another version of megavlm, or a directory that somebody
edited, gets one of its own.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

import torch.distributed as dist

from megavlm import __version__
from megavlm.checkpoint.assets import small_files
from megavlm.checkpoint.hf.command import ConvertProcess
from megavlm.checkpoint.hf.given import open_directory
from megavlm.config.errors import MachineError, UserError
from megavlm.config.schema import Recipe
from megavlm.parallel.lock import read_holder
from megavlm.parallel.state import agreed, any_rank
from megavlm.weights.source import Source

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raise it when the same directory gives another conversion than before: those of older versions are left alone."""
_POLL_SECONDS = 0.5
_CLOCK = len("00:00:00 ")
"""What stands before a line of the log."""
_SAMPLES, _SAMPLE_BYTES = 8, 1 << 14


def converted(directory: Path, recipe: Recipe) -> Path:
    """Return the checkpoint that a Hugging Face directory was converted to, made now if need be; a collective.

    The first rank has it made, by a process of its own; the others wait, and all do where another run makes it.

    Args:
        directory: what ``checkpoint.load`` names.
        recipe: of the run.

    Raises:
        UserError: the directory cannot be converted.
        MachineError: the conversion failed for another reason; the line says where its output is.
    """
    first, names = dist.get_rank() == 0, [""]
    with agreed(f"looking for the conversion of {directory}"):
        if first:
            names = [str(place_of(directory, recipe).absolute())]
    dist.broadcast_object_list(names, 0)
    path = Path(names[0])
    job = _Conversion(directory, path, Path(recipe.output_dir) / "convert.log") if first else None
    try:
        while True:
            done = True
            with agreed(f"converting {directory}"):
                done = job is None or job.look()
            if not any_rank(not done):
                return path
            time.sleep(_POLL_SECONDS)
    finally:
        if job is not None:
            job.end()


def place_of(directory: Path, recipe: Recipe) -> Path:
    """Return where the conversion of a directory lies, or would lie.

    Raises:
        UserError: the directory is damaged.
    """
    root = recipe.checkpoint.converted_dir or Path(recipe.output_dir).absolute().parent / "converted"
    name = directory.resolve().name
    # The hub's cache calls the directory by its commit.
    name = directory.absolute().name if len(name) == 40 and not directory.is_symlink() else name
    return Path(root) / f"{name}-{digest(directory)[:16]}"


def digest(directory: Path) -> str:
    """Return the SHA-256 of what a conversion depends on: small files, and size, time and samples of weights.

    A file of weights of the same size that was written again has another time; copies of a directory have conversions
    of their own.

    Raises:
        UserError: the directory is damaged.
    """
    found = hashlib.sha256(f"{FORMAT} {__version__}\n".encode())
    given, _ = open_directory(directory)
    for one in given:
        for directory in one.source.folders.values():
            for path in small_files(directory):
                found.update(f"{path.name} {path.stat().st_size}\n".encode())
                found.update(path.read_bytes())
        _add_weights(found, one.source)
    return found.hexdigest()


def _add_weights(found: hashlib._Hash, source: Source) -> None:
    for path in sorted({info.file for name, info in source.tensors.items() if name not in source.made}):
        state = path.stat()
        found.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(state.st_size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
                found.update(file.read(_SAMPLE_BYTES))


class _Conversion:
    """What the first rank does until a conversion is there."""

    def __init__(self, directory: Path, path: Path, log: Path) -> None:
        self.directory, self.path, self.log = directory, path, log
        self.process: ConvertProcess | None = None
        self._told = False

    def look(self) -> bool:
        """Return whether it is there; start it, or wait for another run's, if it is not.

        Raises:
            UserError, MachineError: as :func:`converted`.
        """
        if self.process is not None and self.process.running:
            return False
        if (self.path / "run.json").is_file():
            if self.process is not None:
                for line in self.process.said()[:-2]:  # what it wrote, and how to train that
                    if " note: " not in line:  # which the run has said
                        logger.info("convert: %s", line[_CLOCK:])
            else:
                logger.info("%s: converted before, to %s", self.directory, self.path)
            self.process = None
            return True
        if self._others():
            if not self._told:
                logger.info("%s: another run converts it, to %s; waiting for that", self.directory, self.path)
            self._told, self.process = True, None
            return False
        if self.process is not None:
            kind = UserError if self.process.wait() == 2 else MachineError
            raise kind(f"checkpoint.load: {self.process.problem()}")
        logger.info("%s: converting it, once, to %s", self.directory, self.path)
        self._say_older()
        self.process = ConvertProcess(
            ["hf-to-megatron", "--hf", str(self.directory.absolute()), "--out", str(self.path)], self.log
        )
        return False

    def end(self) -> None:
        """Leave nothing running."""
        if self.process is not None:
            self.process.end()

    def _others(self) -> bool:
        """Whether another process is seen to write it."""
        holder = read_holder(self.path.with_name(f".{self.path.name}.lock"))
        return holder is not None and holder[1] is True

    def _say_older(self) -> None:
        """Name conversions of what the directory was, or of other versions of megavlm: they only take room."""
        stem = self.path.name.rpartition("-")[0]
        for path in sorted(self.path.parent.glob(f"{stem}-" + "[0-9a-f]" * 16)):
            logger.info("%s: a conversion of another version of it; remove it if no run needs it", path)
