"""What the times of a plan are told in: seconds of a chunk, and of a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Seconds of one micro-batch through a chunk, on one rank."""

    forward: float
    backward: float
    tensor_parallel: float
    """Part of the two that waits for tensor-parallel collectives."""


@dataclass(frozen=True)
class StepTime:
    """One step of the job, predicted; seconds."""

    step: float
    pipeline: float
    """Forward and backward passes of all micro-batches, with waiting."""
    bubble: float
    """Share of the pipeline's time, and of the vision phases', that its ranks wait, 0 to 1."""
    stage_seconds: tuple[float, ...]
    """Forward and backward pass of one micro-batch, for each stage."""
    tensor_parallel: float
    """Exposed tensor-parallel collectives of the stage that has most, over the step."""
    p2p: float
    """One message between stages."""
    data_parallel: float
    """Gradient reduction and parameter gathering of the stage that has most, hidden or not."""
    data_parallel_exposed: float
    """What of it is not hidden."""
    optimizer: float
    """Update of the weights."""
    mfu: float
    """Useful model FLOP/s over the peak of all GPUs, 0 to 1."""
    mfu_conventional: float
    """The same with the whole square of attention, as most published figures count."""
    hfu: float
    """That, and what is recomputed."""
    vision: float = 0.0
    """Where all ranks encode: both phases around the pipeline, with what goes from rank to rank."""


@dataclass(frozen=True)
class Around:
    """Seconds of a step beside those in which micro-batches pass through the pipeline."""

    stages: list[list[Cost]]
    """Of a micro-batch, in the chunks of each stage."""
    wired: float
    """As ``StepTime.data_parallel``."""
    exposed: float
    """As ``StepTime.data_parallel_exposed``."""
    update: float
    """As ``StepTime.optimizer``."""
    vision: float
    """As ``StepTime.vision``."""
    handing: float
    """Of these, what goes from rank to rank."""
    pixels: float
    """Pixels on their way to the GPU."""

    def with_passes(self, pipeline: float) -> float:
        """Return the seconds of a step whose passes take so many."""
        return pipeline + self.vision + self.exposed + self.update + self.pixels
