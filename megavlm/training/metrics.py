"""What a run says while it trains: a progress line, TensorBoard and other loggers, and ``metrics.jsonl``."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megavlm.architectures.cost import Pictures, costless
from megavlm.config.checks import source_name
from megavlm.config.schema import Recipe
from megavlm.data.device_batch import Batch
from megavlm.data.feed import FeedCounters
from megavlm.layers.segments import segment_lengths
from megavlm.parallel.device import local_device, peak_flops
from megavlm.parallel.lock import LockView
from megavlm.parallel.state import is_logging_rank, is_tensorboard_rank
from megavlm.planning.flops import StepFlops, count_step
from megavlm.training.experts import ExpertReport
from megavlm.training.lines import drop_steps_after
from megavlm.training.loggers.outlet import Outlet, open_outlets
from megavlm.training.loss import mean_loss, task_mean
from megavlm.training.progress import Progress
from megavlm.training.step import StepResult
from megavlm.training.timing import STRAGGLER, StepTiming

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
Figure = float | str | list[int]
"""What a line of metrics says under a name."""


class Metrics:
    """Sums steps up over a window of ``logging.log_interval`` and reports each window.

    Every rank has one and calls :meth:`step`; the first rank writes the log and serves other loggers, the
    last one writes TensorBoard.

    Args:
        recipe: the run.
        progress: the run's counters, kept up to date here.
        counters: of this rank's feed; None where it reads nothing.
        configs: Megatron-Core's configuration of each model chunk of this rank.
        lock: of the run's directory; nothing is written once it is lost.
    """

    def __init__(
        self,
        recipe: Recipe,
        progress: Progress,
        counters: FeedCounters | None,
        configs: Sequence[Any],
        lock: LockView | None = None,
    ) -> None:
        self.recipe, self.progress, self._lock = recipe, progress, lock
        self.sources = [source_name(source) for source in recipe.data.train]
        self._tasks = task_mean(recipe)
        self._counters = counters or FeedCounters()
        self._waited = self._counters.wait_seconds
        self._costs = not costless(recipe.model)
        self._first_step = progress.step + 1
        self._timing = StepTiming(recipe.logging, configs)
        self._writer: Any = None
        self._file: Any = None
        self._outlets: list[Outlet] = []
        directory = Path(recipe.output_dir)
        if is_logging_rank():
            directory.mkdir(parents=True, exist_ok=True)
            drop_steps_after(directory / METRICS_FILE, progress.step)
            self._file = open(directory / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 - until close
            self._outlets = open_outlets(recipe, progress.step)
        if is_tensorboard_rank() and recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - only where it is wanted

            # After a restart from a checkpoint, points of lost steps disappear.
            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=progress.step + 1)
        self._reset()

    def _reset(self) -> None:
        self._losses = torch.zeros(len(self.sources), 2, dtype=torch.float64)
        self._experts: list[ExpertReport] = []
        # Of this replica: what _counts lists.
        self._counts = torch.zeros(9, dtype=torch.float64)
        self._steps = 0
        self._seconds = 0.0

    def begin(self) -> None:
        """Start the clock of a step, before its data is fetched."""
        self._start = time.perf_counter()
        self._timing.begin(self.progress.step + 1)

    def fetched(self) -> None:
        """The data of the step is there."""
        self._timing.fetched()

    def step(self, result: StepResult, batches: Sequence[Batch], rates: Mapping[str, float]) -> None:
        """Take in the step since :meth:`begin`; reports where the window ends (a collective then)."""
        self._timing.end()
        self._seconds += time.perf_counter() - self._start
        if result.skipped is None:
            self._losses += result.source_losses
        if result.experts is not None:
            self._experts.append(result.experts)
        self._steps += 1
        for batch in batches:
            self._counts += _counts(batch)
        step = self.progress.step + 1
        self.progress.step = step
        self.progress.packs += self.recipe.training.global_batch_size
        self.progress.supervised_tokens += result.supervised_tokens
        ends = step % self.recipe.logging.log_interval == 0 or step == self.recipe.training.steps
        if ends or step == self._first_step:
            self.report(result.grad_norm, rates)

    def flush(self) -> None:
        """Bring the run's counters up to date, before a checkpoint; a collective."""
        if self._steps:
            self._collect()

    def _collect(self) -> dict[str, Figure]:
        """Sum the window over the job, add it to the progress and start a new one."""
        device = local_device()
        counts = self._counts.to(device)
        dist.all_reduce(counts, group=mpu.get_data_parallel_group())
        slowest = torch.tensor([self._counters.wait_seconds - self._waited, self._seconds], dtype=torch.float64).to(
            device
        )
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        tokens, squares, padding, padding_squares, images, moved, *seen = counts.tolist()
        vision, pictures = self.recipe.model.vision, Pictures(*seen)
        # Pictures that keep sizes of their own are so many views as they have times the patches of the usual one.
        views = pictures.patches / vision.patches_per_image if vision.packed else pictures.count
        waited, seconds = slowest.tolist()
        supervised = float(self._losses[:, 1].sum())
        flops = StepFlops(0, 0, 0)
        if self._costs:
            flops = count_step(
                self.recipe,
                tokens=int(tokens),
                squared_lengths=int(squares),
                positions=int(tokens + padding),
                squared_positions=int(squares + padding_squares),
                images=pictures if vision.packed else int(views),
            )
        # Without a label there is no loss, and 0 were a good one.
        values: dict[str, Figure] = {"loss": mean_loss(self._losses, self._tasks)} if supervised else {}
        values |= {
            "useful_tokens_per_second": supervised / seconds,
            "tokens_per_second": tokens / seconds,
            "images_per_second": images / seconds,
            "views_per_second": views / seconds,
            "padding_fraction": padding / max(tokens + padding, 1.0),
            "data_wait_fraction": waited / seconds,
            "data_wait_seconds": waited / self._steps,
            "step_seconds": seconds / self._steps,
        }
        if self.recipe.parallel.vision_balance == "job":
            values["vision_moved_fraction"] = moved / max(pictures.count, 1.0)
        for name, (loss, count) in zip(self.sources, self._losses.tolist(), strict=True):
            if count:
                values[f"loss/{name}"] = loss / count
        if self._experts:
            values |= ExpertReport.joined(self._experts).figures()
        peak = peak_flops(self.recipe.training.precision)
        if peak is not None and self._costs:
            at_peak = seconds * peak * dist.get_world_size()
            values["mfu"] = flops.useful / at_peak
            values["mfu_conventional"] = flops.conventional / at_peak
            values["hfu"] = flops.hardware / at_peak
        # MFU is of the bf16 peak, in FP8 too, so that it can be compared; this is of the FP8 peak.
        fast = peak_flops("fp8") if self.recipe.engine.fp8 is not None else None
        if fast is not None and self._costs:
            values["mfu_fp8_peak"] = flops.useful / seconds / (fast * dist.get_world_size())
        progress = self.progress
        progress.tokens += int(tokens)
        progress.padding_tokens += int(padding)
        progress.images += int(images)
        progress.seconds += seconds
        self._waited = self._counters.wait_seconds
        self._reset()
        self._collect_skipped(device)
        return values

    def _collect_skipped(self, device: torch.device) -> None:
        """Sum the samples that were left out over all readers.

        Raises:
            RuntimeError: they are more than the recipe allows; on all ranks.
        """
        progress, own = self.progress, self._counters
        totals = torch.tensor([own.samples, own.skipped.total()], dtype=torch.int64, device=device)
        dist.all_reduce(totals)
        progress.samples, skipped = (int(total) for total in totals.tolist())
        if skipped != sum(progress.skipped_samples.values()):
            # Causes are words and differ between ranks; they travel only where something is new.
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, dict(own.skipped))
            causes = sum((Counter(part) for part in parts), Counter[str]())
            for cause, count in causes.items():
                if count > progress.skipped_samples.get(cause, 0):
                    logger.info("left out %d of %d samples so far: %s", count, progress.samples, cause)
            progress.skipped_samples = dict(causes.most_common())
        data = self.recipe.data
        if progress.samples >= data.max_bad_after_samples and skipped > data.max_bad_fraction * progress.samples:
            listed = ", ".join(f"{count} {cause}" for cause, count in progress.skipped_samples.items())
            raise RuntimeError(
                f"{skipped} of {progress.samples} samples read cannot be used ({listed}), more than "
                f"data.max_bad_fraction ({data.max_bad_fraction:g}); repair those that "
                f"{Path(self.recipe.output_dir) / 'quarantine-*.jsonl'} lists, or raise data.max_bad_fraction"
            )

    def report(self, grad_norm: float | None, rates: Mapping[str, float]) -> None:
        """Write the window's figures; a collective."""
        values = self._collect()
        if grad_norm is not None:
            values["grad_norm"] = grad_norm
        values |= {f"lr/{name}": rate for name, rate in rates.items()}
        values["skipped_steps"] = float(self.progress.skipped_steps)
        if self.progress.empty_steps:
            values["empty_steps"] = float(self.progress.empty_steps)
        values |= skipped_values(self.progress)
        values |= self._timing.collect()
        if is_logging_rank():
            logger.info("%s", progress_line(values, self.progress.step, self.recipe.training.steps))
        self.write(values)

    def write(self, values: Mapping[str, Figure]) -> None:
        """Write figures of the current step, the same on all ranks, to ``metrics.jsonl`` and loggers.

        A figure that is not finite is ``null`` in the file: JSON has no other word for it. Words and lists of numbers
        are for the file alone.
        """
        if self._lock is not None and self._lock.lost():
            return
        if self._outlets:
            tagged = {_tag(name): float(value) for name, value in values.items() if isinstance(value, (int, float))}
            for outlet in self._outlets:
                outlet.figures(tagged, self.progress.step)
        with self._tolerated():
            if self._file is not None:
                known = {name: value if _is_finite(value) else None for name, value in values.items()}
                line = json.dumps({"step": self.progress.step, **known}, allow_nan=False)
                print(line, file=self._file, flush=True)
            if self._writer is not None:
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self._writer.add_scalar(_tag(name), value, self.progress.step)
                self._writer.flush()

    def image(self, name: str, pixels_HWC: Tensor) -> None:
        """Put a picture, [H, W, 3] uint8, on TensorBoard (the last rank) and other loggers (the first one)."""
        if self._lock is not None and self._lock.lost():
            return
        for outlet in self._outlets:
            outlet.picture(name, pixels_HWC.numpy(), self.progress.step)
        if self._writer is not None:
            with self._tolerated():
                self._writer.add_image(name, pixels_HWC, self.progress.step, dataformats="HWC")
                self._writer.flush()

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Let a full disk cost figures, not the run: this rank alone writes, and the others would wait for it."""
        try:
            yield
        except OSError as error:
            logger.warning("figures of step %d cannot be written: %s", self.progress.step, error)

    def close(self) -> None:
        """Close the files."""
        self._timing.cancel()
        with self._tolerated():
            if self._writer is not None:
                self._writer.close()
            if self._file is not None:
                self._file.close()
        complete = self.progress.step >= self.recipe.training.steps
        for outlet in self._outlets:
            outlet.close(None if sys.exc_info()[0] is not None else complete)


# TensorBoard's groups.
_TAGS = {
    "loss": "loss/total",
    "validation_loss": "validation/total",
    "grad_norm": "optimizer/grad_norm",
    "useful_tokens_per_second": "speed/useful_tokens_per_second",
    "tokens_per_second": "speed/tokens_per_second",
    "images_per_second": "speed/images_per_second",
    "views_per_second": "speed/views_per_second",
    "step_seconds": "speed/step_seconds",
    "data_wait_fraction": "speed/data_wait_fraction",
    "padding_fraction": "data/padding_fraction",
    "mfu": "speed/mfu",
    "mfu_conventional": "speed/mfu_conventional",
    "hfu": "speed/hfu",
    "memory_gib": "memory/peak_gib",
    "memory_rank": "memory/peak_rank",
    "timed_step_seconds": "time/step_seconds",
    "data_seconds": "time/data_seconds",
    "schedule_seconds": "time/schedule_seconds",
    "update_seconds": "time/update_seconds",
    "data_wait_seconds": "time/data_wait_seconds",
    "bubble_fraction": "pipeline/bubble_fraction",
    "bubble_fraction_largest": "pipeline/bubble_fraction_largest",
    "communication_fraction": "communication/fraction",
    "vision_encode_seconds": "vision/encode_seconds",
    "vision_backward_seconds": "vision/backward_seconds",
    "vision_imbalance": "vision/imbalance",
    "vision_job_imbalance": "vision/job_imbalance",
    "vision_moved_fraction": "vision/moved_fraction",
    "vision_fraction": "vision/fraction",
    "vision_lost_fraction": "vision/lost_fraction",
    "slowest_rank": "slowest_rank/rank",
    "slowest_rank_seconds": "slowest_rank/compute_seconds",
    "slowest_rank_ratio": "slowest_rank/ratio_to_its_stage",
    "mfu_fp8_peak": "speed/mfu_fp8_peak",
    "checkpoint_stalled_seconds": "speed/checkpoint_stalled_seconds",
    "skipped_steps": "optimizer/skipped_steps",
    "empty_steps": "optimizer/empty_steps",
    "skipped_samples": "data/skipped/total",
}

_GROUPS = {
    "stage_seconds": "pipeline/stage_seconds",
    "stage_forward_seconds": "pipeline/stage_forward_seconds",
    "stage_backward_seconds": "pipeline/stage_backward_seconds",
    "bubble_fraction": "pipeline/bubble_fraction",
    "communication_fraction": "communication/fraction",
}


def _tag(name: str) -> str:
    """Return TensorBoard's tag of a figure; ``stage_seconds/0`` is a curve of stage 0."""
    group, _, member = name.partition("/")
    if name in _TAGS or group not in _GROUPS:
        return _TAGS.get(name, name)
    return f"{_GROUPS[group]}_{member}"


