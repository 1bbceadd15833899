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

from megavlm.data.decode import DecodeTask, ImageDecoder
from megavlm.data.image_colours import Alpha
from megavlm.data.images import MAX_PIXELS, ImageError, ImageHeader
from megavlm.data.plans_single import SquashPlan
from megavlm.data.render import render_tensor
from megavlm.parallel.device import current_stream

logger = logging.getLogger(__name__)

_MAX_BATCH = 32


def _decoded(device: str) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    # Fancy upsampling and no hardware decoder: pixels equal to libjpeg's, whatever the machine.
    extra: dict[str, Any] = {"jpeg_fancy_upsampling": True, "hw_decoder_load": 0.0} if device == "mixed" else {}
    return fn.decoders.image(encoded, device=device, output_type=types.RGB, **extra)


@pipeline_def(exec_async=True, exec_pipelined=True, prefetch_queue_depth=1)
def _squash_pipeline(device: str, size: int) -> Any:
    return fn.resize(
        _decoded(device),
        resize_x=size,
        resize_y=size,
        interp_type=types.INTERP_CUBIC,
        # Without antialiasing, strong downscaling is far off: up to 65 of 255 at the 99.9th percentile.
        antialias=True,
        dtype=types.UINT8,
    )


@pipeline_def(exec_async=True, exec_pipelined=True, prefetch_queue_depth=1)
def _decode_pipeline(device: str) -> Any:
    return _decoded(device)


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
        self._pipelines: dict[Any, Any] = {}

    def _is_fast(self, header: ImageHeader) -> bool:
        return header.plain

    def _decode_fast(self, jobs: Mapping[int, DecodeTask]) -> list[int]:
        rescue: list[int] = []
        headers = {index: job.header for index, job in jobs.items() if job.header is not None}
        for part in _batches(headers):
            chosen = [jobs[index] for index in part]
            plan = chosen[0].plan
            try:
                if isinstance(plan, SquashPlan) and plan.resample == "bicubic":
                    self._squash(chosen, plan)
                else:
                    rescue += [index for index, fits in zip(part, self._render(chosen), strict=True) if not fits]
            except RuntimeError as error:
                # A failed pipeline cannot be used again.
                logger.warning("DALI failed on a batch of %d images, decoding them with PIL: %s", len(part), error)
                self._pipelines.clear()
                self.rebuilds += 1
                rescue += part
        return rescue

    def _squash(self, jobs: Sequence[DecodeTask], plan: SquashPlan) -> None:
        """Resize in DALI as well, as runs did before there were image plans."""
        output = self._run(jobs, ("squash", plan.side), _squash_pipeline, size=plan.side)
        for job, pixels_HWC in zip(jobs, self._to_torch(output.as_tensor()), strict=True):
            job.out[0] = pixels_HWC.permute(2, 0, 1)

    def _render(self, jobs: Sequence[DecodeTask]) -> list[bool]:
        """Decode in DALI, and make views with torch: nearer to PIL's than DALI's filters, where pictures shrink much.

        Returns:
            Whether each could be: others are PIL's to judge, as another reader of the file sees another size.
        """
        output, done = self._run(jobs, "decode", _decode_pipeline), []
        for index, job in enumerate(jobs):
            pixels_CHW = self._to_torch(output[index]).permute(2, 0, 1)
            try:
                layout = job.laid_out(pixels_CHW.size(2), pixels_CHW.size(1))
                job.fill(render_tensor(pixels_CHW, job.plan, layout))
            except ImageError:
                done.append(False)
            else:
                done.append(True)
        return done

    def _run(self, jobs: Sequence[DecodeTask], key: Any, make: Any, **settings: Any) -> Any:
        pipeline = self._pipeline(key, make, **settings)
        pipeline.feed_input("encoded", [np.frombuffer(job.data, np.uint8) for job in jobs])
        (output,) = pipeline.run()
        return output

    def _pipeline(self, key: Any, make: Any, **settings: Any) -> Any:
        if key not in self._pipelines:
            self._pipelines[key] = make(
                device="cpu" if self._device_id is None else "mixed",
                batch_size=_MAX_BATCH,
                num_threads=self._num_threads,
                device_id=self._device_id,
                **settings,
            )
            self._pipelines[key].build()
        return self._pipelines[key]

    def _to_torch(self, tensor: Any) -> torch.Tensor:
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
