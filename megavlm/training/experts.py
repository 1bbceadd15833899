"""What a training step does for layers with experts: the scale of their losses, what is told of loads, their biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.device_batch import Batch
from megavlm.layers.experts import TALLY, PackRouter, routers_of
from megavlm.parallel import pipeline
from megavlm.parallel.state import data_group, is_last_stage


@dataclass(frozen=True)
class ExpertReport:
    """What the routers of a step have done; equal on all ranks."""

    layers: tuple[int, ...]
    """[L] numbers, from 0, of the layers that have experts."""
    loads: Tensor
    """[L, X] int64: real tokens of the global batch that chose each expert."""
    losses: Tensor
    """[L, 2] fp64: balance and z loss, each the mean over the packs, without their coefficients."""
    dropped: Tensor
    """[L] int64: choices that found no place."""

    @classmethod
    def joined(cls, reports: Sequence[ExpertReport]) -> ExpertReport:
        """Return the report of several steps: loads and choices dropped of all of them, the mean of their losses."""
        return cls(
            reports[0].layers,
            torch.stack([one.loads for one in reports]).sum(0),
            torch.stack([one.losses for one in reports]).mean(0),
            torch.stack([one.dropped for one in reports]).sum(0),
        )

    def figures(self) -> dict[str, float | str | list[int]]:
        """Return what metrics say: by layer, and ``experts/balance_loss`` and ``experts/z_loss``, the layers' means."""
        balance, z = self.losses.mean(0).tolist()
        found: dict[str, float | str | list[int]] = {"experts/balance_loss": balance, "experts/z_loss": z}
        for row, layer in enumerate(self.layers):
            loads, total = self.loads[row], int(self.loads[row].sum())
            found[f"experts/balance_loss/{layer}"], found[f"experts/z_loss/{layer}"] = self.losses[row].tolist()
            found[f"experts/loads/{layer}"] = loads.tolist()
            if total:
                # Of an equal share: 1 and 1 where all experts have as many.
                share = total / len(loads)
                found[f"experts/largest_load/{layer}"] = float(loads.max()) / share
                found[f"experts/smallest_load/{layer}"] = float(loads.min()) / share
                found[f"experts/dropped_fraction/{layer}"] = float(self.dropped[row]) / total
        return found


def _routers(chunks: Sequence[Any]) -> list[tuple[int, PackRouter]]:
    return [one for chunk in chunks for one in routers_of(chunk)]


def scale_losses(chunks: Sequence[Any], batches: Sequence[Batch], config: Any) -> None:
    """Tell the routers what makes their losses' gradients the mean over the packs of the global batch.

    The schedule divides what micro-batches sum up by the supervised tokens of the global batch. A collective over the
    job, for models with experts alone.

    Args:
        chunks: this rank's model chunks.
        batches: this replica's share of the global batch.
        config: Megatron-Core's configuration of the first chunk.
    """
    if config.num_moe_experts is None:
        return
    tokens = torch.zeros(1, dtype=torch.float32, device=batches[0].tokens.device)
    if is_last_stage():  # which has the labels
        for batch in batches:
            assert batch.labels is not None
            tokens += (batch.labels != IGNORE_INDEX).sum()
        dist.all_reduce(tokens, group=data_group())
    tokens = pipeline.from_last_stage(tokens)
    scale = tokens[0] / (len(batches) * mpu.get_data_parallel_world_size())
    for _, router in _routers(chunks):
        router.gradient_scale = scale


def take_report(chunks: Sequence[Any], packs: int, config: Any) -> ExpertReport | None:
    """Return what the routers counted since they were last asked; None for a model without experts.

    A collective over the job.

    Args:
        chunks: this rank's model chunks.
        packs: of this replica.
        config: Megatron-Core's configuration of the first chunk.
    """
    experts = config.num_moe_experts
    if experts is None:
        return None
    freq = config.moe_layer_freq
    layers = tuple(i for i in range(config.num_layers) if (freq[i] if isinstance(freq, list) else i % freq == 0))
    device = next(chunks[0].parameters()).device
    table = torch.zeros(len(layers), experts + len(TALLY), dtype=torch.float64, device=device)
    for layer, router in _routers(chunks):
        table[layers.index(layer)] = router.take_tally()
    dist.all_reduce(table)  # each stage has its own rows, each tensor- and data-parallel rank its own tokens
    table = table.cpu()
    losses = table[:, experts : experts + 2] / (packs * mpu.get_data_parallel_world_size())
    return ExpertReport(layers, table[:, :experts].long(), losses, table[:, -1].long())


def move_biases(chunks: Sequence[Any], report: ExpertReport | None) -> None:
    """Move the experts' biases towards equal loads by ``moe_router_bias_update_rate`` (arXiv 2408.15664).

    Those of a frozen router stay. No collective: all ranks know the loads.
    """
    if report is None:
        return
    for layer, router in _routers(chunks):
        if router.expert_bias is None or not router.weight.requires_grad:
            continue
        loads = report.loads[report.layers.index(layer)].float()
        step = torch.sign(loads.mean() - loads) * router.config.moe_router_bias_update_rate
        router.expert_bias += step.to(router.expert_bias.device)
