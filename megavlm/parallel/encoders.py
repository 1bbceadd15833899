"""The ranks that encode a step's pictures among themselves, where all ranks do (``parallel.vision_placement``).

They are those of one data-parallel replica, or of the whole job (``parallel.vision_balance``). A *place* encodes
pictures of its own: one rank that holds the tower whole, or a stage's tensor-parallel ranks that hold a shard each
(``parallel.vision_shards``) and encode the same pictures together. Places count replica by replica, stage by stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megavlm.config.schema import ParallelConfig


@dataclass(frozen=True)
class Encoders:
    """Who they are."""

    group: Any
    """Their process group."""
    replicas: tuple[tuple[int, ...], ...]
    """[D][R] ranks of the group: of each replica, stage by stage."""
    own: int
    """Which of the replicas this rank is in."""
    tensor: int
    """Tensor-parallel ranks of a stage."""
    together: bool
    """Those of a stage hold shards, and encode the same pictures."""

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return int(self.group.rank())

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return int(self.group.size())

    @property
    def places(self) -> int:
        """Places of a replica."""
        return len(self.replicas[0]) // (self.tensor if self.together else 1)

    @property
    def place(self) -> int:
        """This rank's place."""
        within = self.replicas[self.own].index(self.rank)
        return self.own * self.places + within // (self.tensor if self.together else 1)

    @property
    def column(self) -> int:
        """This rank's tensor-parallel index."""
        return self.column_of(self.rank)

    def column_of(self, rank: int) -> int:
        """Return the tensor-parallel index of a rank of the group."""
        return rank % self.tensor

    @property
    def first(self) -> bool:
        """Whether this rank is on its replica's first stage."""
        return self.replicas[self.own].index(self.rank) < self.tensor

    def holders(self, place: int) -> tuple[int, ...]:
        """Return the ranks of a place."""
        replica, within = divmod(place, self.places)
        width = self.tensor if self.together else 1
        return self.replicas[replica][within * width : (within + 1) * width]

    def serving(self, place: int) -> int:
        """Return the rank of a place that gives features to ranks of this one's tensor-parallel index."""
        return self.holders(place)[self.column if self.together else 0]

    def takers(self, replica: int) -> tuple[int, ...]:
        """Return the first stage's ranks of a replica that this rank gives its features to.

        Of a stage that holds shards, each rank has the features whole, and serves one.
        """
        firsts = self.replicas[replica][: self.tensor]
        return (firsts[self.column],) if self.together else firsts


def encoders_of(parallel: ParallelConfig) -> Encoders:
    """Return the ranks that encode together with this one; Megatron-Core's groups must be up."""
    tensor, pipeline = mpu.get_tensor_model_parallel_world_size(), mpu.get_pipeline_model_parallel_world_size()
    data, own = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    place = mpu.get_pipeline_model_parallel_rank() * tensor + mpu.get_tensor_model_parallel_rank()
    together = parallel.vision_shards == "tensor" and tensor > 1
    replicas: tuple[tuple[int, ...], ...]
    if parallel.vision_balance == "replica" or data == 1:
        group, own = mpu.get_model_parallel_group(), 0
        replicas = (tuple(range(tensor * pipeline)),)
    else:
        # Megatron-Core counts ranks of a job by tensor, then data, then pipeline.
        group = dist.group.WORLD
        replicas = tuple(
            tuple(index + tensor * (replica + data * stage) for stage in range(pipeline) for index in range(tensor))
            for replica in range(data)
        )
    assert replicas[own][place] == group.rank(), "ranks do not lie by tensor, data and pipeline"
    return Encoders(group, replicas, own, tensor, together)
