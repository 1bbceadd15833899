"""The DALI decoder: on a GPU JPEGs are decoded there (``mixed``), without one DALI's CPU operators run.

The GPU path shares every line with the CPU path but the operators' device; it was not run on a GPU yet.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from megavlm.data.decode import ImageDecoder
from megavlm.data.image_colours import Alpha
from megavlm.data.images import MAX_PIXELS, ImageHeader
from megavlm.parallel.device import current_stream

logger = logging.getLogger(__name__)

_MAX_BATCH = 32


@pipeline_def(exec_async=True, exec_pipelined=True, prefetch_queue_depth=1)
def _resize_pipeline(device: str, size: int) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    # Fancy upsampling and no hardware decoder: pixels equal to libjpeg's, whatever the machine.
    extra: dict[str, Any] = {"jpeg_fancy_upsampling": True, "hw_decoder_load": 0.0} if device == "mixed" else {}
    images = fn.decoders.image(encoded, device=device, output_type=types.RGB, **extra)
    return fn.resize(
        images,
        resize_x=size,
        resize_y=size,
        interp_type=types.INTERP_CUBIC,
        # Without antialiasing, strong downscaling is far off: up to 65 of 255 at the 99.9th percentile.
        antialias=True,
        dtype=types.UINT8,
    )


class DaliDecoder(ImageDecoder):
    """NVIDIA DALI.

    Args:
        device_id: GPU to decode on; None for the CPU.
        num_threads: CPU threads.
        alpha: What becomes of transparency.
    """

    def __init__(self, device_id: int | None, num_threads: int = 2, alpha: Alpha = "white") -> None:
        super().__init__(alpha)
        if device_id is not None:
            self.device = torch.device("cuda", device_id)
        self.rebuilds = 0
        """Batches that made DALI fail and were decoded by PIL instead."""
        self._device_id = device_id
        self._num_threads = num_threads
        self._pipelines: dict[int, Any] = {}

    def _is_fast(self, header: ImageHeader) -> bool:
        return header.plain

    def _decode_fast(
        self, images: Sequence[bytes], headers: Mapping[int, ImageHeader], size: int, out: torch.Tensor
    ) -> list[int]:
        rescue: list[int] = []
        for part in _batches(headers):
            try:
                out[part] = self._run([images[index] for index in part], size).permute(0, 3, 1, 2)
            except RuntimeError as error:
                # A failed pipeline cannot be used again.
                logger.warning("DALI failed on a batch of %d images, decoding them with PIL: %s", len(part), error)
                self._pipelines.pop(size, None)
                self.rebuilds += 1
                rescue += part
        return rescue

    def _run(self, images: list[bytes], size: int) -> torch.Tensor:
        """Decode at most _MAX_BATCH images to [N, size, size, 3] uint8."""
        pipeline = self._pipelines.get(size)
        if pipeline is None:
            pipeline = _resize_pipeline(
                device="cpu" if self._device_id is None else "mixed",
                size=size,
                batch_size=_MAX_BATCH,
                num_threads=self._num_threads,
                device_id=self._device_id,
            )
            pipeline.build()
            self._pipelines[size] = pipeline
        pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in images])
        (output,) = pipeline.run()
        tensor = output.as_tensor()
        pixels = torch.empty(tensor.shape(), dtype=torch.uint8, device=self.device)
        # On torch's own stream: the memory of ``pixels`` may still be read by kernels that are queued there.
        stream = None if self._device_id is None else current_stream(self.device)
        feed_ndarray(tensor, pixels, cuda_stream=stream)
        return pixels


def _batches(headers: Mapping[int, ImageHeader]) -> Iterator[list[int]]:
    """Indices of the images that are decoded at once: DALI holds all of them at their full size."""
    part: list[int] = []
    pixels = 0
    for index, header in headers.items():
        size = header.width * header.height
        if part and (len(part) == _MAX_BATCH or pixels + size > MAX_PIXELS):
            yield part
            part, pixels = [], 0
        part.append(index)
        pixels += size
    if part:
        yield part
