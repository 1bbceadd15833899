"""Tower and connector apart from the pipeline: all ranks encode, the pipeline runs, all ranks go backward.

With ``parallel.vision_placement: all_ranks`` every rank of the job holds tower and connector whole. A step is then

1. each rank encodes its share of the step's pictures of its replica, and the features go to the first stage;
2. the language model's pipeline runs on Megatron-Core's schedule, with the features as leaves;
3. their gradients go back to who made them, each rank goes backward through its share, and gradients of tower and
   connector are summed over the whole job, once.

The module has a DistributedDataParallel of its own over all ranks, without overlap: its gradients come at once, at the
end. Where a replica has no picture in a step, nothing is exchanged; the sum over the job is made in every step.

Shape legend: N views of a micro-batch, Q features of a view, K rows of features (view after view), E width of the
language model, times 1 + R with a deepstack of R levels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.config.schema import Recipe
from megavlm.data.device_batch import Batch
from megavlm.models.front import encode
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.device import local_device
from megavlm.parallel.exchange import exchange
from megavlm.parallel.faults import fault
from megavlm.parallel.replicas import group_of_one
from megavlm.parallel.stopwatch import ENCODE, EXCHANGE, HOMEWARD, RETURN


class VisionModule(MegatronModule):
    """Tower and connector as one module, with the names that their parameters have in the whole model."""

    def __init__(self, chunk: VisionLanguageModel) -> None:
        super().__init__(config=chunk.config)
        self.vision, self.connector = chunk.vision, chunk.connector


def groups() -> ProcessGroupCollection:
    """Return the process groups of what every rank of the job holds whole: all of them are its replicas."""
    alone, world = group_of_one(), dist.group.WORLD
    return ProcessGroupCollection(
        tp=alone, pp=alone, mp=alone, cp=alone, ep=alone, expt_dp=alone, intra_expt_dp=alone, tp_ep_pp=alone,
        dp=world, dp_cp=world, intra_dp_cp=world,
        intra_dist_opt=mpu.get_intra_distributed_optimizer_instance_group(),
    )  # fmt: skip


def wrap(chunk: VisionLanguageModel, recipe: Recipe) -> DistributedDataParallel:
    """Return tower and connector of a bare chunk in Megatron-Core's DistributedDataParallel over the whole job."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=recipe.parallel.use_distributed_optimizer
    )
    return DistributedDataParallel(chunk.config, config, VisionModule(chunk), pg_collection=groups())


@contextlib.contextmanager
def taken_off(chunk: VisionLanguageModel) -> Iterator[None]:
    """Hide tower and connector of a bare chunk from what goes over its parameters inside the block.

    Between steps they are the chunk's, so that it is saved, loaded, evaluated and asked for features as anywhere.
    """
    kept = chunk.vision, chunk.connector
    chunk.vision = chunk.connector = None
    try:
        yield
    finally:
        chunk.vision, chunk.connector = kept


@dataclass(frozen=True)
class _SharePart:
    """Some of this rank's pictures, that go through the tower at once."""

    images: Tensor
    grid: Tensor | None
    rows: int
    """Features of them."""


@dataclass
class _Encoded:
    """What is kept from the first phase to the last."""

    pieces: list[_SharePart]
    """This rank's pictures."""
    features: list[Tensor]
    """What they became, [k, E] each, with its graph; with ``parallel.vision_recompute`` nothing."""
    leaves: list[Tensor | None]
    """Of each micro-batch, on the first stage; [Q, N, E]."""
    owners: list[list[int]]
    """[M][N] who encoded each picture."""
    rows: list[list[int]]
    """[M][N] features of each."""


