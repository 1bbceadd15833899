"""The layout in words, for logs and results."""

from __future__ import annotations

from megavlm.config.schema import ParallelConfig


def describe(parallel: ParallelConfig, world_size: int) -> str:
    """Return for example ``TP 2 x PP 2 x DP 1 + SP`` for a job of ``world_size`` processes."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    shared = f" x CP {context}" if context > 1 else ""
    text = f"TP {tensor}{shared} x PP {pipeline} x DP {world_size // (tensor * context * pipeline)}"
    if parallel.expert_model_parallel_size > 1:
        text += f" (EP {parallel.expert_model_parallel_size})"
    if parallel.virtual_pipeline_model_parallel_size:
        text += f", VPP {parallel.virtual_pipeline_model_parallel_size}"
    return text + (" + SP" if parallel.sequence_parallel else "")