def skipped_values(progress: Progress) -> dict[str, float]:
    """Return the samples that were left out, over all readers and restarts: in all, and by cause."""
    causes = {
        f"data/skipped/{re.sub(r'[^A-Za-z0-9]+', '-', c).strip('-')}": n for c, n in progress.skipped_samples.items()
    }
    return {"skipped_samples": float(sum(causes.values())), **{name: float(count) for name, count in causes.items()}}


def _is_finite(value: Figure) -> bool:
    return not isinstance(value, (int, float)) or math.isfinite(value)


def _counts(batch: Batch) -> Tensor:
    """[9] fp64: tokens, squared lengths of segments, padding, squared lengths of its segments, images, moved, seen.

    *Moved* are views that another replica encodes. The last three are those of :class:`Pictures`; of views of one size
    the first of them alone.
    """
    lengths = torch.tensor(segment_lengths(batch.packed_seq_params), dtype=torch.float64)
    real = batch.segment_sources.cpu() >= 0
    tokens, padding = lengths[real], lengths[~real]
    sums = [tokens.sum(), tokens.square().sum(), padding.sum(), padding.square().sum()]
    seen = Pictures(batch.num_views, 0, 0)
    if batch.image_grid is not None:
        seen = Pictures.shown(batch.image_grid.tolist())
    moved = 0 if batch.shared is None else batch.shared.moved
    rest = [batch.num_images, moved, seen.count, seen.patches, seen.squared]
    return torch.cat([torch.stack(sums), torch.tensor(rest, dtype=torch.float64)])


