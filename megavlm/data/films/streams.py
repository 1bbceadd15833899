"""Film files through FFmpeg (PyAV): an index from their packets, and chosen frames, one at a time.

Files are not trusted. Only demuxers are let at them that read the one file that they are given (a playlist would name
others, and URLs), sizes are checked before a decoder allocates, and what FFmpeg makes of the rest is one bad film.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megavlm.config.errors import MachineError
from megavlm.data.films.index import MOST_STORED_FRAMES, FilmIndex
from megavlm.data.films.plan import FilmError
from megavlm.data.films.source import FilmData, opened
from megavlm.data.image_colours import Alpha
from megavlm.data.image_header import MAX_PIXELS, ImageError, check_size
from megavlm.data.machine import is_machine_fault

if TYPE_CHECKING:
    import av

FILM_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv",
)  # fmt: skip
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,flv,asf,ogg"
_USUAL_RATE = 25.0
"""Of a film that says nothing of its rate."""
_LATE = 2.0
"""Frames that a film may end before the last that its packets promise: those that are never shown are packets too."""


def av_module() -> Any:
    """Return PyAV.

    Raises:
        MachineError: It is not installed.
    """
    try:
        import av  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MachineError(f"films are read with PyAV, which is not installed ({error}); "
                           "pip install 'megavlm[video]'") from None  # fmt: skip
    return av


def read_stream_index(data: FilmData) -> FilmIndex:
    """Return what is known of a film, from its packets and its first frame.

    Raises:
        FilmError: It is no film, has no frames, or is cut.
        MachineError: PyAV is not installed.
    """
    with _stream(data) as (container, stream):
        declared, average = stream.frames, stream.average_rate or stream.guessed_rate
        unit = stream.time_base or Fraction(1, 1000)
        shown, keys, packets = _packets(container, stream)
        cut = "mov" in container.format.name and packets < declared
        # AVI has no times, and what is guessed of them is wrong where frames are stored out of order.
        timed = container.format.name != "avi" and None not in shown
    if not shown:
        raise FilmError("truncated" if declared else "no frames", "the film has no packets of its stream")
    if cut:
        raise FilmError("truncated", f"{packets} of its {declared} frames are there")
    with _stream(data) as (container, stream):
        first = next(_decoded(container, stream), None)
        if first is None:
            raise FilmError("no frames", "nothing can be decoded")
        width, height = first.width, first.height
        if round(first.rotation / 90) % 2:
            width, height = height, width
    if not timed:
        rate = float(average or _USUAL_RATE)
        return FilmIndex(width, height, len(shown), rate if _sound(rate) else _USUAL_RATE)
    times, found = (np.unique(np.asarray(one, np.int64)) for one in (shown, keys))
    return FilmIndex(width, height, len(times), _rate(times, unit, average), False, times, found, Fraction(unit))


def read_stream(data: FilmData, index: FilmIndex, indices: Sequence[int], alpha: Alpha) -> Iterator[NDArray[np.uint8]]:
    """Yield frames of a film, [H, W, 3] upright in RGB.

    Frames are decoded from the last key frame before each, or on from the one before it; a few are held at a time.

    Args:
        data: The film.
        index: Its index.
        indices: Which frames; increasing.
        alpha: What becomes of transparency.

    Raises:
        FilmError: A frame cannot be decoded.
        MachineError: PyAV is not installed.
    """
    walk = _Walk(data, index)
    try:
        for one in indices:
            yield _pixels(walk.frame(int(one)), alpha)
    finally:
        walk.close()


class _Walk:
    """A film's frames in the order of their times, from wherever is asked on."""

    def __init__(self, data: FilmData, index: FilmIndex) -> None:
        self._data, self._index = data, index
        self._seeks = len(index.keys) > 1
        self._stack = contextlib.ExitStack()
        self._count = 0
        self._open()

    def _open(self) -> None:
        self._stack.close()
        self._container, self._stream = self._stack.enter_context(_stream(self._data))
        self._frames = _decoded(self._container, self._stream)
        self._last: Any = None
        self._ahead: Any = None
        self._count = 0

    def close(self) -> None:
        self._stack.close()

    def frame(self, number: int) -> av.VideoFrame:
        """Return a frame; none before it can be asked for any more.

        Raises:
            FilmError: The film ends before it.
        """
        if not len(self._index.times):
            while self._count <= number:
                self._last, self._count = self._next(), self._count + 1
            return self._last
        target = int(self._index.times[number])
        if self._seeks:
            self._seek(target)
        while True:
            if self._last is not None and self._last.pts == target:
                return self._last
            if self._ahead is None:
                self._ahead = next(self._frames, None)
            if self._ahead is None or self._ahead.pts is None or self._ahead.pts > target:
                return self._nearest(target)
            self._last, self._ahead = self._ahead, None

    def _nearest(self, target: int) -> Any:
        """Return the frame before a time at which there is none: what is shown then."""
        ended = self._ahead is None
        if self._last is not None:
            late = (target - self._last.pts) * float(self._index.unit) * self._index.rate
            if not ended or late <= _LATE:
                return self._last
        elif not ended and not self._seeks:
            return self._ahead
        if self._seeks:  # the film was entered behind it, as happens where a container has no index of its own
            self._seeks = False
            self._open()
            return self.frame(int(np.searchsorted(self._index.times, target)))
        raise FilmError("truncated", "its frames end before its packets do")

    def _next(self) -> Any:
        frame = next(self._frames, None)
        if frame is None:
            if self._last is not None and self._count + _LATE >= self._index.frames:
                return self._last
            raise FilmError("truncated", f"{self._count} of its {self._index.frames} frames can be decoded")
        return frame

    def _seek(self, target: int) -> None:
        """Go on from the last key frame before a time, where that is ahead of what was decoded."""
        key = int(self._index.keys[max(0, int(np.searchsorted(self._index.keys, target, side="right")) - 1)])
        at = self._ahead if self._ahead is not None else self._last
        if key > target or (at is not None and at.pts is not None and key <= at.pts):
            return
        if at is None and key <= self._index.keys[0]:
            return
        if not self._at_key(key):
            self._seeks = False
            self._open()
            return
        with _told():
            self._container.seek(key, stream=self._stream, backward=True)
        self._frames, self._last, self._ahead = _decoded(self._container, self._stream), None, None

    def _at_key(self, key: int) -> bool:
        """Seek a key frame, and return whether it is found.

        MPEG program streams are entered anywhere about there, and their decoders make frames of what they lack.
        """
        with _told():
            self._container.seek(key, stream=self._stream, backward=True)
            first = next((one for one in self._container.demux(self._stream) if one.size), None)
        return first is not None and first.is_keyframe and first.pts is not None and first.pts <= key


