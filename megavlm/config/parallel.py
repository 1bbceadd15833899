"""The ``parallel`` branch of a recipe."""

from __future__ import annotations

import copy
from typing import Literal

from pydantic import Field

from megavlm.config.fields import config_class


@config_class
class ParallelConfig:
    """How the model is spread over processes; the data-parallel size is what remains of the world size."""

    tensor_model_parallel_size: int = Field(default=1, gt=0)
    """Processes that share each layer (TP)."""
    pipeline_model_parallel_size: int = Field(default=1, gt=0)
    """Pipeline stages (PP). The tower and the connector sit on the first."""
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, gt=1)
    """Model chunks per pipeline stage (VPP, interleaved schedule); null for one."""
    context_parallel_size: int = Field(default=1, gt=0)
    """Processes that share each pack (CP): each has 1/CP of every sample, in two pieces (docs/context-parallel.md)."""
    cp_comm_type: Literal["p2p", "a2a"] = "p2p"
    """With Transformer Engine, how attention reaches the other pieces: by a ring of keys and values, or by exchanging
    heads for positions. Plain torch layers gather keys and values."""
    num_layers_in_first_pipeline_stage: int | None = Field(default=None, gt=0)
    """Language layers of the first stage, to leave room for the tower; null to split evenly."""
    sequence_parallel: bool = False
    """Split the activations between the tensor-parallel regions along the sequence (SP); needs TP > 1."""
    expert_model_parallel_size: int = Field(default=1, gt=0)
    """Processes that share out the experts of a layer (EP): data-parallel ones, or tensor-parallel ones of several
    replicas. Each computes its own experts for the tokens of all of them."""
    expert_tensor_parallel_size: int | None = Field(default=None, gt=0)
    """Processes that share each expert, as TP shares the other layers; null for 1 with expert_model_parallel_size above
    1, and for the tensor-parallel size without."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state (and fp32 master weights) over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs the two keys above."""
    ddp_bucket_size: int | None = Field(default=None, gt=0)
    """With overlap_grad_reduce: parameters reduced together, at least; null for 40 million, or a million per
    data-parallel rank. Only the first pipeline stage's first chunk is cut into buckets."""
    vision_placement: Literal["first_stage", "all_ranks", "auto"] = "first_stage"
    """Who encodes pictures: the first stage, all ranks, or whom the plan finds faster (docs/vision-placement.md)."""
    vision_balance: Literal["replica", "job"] = "replica"
    """With all ranks: spread pictures over the ranks of each data-parallel replica, or of the whole job, so that no
    replica waits for the one with most to encode."""
    vision_shards: Literal["whole", "tensor"] = "whole"
    """With all ranks: each holds tower and connector whole, or each stage does, cut over its TP ranks."""
    vision_ahead: bool = False
    """With all ranks, tower and connector frozen: encode the next step's pictures while a step's pipeline runs."""
    vision_recompute: bool = False
    """With all ranks: keep no activations of tower and connector; encode pictures again for their backward pass."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activation recompute in the language model: full layers, only the core attention, or null for none."""
    recompute_num_layers: int | None = Field(default=None, gt=0)
    """With full recompute, layers that share one saved input (uniform method); null means 1."""
    transformer_impl: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Layer implementation: Transformer Engine, plain torch, or auto (the former where CUDA and it are there)."""
    distributed_timeout_minutes: float = Field(default=30.0, gt=0)
    """A collective that waits longer than this ends the job."""

    @property
    def expert_tensor_ranks(self) -> int:
        """Processes that share each expert."""
        if self.expert_tensor_parallel_size is not None:
            return self.expert_tensor_parallel_size
        return 1 if self.expert_model_parallel_size > 1 else self.tensor_model_parallel_size

    def with_tensor(self, ranks: int) -> ParallelConfig:
        """Return this branch with another tensor-parallel size."""
        found = copy.copy(self)  # the other values were checked, and ``replace`` would check them again
        object.__setattr__(found, "tensor_model_parallel_size", ranks)
        return found