def progress_line(values: Mapping[str, Any], step: int, steps: int) -> str:
    """Return the console's line for one window."""
    remaining = (steps - step) * values["step_seconds"]
    rates = [value for name, value in values.items() if name.startswith("lr/")]
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {values['loss']:.4f}" if "loss" in values else "no loss",
        f"lr {max(rates, default=0.0):.2e}",
        f"grad norm {values['grad_norm']:.3f}" if "grad_norm" in values else "no gradient",
        f"{values['useful_tokens_per_second']:,.0f} useful tok/s",
        f"{values['tokens_per_second']:,.0f} tok/s",
        f"padding {values['padding_fraction']:.1%}",
        f"data wait {values['data_wait_fraction']:.0%}",
        f"{values['step_seconds']:.2f} s/step",
    ]
    if "bubble_fraction" in values:
        parts.append(f"bubble {values['bubble_fraction']:.0%}")
    if "vision_fraction" in values:
        parts.append(f"vision {values['vision_fraction']:.0%} (lost {values['vision_lost_fraction']:.0%})")
    if "communication_fraction" in values:
        parts.append(f"communication {values['communication_fraction']:.0%}")
    if values.get("slowest_rank_ratio", 1.0) >= STRAGGLER:
        parts.append(
            f"slowest rank {values['slowest_rank']:.0f} on {values['slowest_host']}, "
            f"{values['slowest_rank_ratio']:.2f} x its stage"
        )
    if values.get("skipped_samples"):
        parts.append(f"skipped samples {values['skipped_samples']:,.0f}")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%} (as usually counted {values['mfu_conventional']:.1%})")
    parts.append(f"ETA {timedelta(seconds=round(remaining))}")
    return " | ".join(parts)
