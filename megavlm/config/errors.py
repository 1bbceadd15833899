"""Errors that cost a line instead of a traceback, and who says it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

MAX_LINES = 5

WRONG_INPUT = 2
"""Exit code of wrong input."""
FAILED = 1
"""Exit code where the machine did not let us, and of bugs."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REMEDIES = {
    **dict.fromkeys(_NO_ROOM, "free some space there"),
    errno.EROFS: "mount it for writing",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "let this user write there"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "move the file that is in the way"),
}
_WRITING_ONLY = _NO_ROOM | {errno.EROFS}
"""What only a write can run into: without a path, it still says that a disk is to blame."""


_NOT_THE_USERS = (Path(__file__).absolute().parent.parent, Path(sys.prefix), Path(sys.base_prefix))
"""What lies there was installed: that it is missing is no wrong input."""


class UserError(ValueError):
    """What a user can mend: wrong input. One line each for key or file, rule and remedy; exit code 2."""


class UsageError(UserError):
    """The command line, or the environment of a job, is wrong: on all ranks alike."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or directory that the user named, or that belongs beside it, is not there."""


class RecipeError(UserError):
    """A recipe breaks a rule. Each line of the text names the key, the rule, and what to change."""

    @classmethod
    def of(cls, lines: Sequence[str]) -> RecipeError:
        """Make one error of all ``lines``, and show the first few."""
        shown = list(lines[:MAX_LINES])
        if len(lines) > MAX_LINES:
            shown[-1] += f" (and {len(lines) - MAX_LINES} more)"
        return cls("\n".join(shown))


class MachineError(RuntimeError):
    """The machine did not let us, through no fault of the input or of ours: a disk that filled up. One line."""


class OtherRankError(RuntimeError):
    """Another rank failed, and says why; this one leaves without a word.

    Args:
        text: for whoever asks all the same.
        exit_code: what the other rank leaves with.
    """

    def __init__(self, text: str, exit_code: int = FAILED) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def for_users(error: BaseException) -> bool:
    """Whether ``error`` is about the user's input: a UserError, or a file of theirs that is not there.

    Everything else is a bug, of ours or of a library, and wants its traceback: a ValueError of ``zip(strict=True)``,
    of unpacking or of ``int("x")``, a KeyError, a file of Python's or of this package that is missing.
    """
    if isinstance(error, UserError):
        return True
    if not isinstance(error, FileNotFoundError) or not isinstance(error.filename, str | os.PathLike):
        return False
    path = Path(error.filename).absolute()
    return not any(path.is_relative_to(ours) for ours in _NOT_THE_USERS)


def disk_problem(error: OSError, directory: str | os.PathLike[str]) -> str | None:
    """Return what is wrong with a directory that is written to, with the remedy; None where it is something else.

    Args:
        error: what a write ran into.
        directory: where everything is written.
    """
    path = error.filename if isinstance(error.filename, str | os.PathLike) else None
    inside = path is not None and Path(path).absolute().is_relative_to(Path(directory).absolute())
    if not inside and (path is not None or error.errno not in _WRITING_ONLY):
        return None
    remedy = _REMEDIES.get(error.errno or 0, "see what is wrong with the disk")
    return f"{path or directory}: {error.strerror or error}; {remedy}, or choose another directory"


def set_speaker(error: BaseException, rank: int) -> None:
    """Note on an error that several ranks may have run into which of them says it."""
    error.__dict__["speaker"] = rank


def speaker_of(error: BaseException) -> int | None:
    """Return what :func:`set_speaker` noted, on the error or on one that it follows from; None where nothing is."""
    one: BaseException | None = error
    while one is not None:
        if "speaker" in one.__dict__:
            return int(one.__dict__["speaker"])
        one = one.__cause__
    return None
