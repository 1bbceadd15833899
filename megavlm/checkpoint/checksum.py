"""Checksums that depend on position, of tensors in memory and in the files of a checkpoint, at the speed of memory."""

from __future__ import annotations

import functools
import warnings
import zipfile
from typing import Any

import torch
from torch import Tensor

_WORDS = 4096
_MASK = (1 << 64) - 1


def checksum(tensor: Tensor) -> int:
    """Return a number of 64 bits that changes with every bit of a tensor's values and with their order."""
    flat = tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy()
    return checksum_of(flat.data, 0, flat.size)


def checksum_of(data: Any, start: int, size: int) -> int:
    """Return the :func:`checksum` of ``size`` bytes of a buffer, wherever they begin.

    It is a sum of 64-bit words times odd random weights, modulo 2**64, and the same of such sums of 4096 words each
    (multilinear hashing, Carter and Wegman 1979): a change of one word never goes unseen, another one with a
    probability below 2**-60.
    """
    count, rest = divmod(size, 8)
    total = size
    if count:
        with warnings.catch_warnings(action="ignore"):  # that a mapped file cannot be written to
            words = torch.frombuffer(data, dtype=torch.int64, count=count, offset=start)
        level = 0
        while words.numel() > _WORDS:
            whole = words.numel() // _WORDS
            sums = [torch.mv(words[: whole * _WORDS].view(whole, _WORDS), _weights(level))]
            left = words[whole * _WORDS :]
            if left.numel():
                sums.append(torch.dot(left, _weights(level)[: left.numel()]).view(1))
            words, level = torch.cat(sums), level + 1
        total += int(torch.dot(words, _weights(level)[: words.numel()]))
    if rest:
        total += int.from_bytes(bytes(data[start + 8 * count : start + size]), "little") * (2 * 0x5851F42D4C957F2D + 1)
    return total & _MASK


@functools.cache
def _weights(level: int) -> Tensor:
    generator = torch.Generator().manual_seed(level + 1)
    return torch.randint(-(1 << 63), (1 << 63) - 1, (_WORDS,), generator=generator) | 1


def numbers_of(data: memoryview) -> tuple[int, int]:
    """Return where the numbers of one tensor begin in what ``torch.save`` wrote of it alone, and their bytes.

    Raises:
        ValueError: that is not what is there.
    """
    try:
        with zipfile.ZipFile(_Window(data)) as archive:
            (entry,) = (one for one in archive.infolist() if one.filename.endswith("/data/0"))
            for one in archive.infolist():
                if one is not entry:
                    archive.read(one)  # what says of which type and shape the numbers are; it has a CRC
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"is not one whole tensor: {error}") from None
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("is compressed")
    header = bytes(data[entry.header_offset : entry.header_offset + 30])
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return entry.header_offset + len(header) + names, entry.file_size


class _Window:
    """A part of a mapped file, as a file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move, as in a file."""
        self.position = (0, self.position, len(self.data))[whence] + offset
        return self.position

    def tell(self) -> int:
        """Return the position."""
        return self.position

    def read(self, size: int = -1) -> bytes:
        """Read, as in a file."""
        stop = len(self.data) if size is None or size < 0 else self.position + size
        found = bytes(self.data[self.position : stop])
        self.position += len(found)
        return found