class VisionPhases:
    """The first and the last phase of a step, on this rank.

    Args:
        wrapped: :func:`wrap` of the chunk.
        chunk: this rank's first bare chunk.
        recipe: the run.
    """

    def __init__(self, wrapped: DistributedDataParallel, chunk: VisionLanguageModel, recipe: Recipe) -> None:
        self.wrapped, self.chunk, self.model = wrapped, chunk, recipe.model
        self._trains_vision = not recipe.modules.vision.freeze
        self.trains = self._trains_vision or not recipe.modules.connector.freeze
        self._dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
        self._again = recipe.parallel.vision_recompute
        self._width = recipe.model.language.hidden_size * (1 + recipe.model.vision.deepstack)
        self._group = mpu.get_model_parallel_group()
        self._tensor = mpu.get_tensor_model_parallel_world_size()
        self._rank, self._ranks = self._group.rank(), self._group.size()
        place = mpu.get_pipeline_model_parallel_rank() * self._tensor + mpu.get_tensor_model_parallel_rank()
        assert self._rank == place, "ranks of the model-parallel group do not lie stage by stage"
        self._encoded: _Encoded | None = None

    def encode(self, batches: Sequence[Batch], *, backward: bool) -> list[Batch]:
        """Encode the pictures of a step; return its micro-batches with features in place of pixels; a collective.

        Args:
            batches: this rank's; with ``image_owners``.
            backward: gradients will come (:meth:`backward`).
        """
        owners = [_owners(batch) for batch in batches]
        rows = [self._rows(batch) for batch in batches]
        self._encoded = None
        if not any(owners):
            return [replace(batch, images=None) for batch in batches]
        keeps = backward and self.trains and not self._again
        with self._timed(ENCODE), torch.set_grad_enabled(keeps):
            fault("vision.encode")
            pieces = self._own_pictures(batches, owners, rows)
            features = [self._encode(piece) for piece in pieces]
        with self._timed(EXCHANGE):
            leaves = self._hand_out([one.detach() for one in features], owners, rows)
        if backward and self.trains:
            leaves = [None if leaf is None else leaf.requires_grad_() for leaf in leaves]
            self._encoded = _Encoded(pieces, features if keeps else [], leaves, owners, rows)
        pairs = zip(batches, leaves, strict=True)
        return [replace(batch, images=None, view_features=leaf) for batch, leaf in pairs]

    def backward(self) -> None:
        """Go backward through this rank's share, and sum gradients over the job; a collective.

        To be called behind the pipeline's last backward pass, in every step.
        """
        encoded, self._encoded = self._encoded, None
        with self._timed(HOMEWARD):
            if encoded is not None:
                with self._timed(EXCHANGE):
                    grad_KE = self._hand_back(encoded)
                with self._timed(RETURN):
                    fault("vision.backward")
                    self._go_backward(encoded, grad_KE)
        self.wrapped.finish_grad_sync()

    def _rows(self, batch: Batch) -> list[int]:
        """Return the features of each picture."""
        connector = self.model.connector
        if batch.image_grid is None:
            return [self.model.tokens_per_view] * batch.num_views
        return [frames * connector.tokens_of((high, wide)) for frames, high, wide in batch.image_grid.tolist()]

    def _own_pictures(
        self, batches: Sequence[Batch], owners: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
    ) -> list[_SharePart]:
        """Return this rank's pictures: all at once, or, to be encoded twice, in pieces of about a micro-batch's."""
        found: list[_SharePart] = []
        for batch, own, sizes in zip(batches, owners, rows, strict=True):
            mine = torch.tensor([owner == self._rank for owner in own], dtype=torch.bool)
            if mine.any() and batch.images is not None:
                grid = None if batch.image_grid is None else batch.image_grid[mine]
                count = sum(size for size, owner in zip(sizes, own, strict=True) if owner == self._rank)
                found.append(_SharePart(batch.images, grid, count))
        most = sum(map(sum, rows)) / len(rows) if self._again else math.inf
        groups: list[list[_SharePart]] = []
        for one in found:
            if groups and sum(other.rows for other in groups[-1]) + one.rows <= most:
                groups[-1].append(one)
            else:
                groups.append([one])
        return [_joined(group) for group in groups]

    def _encode(self, pictures: _SharePart) -> Tensor:
        """Return [k, E] features of pictures."""
        vision, connector = self.chunk.vision, self.chunk.connector
        features_QNE = encode(
            vision, connector, pictures.images, pictures.grid, trains_vision=self._trains_vision
        )  # fmt: skip
        return features_QNE.transpose(0, 1).flatten(0, 1).to(self._dtype)

    def _go_backward(self, encoded: _Encoded, grad_KE: Tensor) -> None:
        """Go backward through this rank's pictures, whose features have these gradients."""
        grads = grad_KE.split([piece.rows for piece in encoded.pieces])
        for number, (piece, grad) in enumerate(zip(encoded.pieces, grads, strict=True)):
            features = self._encode(piece) if self._again else encoded.features[number]
            features.backward(grad)

    def _count(self, owners: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> list[int]:
        """Return the features that each rank makes."""
        counts = [0] * self._ranks
        for own, sizes in zip(owners, rows, strict=True):
            for owner, size in zip(own, sizes, strict=True):
                counts[owner] += size
        return counts

    def _hand_out(
        self, features: Sequence[Tensor], owners: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
    ) -> list[Tensor | None]:
        """Hand features to the first stage; return there those of each micro-batch, [Q, N, E]."""
        counts, first = self._count(owners, rows), self._rank < self._tensor
        own_KE = torch.cat(list(features)) if features else self._none()
        assert own_KE.size(0) == counts[self._rank], (own_KE.shape, counts)
        sent = [counts[self._rank] if rank < self._tensor else 0 for rank in range(self._ranks)]
        everything = torch.cat([own_KE] * self._tensor) if self._tensor > 1 else own_KE
        got_KE = exchange(everything, sent, counts if first else [0] * self._ranks, self._group)
        if not first:
            return [None] * len(owners)
        at = [0, *accumulate(counts)][:-1]
        leaves: list[Tensor | None] = []
        for own, sizes in zip(owners, rows, strict=True):
            pieces = []
            for owner, size in zip(own, sizes, strict=True):
                pieces.append(got_KE[at[owner] : at[owner] + size])
                at[owner] += size
            leaves.append(self._shaped(pieces) if pieces else None)
        return leaves

    def _shaped(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return pictures' features [K, E] as the model has them: [Q, N, E], or [K, 1, E] of any size."""
        if self.model.vision.packed:
            return torch.cat(list(pieces)).unsqueeze(1)
        return torch.stack(list(pieces), dim=1)

    def _hand_back(self, encoded: _Encoded) -> Tensor:
        """Hand gradients to who made the features; return those of this rank's, [K, E].

        The tensor-parallel ranks of the first stage have the same gradients, whole; each serves those of its index.
        """
        counts = self._count(encoded.owners, encoded.rows)
        serves = [self._rank < self._tensor and rank % self._tensor == self._rank for rank in range(self._ranks)]
        pieces: list[list[Tensor]] = [[] for _ in range(self._ranks)]
        for leaf, own, sizes in zip(encoded.leaves, encoded.owners, encoded.rows, strict=True):
            if leaf is None:
                continue
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            split = grad.transpose(0, 1).flatten(0, 1).split(sizes)
            for piece, owner in zip(split, own, strict=True):
                if serves[owner]:
                    pieces[owner].append(piece)
            leaf.grad = None
        given = [piece for of_rank in pieces for piece in of_rank]
        sent = [count if served else 0 for count, served in zip(counts, serves, strict=True)]
        source = self._rank % self._tensor
        received = [counts[self._rank] if rank == source else 0 for rank in range(self._ranks)]
        return exchange(torch.cat(given) if given else self._none(), sent, received, self._group)

    def _none(self) -> Tensor:
        return torch.empty(0, self._width, dtype=self._dtype, device=local_device())

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        timers = self.chunk.config.timers
        if timers is None:
            yield
            return
        timers(name).start()
        yield
        timers(name).stop()


def _joined(pictures: Sequence[_SharePart]) -> _SharePart:
    grids = [one.grid for one in pictures if one.grid is not None]
    images = torch.cat([one.images for one in pictures])
    return _SharePart(images, torch.cat(grids) if grids else None, sum(one.rows for one in pictures))


def _owners(batch: Batch) -> list[int]:
    assert batch.image_owners is not None, "the feed did not say who encodes which picture"
    return list(batch.image_owners)
