"""How far a run has come: what a checkpoint carries besides tensors, and when to stop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Counters of a run over all its restarts, over the whole job."""

    step: int = 0
    """Optimizer steps taken."""
    packs: int = 0
    """Packs trained on."""
    tokens: int = 0
    """Tokens trained on, without padding."""
    supervised_tokens: int = 0
    """Tokens with a label among them."""
    padding_tokens: int = 0
    """Positions that held no sample."""
    images: int = 0
    """Images trained on."""
    samples: int = 0
    """Samples read, good and bad."""
    skipped_samples: dict[str, int] = dataclasses.field(default_factory=dict)
    """Those that were left out, by cause."""
    seconds: float = 0.0
    """Wall-clock time of the steps."""
    skipped_steps: int = 0
    """Steps that changed nothing, as their loss or gradient was not finite, or the loss too high."""
    skipped_in_row: int = 0
    """How many of them were the last ones."""
    empty_steps: int = 0
    """Steps that changed nothing, as no token had a label."""
    running_loss: float | None = None
    """Running mean of the loss over some 50 steps, for training.loss_spike_factor. (``mean_loss`` of older checkpoints
    is not read: steps without labels counted as 0 in it.)"""
    running_loss_steps: int = 0
    """Steps that are in it."""

    def to_json(self) -> dict[str, Any]:
        """Return the counters for ``run.json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        """Return the counters that ``run.json`` holds; keys of others are left alone."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in names if name in values})


class Deadline:
    """``training.exit_after_minutes``: the clock starts when the run starts.

    Args:
        minutes: time until the run is to stop; None for never.
    """

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def passed(self) -> bool:
        """Whether time is up on this rank."""
        return self._end is not None and time.monotonic() >= self._end
