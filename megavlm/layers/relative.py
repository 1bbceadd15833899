"""Attention of a square of positions with learned numbers for how far rows and columns are apart (SAM, MViTv2).

Shape legend: T positions of a square of S rows and columns, row by row; B squares, N heads of this tensor-parallel
rank, D width of a head, W width of the stream.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.layers.attention import CompactSelfAttention


class RelativeAttention(MegatronModule):
    """``scaled_dot_product_attention`` with a bias: of query and key, row against row and column against column.

    All heads share the two tables. Each rank has its own heads, and so a part of the tables' gradient, which is summed
    over the ranks in the backward pass: they are the same on all, and so is their gradient.

    Args:
        config: of the layer.
        side: S. What else it takes is Megatron-Core's.
    """

    def __init__(self, config: TransformerConfig, *_: Any, side: int = 0, **__: Any) -> None:
        super().__init__(config=config)
        assert side, "of how many rows"
        width = config.hidden_size // config.num_attention_heads
        self.side = side
        self._group = mpu.get_tensor_model_parallel_group()  # that of now: a part may be built as on one rank
        shape, dtype = (2 * side - 1, width), config.params_dtype
        self.rows = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.columns = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self._apart: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return [T, B, N * D] of queries, keys and values [T, B, N, D]."""
        query_BNTD, key_BNTD, value_BNTD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        found = F.scaled_dot_product_attention(query_BNTD, key_BNTD, value_BNTD, attn_mask=self._bias(query_BNTD))
        return found.permute(2, 0, 1, 3).flatten(2)

    def _bias(self, query_BNTD: Tensor) -> Tensor:
        """[B, N, T, T]: for each query what each key's row and column add, from the query itself (not scaled)."""
        side, apart_SS = self.side, self._distances(query_BNTD.device)
        rows_SSD, columns_SSD = (
            copy_to_tensor_model_parallel_region(table, self._group)[apart_SS] for table in (self.rows, self.columns)
        )
        query_BNrcD = query_BNTD.unflatten(2, (side, side))
        by_row = torch.einsum("bnrcd,rkd->bnrck", query_BNrcD, rows_SSD)
        by_column = torch.einsum("bnrcd,ckd->bnrck", query_BNrcD, columns_SSD)
        return (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)

    def _distances(self, device: torch.device) -> Tensor:
        """[S, S] int64: row of the table for a query and a key so far apart; made once."""
        if self._apart is None or self._apart.device != device:
            at = torch.arange(self.side, device=device)
            self._apart = at[:, None] - at + self.side - 1
        return self._apart


class WindowSelfAttention(CompactSelfAttention):
    """Self-attention of a square of positions that is cut to smaller squares; zeros fill what they lack.

    The zeros stand behind the norm, and are positions as others are: they are attended to.

    Args:
        side: rows of the whole square.
        window: rows of a smaller one; None for the whole one. What else it takes is Megatron-Core's.
    """

    def __init__(self, *args: Any, side: int, window: int | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.side, self.window = side, window

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return [T, B, W], and the bias to add to it."""
        if self.window is None:
            return super().forward(hidden_states, *args, **kwargs)
        side, window = self.side, self.window
        many = -(-side // window)
        rest = many * window - side
        x_rcBW = hidden_states.unflatten(0, (side, side))
        x_rcBW = F.pad(x_rcBW, (0, 0, 0, 0, 0, rest, 0, rest))
        x_iyjxBW = x_rcBW.unflatten(1, (many, window)).unflatten(0, (many, window))
        # Windows of one picture after those of another one stand where pictures did.
        x_TBW = x_iyjxBW.permute(1, 3, 4, 0, 2, 5).flatten(2, 4).flatten(0, 1)
        y_TBW, bias = super().forward(x_TBW, *args, **kwargs)
        pictures = hidden_states.size(1)
        y_yxBijW = y_TBW.unflatten(1, (pictures, many, many)).unflatten(0, (window, window))
        y_rcBW = y_yxBijW.permute(3, 0, 4, 1, 2, 5).flatten(2, 3).flatten(0, 1)[:side, :side]
        return y_rcBW.flatten(0, 1), bias
