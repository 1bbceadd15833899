"""Checksums that depend on position, of tensors in memory and in the files of a checkpoint, at the speed of memory."""

from __future__ import annotations

import functools
import io
import warnings
import zipfile
import zlib
from typing import Any

import torch
from torch import Tensor

_LOCAL_HEADER = 30
"""Bytes before a file's name in a zip archive."""
_SMALL_BYTES = 1 << 16
"""An archive of so few bytes is read at once."""
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
        with zipfile.ZipFile(io.BytesIO(data) if len(data) < _SMALL_BYTES else _Window(data)) as archive:
            entries = archive.infolist()
        (entry,) = (one for one in entries if one.filename.endswith("/data/0"))
        for one in entries:
            start = _start_of(data, one)
            # What says of which type and shape the numbers are has a CRC.
            if one is not entry and zlib.crc32(data[start : start + one.file_size]) != one.CRC:
                raise ValueError(f"Bad CRC-32 for file {one.filename}")
        return _start_of(data, entry), entry.file_size
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"is not one whole tensor: {error}") from None


def _start_of(data: memoryview, entry: zipfile.ZipInfo) -> int:
    """Return where the bytes of a file in an archive begin; torch compresses none.

    Raises:
        ValueError: they do not begin as the archive's directory says.
    """
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("is compressed")
    name = entry.header_offset + _LOCAL_HEADER
    header = bytes(data[entry.header_offset : name])
    named, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    if header[:4] != b"PK\x03\x04" or bytes(data[name : name + named]) != entry.orig_filename.encode():
        raise ValueError(f"{entry.filename} is not where the directory says")
    return name + named + extra


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
