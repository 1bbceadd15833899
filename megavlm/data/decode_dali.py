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

from megavlm.data.decode import ImageDecoder, Job
from megavlm.data.image_colours import Alpha
from megavlm.data.images import MAX_PIXELS, ImageError, ImageHeader
from megavlm.data.media import Box, Canvas, Colour, ImageLayout, ImagePlan
from megavlm.data.plans_single import SquashPlan
from megavlm.data.render import take
from megavlm.parallel.device import current_stream

logger = logging.getLogger(__name__)

_MAX_BATCH = 32
_CANVASES = 2
"""Canvases of a picture that one pipeline makes: tiles and the whole."""
# Without antialiasing, strong downscaling is far off: up to 65 of 255 at the 99.9th percentile.
_FILTERS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR, "lanczos": types.INTERP_LANCZOS3}
_UNUSED = Canvas(Box(0, 0, 1, 1), (1, 1), Box(0, 0, 1, 1))


def _decoded(device: str) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    # Fancy upsampling and no hardware decoder: pixels equal to libjpeg's, whatever the machine.
    extra: dict[str, Any] = {"jpeg_fancy_upsampling": True, "hw_decoder_load": 0.0} if device == "mixed" else {}
    return fn.decoders.image(encoded, device=device, output_type=types.RGB, **extra)


@pipeline_def(exec_async=True, exec_pipelined=True, prefetch_queue_depth=1)
def _squash_pipeline(device: str, size: int, resample: str) -> Any:
    return fn.resize(
        _decoded(device),
        resize_x=size,
        resize_y=size,
        interp_type=_FILTERS[resample],
        antialias=True,
        dtype=types.UINT8,
    )


@pipeline_def(exec_async=True, exec_pipelined=True, prefetch_queue_depth=1)
def _canvas_pipeline(device: str, resample: str, fill: Colour) -> Any:
    """Make the resized planes of :class:`Canvas`, each picture's own, with the picture's height and width."""
    pictures = _decoded(device)
    found = []
    for number in range(_CANVASES):
        start, shape, size = (
            fn.external_source(name=f"{name}{number}", dtype=kind, ndim=1)
            for name, kind in (("start", types.INT32), ("shape", types.INT32), ("size", types.FLOAT))
        )
        source = fn.slice(
            pictures, start=start, shape=shape, axes=(0, 1), out_of_bounds_policy="pad", fill_values=list(fill)
        )
        found.append(fn.resize(source, size=size, interp_type=_FILTERS[resample], antialias=True, dtype=types.UINT8))
    return tuple(found)


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

    def _decode_fast(self, jobs: Mapping[int, Job]) -> list[int]:
        rescue: list[int] = []
        headers = {index: job.header for index, job in jobs.items() if job.header is not None}
        for part in _batches(headers):
            chosen = [jobs[index] for index in part]
            try:
                if isinstance(chosen[0].plan, SquashPlan):
                    self._squash(chosen, chosen[0].plan)
                else:
                    rescue += [index for index, fits in zip(part, self._tile(chosen), strict=True) if not fits]
            except RuntimeError as error:
                # A failed pipeline cannot be used again.
                logger.warning("DALI failed on a batch of %d images, decoding them with PIL: %s", len(part), error)
                self._pipelines.clear()
                self.rebuilds += 1
                rescue += part
        return rescue

    def _squash(self, jobs: Sequence[Job], plan: SquashPlan) -> None:
        pipeline = self._pipeline((plan.side, plan.resample), _squash_pipeline, size=plan.side, resample=plan.resample)
        pipeline.feed_input("encoded", [np.frombuffer(job.data, np.uint8) for job in jobs])
        (output,) = pipeline.run()
        pixels_NHWC = self._to_torch(output.as_tensor())
        for job, pixels_HWC in zip(jobs, pixels_NHWC, strict=True):
            job.out[0] = pixels_HWC.permute(2, 0, 1)

    def _tile(self, jobs: Sequence[Job]) -> list[bool]:
        """Fill the jobs' views; return whether each could be: others are PIL's to judge."""
        plan = jobs[0].plan
        layouts = [_layout(job) for job in jobs]
        fitting = [index for index, layout in enumerate(layouts) if layout is not None]
        if fitting:
            outputs = self._canvases([jobs[index] for index in fitting], [layouts[index] for index in fitting], plan)
        for place, index in enumerate(fitting):
            layout = layouts[index]
            assert layout is not None
            frames = [
                take(self._to_torch(output[place]).permute(2, 0, 1), canvas.frame, plan.fill)
                for canvas, output in zip(layout.canvases, outputs, strict=False)
            ]
            for out, view in zip(jobs[index].out, layout.views, strict=True):
                out.copy_(take(frames[view.canvas], view.box, plan.fill))
        return [layout is not None for layout in layouts]

    def _canvases(self, jobs: Sequence[Job], layouts: Sequence[ImageLayout | None], plan: ImagePlan) -> Any:
        """Return for each canvas the planes of all jobs, as DALI holds them."""
        pipeline = self._pipeline((plan.resample, plan.fill), _canvas_pipeline, resample=plan.resample, fill=plan.fill)
        pipeline.feed_input("encoded", [np.frombuffer(job.data, np.uint8) for job in jobs])
        for number in range(_CANVASES):
            canvases = [
                layout.canvases[number] if layout is not None and number < len(layout.canvases) else _UNUSED
                for layout in layouts
            ]
            boxes = [canvas.source for canvas in canvases]
            pipeline.feed_input(f"start{number}", [np.array([box.top, box.left], np.int32) for box in boxes])
            pipeline.feed_input(f"shape{number}", [np.array(box.size[::-1], np.int32) for box in boxes])
            pipeline.feed_input(f"size{number}", [np.array(one.resized[::-1], np.float32) for one in canvases])
        return pipeline.run()

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


def _layout(job: Job) -> ImageLayout | None:
    """Return the layout of a job's picture by its header, which DALI's decoder is held to by MAX_PIXELS alone.

    None where it cannot be made here: another reader of the file saw another size, or there are too many canvases.
    """
    header = job.header
    assert header is not None
    try:
        layout = job.laid_out(header.width, header.height)
    except ImageError:
        return None
    return layout if len(layout.canvases) <= _CANVASES else None


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
