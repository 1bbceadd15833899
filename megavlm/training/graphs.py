"""CUDA graphs of the language layers' MLPs (``engine.cuda_graph_impl``), captured once a run has warmed up.

Megatron-Core's ``TECudaGraphHelper`` captures, through Transformer Engine; when and with which hooks follows what
Megatron-LM's training loop does with it. Not run on a GPU yet.
"""

from __future__ import annotations

import logging

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

from megavlm.config.schema import Recipe
from megavlm.training.build import TrainingModel

logger = logging.getLogger(__name__)


class LayerGraphs:
    """Captures the graphs before the step at which it is due; does nothing where the recipe asks for none.

    Args:
        recipe: the run.
        training: its model.
        num_microbatches: of a step, on this replica.
    """

    def __init__(self, recipe: Recipe, training: TrainingModel, num_microbatches: int) -> None:
        self._recipe, self._training, self._num_microbatches = recipe, training, num_microbatches
        self._steps_to_go = training.modules[0].config.cuda_graph_warmup_steps
        self.pending = recipe.engine.cuda_graph_impl != "none"

    def before_step(self) -> None:
        """Count the steps of this process and capture after the warm-up; a collective then."""
        if not self.pending:
            return
        if self._steps_to_go > 0:
            self._steps_to_go -= 1
            return
        self.pending = False
        self._capture()

    def _capture(self) -> None:
        training = self._training
        # The helper asks Megatron-Core's global calculator, which megavlm has no other use for.
        init_num_microbatches_calculator(
            dist.get_rank(), None, self._recipe.training.global_batch_size, 1, mpu.get_data_parallel_world_size()
        )
        try:
            helper = TECudaGraphHelper(
                model=training.chunks,
                config=training.modules[0].config,
                seq_length=self._recipe.data.sequence_length,
                micro_batch_size=1,
                optimizers=[training.optimizer],
            )
            hooked = [c for c in training.chunks if c.ddp_config.overlap_param_gather and c.use_forward_hook]
            for chunk in hooked:
                chunk.disable_forward_pre_hook(param_sync=True)  # weights must be in place for the warm-up passes
            helper.create_cudagraphs()
            for chunk in hooked:
                chunk.enable_forward_pre_hook()
            if hooked:
                helper.cuda_graph_set_manual_hooks()
        finally:
            unset_num_microbatches_calculator()
        logger.info("captured CUDA graphs of %d micro-batch(es)", helper.num_microbatches)