@contextlib.contextmanager
def _stream(data: FilmData) -> Iterator[tuple[Any, Any]]:
    """Open a film, and give the container and its stream of pictures.

    Raises:
        FilmError: It is no film, or has no such stream that can be decoded.
    """
    module = av_module()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(opened(data))
        options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "none", "enable_drefs": "0"}
        try:
            with _told():
                container = stack.enter_context(module.open(file, "r", options=options, metadata_errors="replace"))
        except FilmError as error:
            raise FilmError("not a film", str(error)) from None
        covers = module.stream.Disposition.attached_pic
        streams = [one for one in container.streams.video if not one.disposition & covers]
        if not streams:
            raise FilmError(
                "no pictures", "the file has sound alone" if container.streams.audio else "no stream of pictures"
            )
        stream = streams[0]
        context = stream.codec_context
        if context is None:
            raise FilmError("codec not read", "FFmpeg has no decoder for it here")
        if context.width or context.height:
            _check_size(context.width, context.height)
        # One thread: what damage looks like must not depend on which thread came first.
        context.thread_count = 1
        context.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, stream


def _check_size(width: int, height: int) -> None:
    try:
        check_size(width, height)
    except ImageError as error:
        raise FilmError(error.cause, str(error)) from None


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Tell what FFmpeg raises as a bad film, but for what is this machine's fault.

    Raises:
        FilmError: The film is at fault.
    """
    module = av_module()
    try:
        yield
    except FilmError:
        raise
    except module.error.FFmpegError as error:
        # FFmpeg's own numbers are those of errno only where the file system spoke, and that raises OSError by itself.
        if isinstance(error, MemoryError):
            raise
        raise FilmError("decode error", " ".join(str(error).split())) from None
    except Exception as error:
        if isinstance(error, OSError) and is_machine_fault(error):
            raise
        raise FilmError("decode error", f"{type(error).__name__}: {error}") from None


def _packets(container: Any, stream: Any) -> tuple[list[int | None], list[int], int]:
    """Return when frames are shown, as far as packets say; those of key frames; and the number of packets."""
    shown: list[int | None] = []
    keys: list[int] = []
    packets = 0
    with contextlib.suppress(FilmError), _told():  # a film that is cut ends there
        for packet in container.demux(stream):
            if not packet.size:
                continue
            packets += 1
            if packet.is_discard:
                continue
            shown.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
            if packets > MOST_STORED_FRAMES:
                break
    if packets > MOST_STORED_FRAMES:
        raise FilmError("too many frames", f"more than {MOST_STORED_FRAMES:,}")
    return shown, keys, packets


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Yield frames from where the container is.

    Raises:
        FilmError: One cannot be decoded.
    """
    with _told():
        for frame in container.decode(stream):
            _check_size(frame.width, frame.height)
            yield frame


def _pixels(frame: Any, alpha: Alpha) -> NDArray[np.uint8]:
    """Return [H, W, 3] of a frame, turned as its display matrix says."""
    with _told():
        if any(component.is_alpha for component in frame.format.components) or frame.format.has_palette:
            rgba = frame.to_ndarray(format="rgba")
            pixels = rgba[:, :, :3]
            if alpha == "white":
                share = rgba[:, :, 3:].astype(np.uint16)
                pixels = ((pixels * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)
        else:
            pixels = frame.to_ndarray(format="rgb24")
    mirrored, quarters = _turn(frame)
    pixels = pixels[:, ::-1] if mirrored else pixels
    return np.ascontiguousarray(np.rot90(pixels, quarters) if quarters else pixels)


def _turn(frame: Any) -> tuple[bool, int]:
    """Return whether a frame is mirrored left to right, and by how many quarters it then turns against the clock.

    PyAV tells an angle alone, which is another one where the display matrix mirrors, as that of a front camera may.
    """
    found = next((one for one in frame.side_data if one.type.name == "DISPLAYMATRIX"), None)
    if found is None:
        return False, round(frame.rotation / 90) % 4
    # x' = a x + c y, y' = b x + d y (libavutil/display.h).
    a, b, _, c, d = (float(one) for one in np.frombuffer(bytes(found), np.int32)[:5])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return mirrored, round(-math.atan2(b, a) / (math.pi / 2)) % 4


def _rate(times: NDArray[np.int64], unit: Fraction, average: Fraction | None) -> float:
    """Return frames in a second: what the file says, where its times say the same within 1 %; else by these."""
    told = float(average) if average else 0.0
    if len(times) < 2:
        return told if _sound(told) else _USUAL_RATE
    measured = (len(times) - 1) / (float(unit) * float(times[-1] - times[0]))
    return told if _sound(told) and abs(told / measured - 1) < 0.01 else measured


def _sound(rate: float) -> bool:
    return 0 < rate < math.inf
