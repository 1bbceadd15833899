"""A directory appears under its name whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megavlm.checkpoint.manifest import sync_directory
from megavlm.config.errors import UserError
from megavlm.parallel.lock import held

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextlib.contextmanager
def publishing(out: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield ``OUT.partial`` to write into; at the end of the block it is flushed to disk and becomes ``out``.

    If the block raises, nothing is left. What an interrupted run left is removed at the start.

    Args:
        out: directory to appear; it may exist if it is empty.
        needed_bytes: what will be written, to be refused at once where the disk has less.

    Raises:
        HeldError: another process writes it.
        UserError: ``out`` exists and holds something, or the disk is too small.
        OSError: the disk is full, say.
    """
    out = out.absolute()
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    # Beside it, as everything in it is published.
    with held(out.with_name(f".{out.name}.lock"), "convert", str(out)) as lock:
        _empty(partial)
        try:
            refuse_existing(out)  # another process may have been quicker
            free = shutil.disk_usage(partial).free  # now that what an interrupted run left is gone
            if needed_bytes > free:
                raise UserError(
                    f"{out}: needs {needed_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free there"
                )
            yield partial
            _sync(partial)
            lock.check()
            if out.exists():
                out.rmdir()
            partial.rename(out)
            sync_directory(out.parent)
        except BaseException as error:
            if not lock.lost():
                shutil.rmtree(partial, ignore_errors=True)
            # A full disk does not say what was written, or names the file that was being copied.
            if isinstance(error, OSError) and (error.filename is None or error.errno in _NO_ROOM):
                error.filename, error.filename2 = str(out), None
            raise


def refuse_existing(out: Path) -> None:
    """Check that nothing is in the way of ``out``.

    Raises:
        UserError: it exists and holds something.
    """
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already and is left as it is; give another --out, or remove it first")


def _empty(partial: Path) -> None:
    """Make ``partial``, or empty it: what is in it an interrupted run left."""
    if os.path.lexists(partial) and (partial.is_symlink() or not partial.is_dir()):
        raise UserError(f"{partial}: is in the way; move it, or give another --out")
    partial.mkdir(exist_ok=True)
    for leftover in partial.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


def _sync(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            handle = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_directory(Path(root))
