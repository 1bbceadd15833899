"""Parallel layers in containers of every kind; started with ``ranks.run``."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from tiny import IMAGE_TOKEN, tiny_recipe
from torch import Tensor, nn

from megavlm.checkpoint.containers import sharded_state
from megavlm.checkpoint.placement import misplaced, parts
from megavlm.checkpoint.slots import model_state
from megavlm.config.schema import ParallelConfig
from megavlm.layers.linear import column_linear, row_linear
from megavlm.parallel.state import process_groups
from megavlm.training.build import build_training


class Wrapper(nn.Module):
    """A foreign module that holds a parallel layer, and a parameter of its own that is cut over the ranks."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner = inner
        self.own = nn.Parameter(torch.zeros(8 // size, 3))
        self.whole = nn.Parameter(torch.zeros(5))
        if size > 1:
            set_tensor_model_parallel_attributes(self.own, True, 0, 1)


class Model(MegatronModule):
    """Containers of every kind, one in another."""

    def __init__(self, config: TransformerConfig, size: int) -> None:
        super().__init__(config)

        def column() -> Any:
            return column_linear(6, 8, config=config, init_method=config.init_method)

        def row() -> Any:
            return row_linear(8, 6, config=config, init_method=config.init_method)

        gated = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        self.plain = nn.Sequential(column(), nn.GELU(), row())
        self.listed = nn.ModuleList([nn.ModuleList([column()]), nn.LayerNorm(6)])
        self.named = nn.ModuleDict({"mlp": MLP(config, gated), "wrapped": Wrapper(nn.Sequential(row()), size)})

    def forward(self, x: Tensor) -> Tensor:
        """Nobody asks."""
        raise NotImplementedError


def described(size: int) -> tuple[dict[str, Any], list[str]]:
    """Return the parts by name, and what is misplaced."""
    with process_groups(ParallelConfig(tensor_model_parallel_size=size), 1):
        config = TransformerConfig(
            num_layers=1, hidden_size=6, ffn_hidden_size=8, num_attention_heads=2, gated_linear_unit=True,
            add_bias_linear=False, tensor_model_parallel_size=size, use_cpu_initialization=True,
        )  # fmt: skip
        model = Model(config, size)
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        state = sharded_state(model, "model.", {"dp_cp_group": group})
        own = {name: state[f"model.{name}"] for name, _ in model.named_parameters()}
        found = {name: [(p.key, p.offset, p.whole) for p in parts(entry)] for name, entry in own.items()}
        return found, list(misplaced([model], {"model": own}))


def quantised(recipe: dict[str, Any]) -> list[str]:
    """Return what is misplaced in a model whose frozen weights are to be kept in 4 bits."""
    tree = tiny_recipe(**recipe)
    with process_groups(tree.parallel, 1):
        training = build_training(tree, IMAGE_TOKEN)
        return list(misplaced(training.modules, model_state(training.modules)))
