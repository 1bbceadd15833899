"""Whose fault an error is: the data's, which costs a sample, or the machine's, which must stop the work.

Data that is counted as bad because files were used up, memory ran out or a disk failed is lost for good, though nothing
is wrong with it: such errors are raised, and the same command, started again, finds all of it.
"""

from __future__ import annotations

import errno
import socket
import ssl
from pathlib import Path

_OF_A_PATH = frozenset({
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM,
    errno.EINVAL, errno.EILSEQ,
})  # fmt: skip
"""What is wrong with the path that the data names, or with the one file there."""
_OF_THIS_MACHINE = frozenset({
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS,
    errno.EAGAIN,
})  # fmt: skip
"""What no other machine can be to blame for."""


def is_machine_fault(error: BaseException) -> bool:
    """Whether an error met while files were read is this machine's (or its disk's), not theirs.

    Errors that libraries raise about content (PIL's, pyarrow's) have no number.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _OF_A_PATH


def is_local_fault(error: BaseException) -> bool:
    """Whether an error met while something was fetched is this machine's, not the other's or the network's."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, socket.gaierror | ssl.SSLError):  # they have numbers of their own
        return isinstance(error, socket.gaierror) and error.errno == socket.EAI_MEMORY
    return isinstance(error, OSError) and error.errno in _OF_THIS_MACHINE


def is_file(path: Path) -> bool:
    """Whether there is a file; a path that cannot be one has none.

    Raises:
        OSError: The machine could not look.
    """
    try:
        return path.is_file()
    except (OSError, ValueError) as error:
        if is_machine_fault(error):
            raise
        return False
