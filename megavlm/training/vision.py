"""Tower and connector apart from the pipeline: all ranks encode, the pipeline runs, all ranks go backward.

With ``parallel.vision_placement: all_ranks`` every rank of the job holds tower and connector whole (or each stage
does, a shard on each tensor-parallel rank: ``parallel.vision_shards``). A step is then

1. each rank encodes its share of the step's pictures of its replica (or of the whole job's:
   ``parallel.vision_balance``), and the features go to the first stage;
2. the language model's pipeline runs on Megatron-Core's schedule, with the features as leaves;
3. their gradients go back to who made them, each rank goes backward through its share, and gradients of tower and
   connector are summed over the whole job, once.

Where both are frozen, the next step's pictures may be encoded while a step's pipeline runs: ``parallel.vision_ahead``.

The module has a DistributedDataParallel of its own over all ranks, without overlap: its gradients come at once, at the
end. Where nobody has a picture in a step, nothing is exchanged; the sum over the job is made in every step.

Shape legend: N views of a micro-batch, Q features of a view, K rows of features (view after view), E width of the
language model, times 1 + R with a deepstack of R levels.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.data.device_batch import Batch, Grid, SharedPictures
from megavlm.models.front import encode
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.device import local_device
from megavlm.parallel.encoders import encoders_of
from megavlm.parallel.faults import fault
from megavlm.parallel.megatron_versions import sum_marked_gradients
from megavlm.parallel.replicas import group_of_column, group_of_one, sum_gradients
from megavlm.parallel.side_work import SideWork
from megavlm.parallel.stopwatch import ENCODE, EXCHANGE, HOMEWARD, RETURN
from megavlm.training.handover import Handover


class VisionModule(MegatronModule):
    """Tower and connector as one module, with the names that their parameters have in the whole model."""

    def __init__(self, chunk: VisionLanguageModel) -> None:
        super().__init__(config=chunk.config)
        self.vision, self.connector = chunk.vision, chunk.connector


def groups(parallel: ParallelConfig) -> ProcessGroupCollection:
    """Return the process groups of what lies on every rank of the job; a collective over it.

    All of them are its replicas; of shards, those with the same tensor-parallel index.
    """
    alone, same, tensor = group_of_one(), dist.group.WORLD, group_of_one()
    if shards(parallel):
        same, tensor = group_of_column(), mpu.get_tensor_model_parallel_group()
    return ProcessGroupCollection(
        tp=tensor, pp=alone, mp=alone, cp=alone, ep=alone, expt_dp=alone, intra_expt_dp=alone, tp_ep_pp=alone,
        dp=same, dp_cp=same, intra_dp_cp=same,
        intra_dist_opt=mpu.get_intra_distributed_optimizer_instance_group(),
    )  # fmt: skip


def shards(parallel: ParallelConfig) -> bool:
    """Whether tower and connector are cut over the tensor-parallel ranks of each stage."""
    return parallel.vision_shards == "tensor" and parallel.tensor_model_parallel_size > 1


def wrap(chunk: VisionLanguageModel, recipe: Recipe) -> DistributedDataParallel:
    """Return tower and connector of a bare chunk in Megatron-Core's DistributedDataParallel over the whole job."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=recipe.parallel.use_distributed_optimizer
    )
    return DistributedDataParallel(chunk.config, config, VisionModule(chunk), pg_collection=groups(recipe.parallel))


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
    handover: Handover


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
        self._encoders, self._cut = encoders_of(recipe.parallel), shards(recipe.parallel)
        self._replicas = chunk.replicas if self._cut else frozenset[str]()
        self._encoded: _Encoded | None = None
        self.ahead = recipe.parallel.vision_ahead
        """Whether the next step's pictures may be encoded during a step (:meth:`encode_ahead`)."""
        self._early: deque[tuple[Sequence[Batch], SideWork]] = deque()

    def encode_ahead(self, batches: Sequence[Batch]) -> None:
        """Begin to encode the pictures of the step after the one that is about to run, in a thread.

        Done when that step's :meth:`backward` returns; :meth:`encode` of the same ``batches`` then finds the features.
        """
        assert self.ahead and not self.trains and not self._cut
        handover = self._handover(batches)

        def work() -> list[Tensor]:
            fault("vision.encode")
            return [self._encode(piece) for piece in self._own_pictures(batches, handover)]

        if not handover.empty:
            self._early.append((batches, SideWork(work)))

    def encode(self, batches: Sequence[Batch], *, backward: bool) -> list[Batch]:
        """Encode the pictures of a step; return its micro-batches with features in place of pixels; a collective.

        Args:
            batches: this rank's, as :func:`megavlm.data.device_batch.share_packs` spreads their pictures.
            backward: gradients will come (:meth:`backward`).
        """
        self._encoded = None
        handover = self._handover(batches)
        if handover.empty:
            return [replace(batch, images=None) for batch in batches]
        keeps = backward and self.trains and not self._again
        with self._timed(ENCODE), torch.set_grad_enabled(keeps):
            pieces, features = self._share(batches, handover)
        with self._timed(EXCHANGE):
            found = handover.out(torch.cat([one.detach() for one in features]) if features else self._none())
            leaves = [None if one is None else self._shaped(one) for one in found]
        if backward and self.trains:
            leaves = [None if leaf is None else leaf.requires_grad_() for leaf in leaves]
            self._encoded = _Encoded(pieces, features if keeps else [], leaves, handover)
        pairs = zip(batches, leaves, strict=True)
        return [replace(batch, images=None, view_features=leaf) for batch, leaf in pairs]

    def backward(self) -> None:
        """Go backward through this rank's share, and sum gradients over the job; a collective.

        To be called behind the pipeline's last backward pass, in every step.
        """
        encoded, self._encoded = self._encoded, None
        with self._timed(HOMEWARD):
            for _, work in self._early:
                work.result()  # nobody evaluates, saves or ends while the tower runs
            if encoded is not None:
                with self._timed(EXCHANGE):
                    grad_KE = encoded.handover.home([self._taken(leaf) for leaf in encoded.leaves])
                with self._timed(RETURN):
                    fault("vision.backward")
                    self._go_backward(encoded, grad_KE)
        self.wrapped.finish_grad_sync()
        if self._cut:  # what the ranks of a stage hold alike, and each has a part of the gradient of
            sum_marked_gradients([self.wrapped])
            sum_gradients([self.wrapped])

    def _share(self, batches: Sequence[Batch], handover: Handover) -> tuple[list[_SharePart], list[Tensor]]:
        """Return this rank's pictures of a step, and what they become."""
        if self._early and self._early[0][0] is batches:
            return [], self._early.popleft()[1].result()
        fault("vision.encode")
        pieces = self._own_pictures(batches, handover)
        return pieces, [self._encode(piece) for piece in pieces]

    def _handover(self, batches: Sequence[Batch]) -> Handover:
        """Return the ways of a step's features."""
        pictures = [batch.shared for batch in batches if batch.shared is not None]
        assert len(pictures) == len(batches), "the feed did not say who encodes which picture"
        return Handover(self._encoders, pictures, self._rows, self._none())

    def _rows(self, grid: Grid) -> int:
        """Return the features of a picture."""
        if grid is None:
            return self.model.tokens_per_view
        if self.model.language.cross_layers:
            return int(self.model.vision.rows_of(grid))
        frames, high, wide = grid
        return int(frames * self.model.connector.tokens_of((high, wide)))

    def _own_pictures(self, batches: Sequence[Batch], handover: Handover) -> list[_SharePart]:
        """Return this rank's pictures: all at once, or, to be encoded twice, in pieces of about a micro-batch's."""
        rows = [0] * len(batches)
        for number, _, count in handover.mine:
            rows[number] += count
        found: list[_SharePart] = []
        for batch, count in zip(batches, rows, strict=True):
            if count and batch.images is not None and batch.shared is not None:
                found.append(_SharePart(batch.images, _grid_of(batch.shared, self._encoders.place), count))
        most = handover.mean_rows if self._again else math.inf
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
            vision, connector, pictures.images, pictures.grid,
            trains_vision=self._trains_vision, replicas=self._replicas,
        )  # fmt: skip
        return features_QNE.transpose(0, 1).flatten(0, 1).to(self._dtype)

    def _go_backward(self, encoded: _Encoded, grad_KE: Tensor) -> None:
        """Go backward through this rank's pictures, whose features have these gradients."""
        grads = grad_KE.split([piece.rows for piece in encoded.pieces])
        for number, (piece, grad) in enumerate(zip(encoded.pieces, grads, strict=True)):
            features = self._encode(piece) if self._again else encoded.features[number]
            features.backward(grad)

    def _shaped(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return pictures' features [K, E] as the model has them: [Q, N, E], or [K, 1, E] of any size."""
        if self.model.vision.packed:
            return torch.cat(list(pieces)).unsqueeze(1)
        return torch.stack(list(pieces), dim=1)

    @staticmethod
    def _taken(leaf: Tensor | None) -> Tensor | None:
        """Take the gradient of a micro-batch's features off them, [K, E]; zeros where nothing asked for them."""
        if leaf is None:
            return None
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        leaf.grad = None
        return grad.transpose(0, 1).flatten(0, 1)

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


def _grid_of(pictures: SharedPictures, place: int) -> Tensor | None:
    """Return the grids of what a place encodes of a micro-batch; None where pictures are alike."""
    pairs = [pair for both in zip(pictures.places, pictures.grids, strict=True) for pair in zip(*both, strict=True)]
    found = [grid for owner, grid in pairs if owner == place]
    return None if None in found else torch.tensor(found, dtype=torch.int64)
