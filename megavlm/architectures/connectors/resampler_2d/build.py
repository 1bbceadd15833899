"""MiniCPM-V's resampler (LLaVA-UHD, arXiv 2403.11703; MiniCPM-V, arXiv 2408.01800).

Qwen-VL's, but for positions: keys have the sin-cos positions of the picture's own rows and columns. Pictures of
different sizes are looked at together; what fills up the smaller ones is masked.

Shape legend: N pictures, P patches of a picture, R patches of all pictures, M of the largest, W width of the tower, Q
queries, E width of the language model, A = E / TP, H heads of this tensor-parallel rank, D width of a head; 1 stands
for the batch dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megavlm.architectures.connectors.resampler.build import Resampler
from megavlm.architectures.connectors.resampler_2d.config import own
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig

_STEP = 64
"""Tables of positions along a side are made for multiples of it."""


class Resampler2D(Resampler):
    """Features of patches to Q image tokens for each picture (or frame)."""

    takes_grid = True
    """Its ``forward`` takes the grid of packed pictures beside their features."""

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        super().__init__(model, context, query_positions=own(model).query_positions)
        del self.core_attention  # ours has a mask of keys
        self.vision_grid, self.width = model.vision.grid, model.language.hidden_size
        self.merge = int(model.vision.spatial_merge_size) if model.vision.packed else 1
        assert own(model).num_queries is not None  # its rules
        self.num_queries: int = own(model).num_queries or 0

    def rows_of(self, grid_V3: Tensor) -> list[int]:
        """Return the tokens of each picture."""
        return [frames * self.num_queries for frames in grid_V3[:, 0].tolist()]

    def forward(self, features: Tensor, grid_V3: Tensor | None = None) -> Tensor:
        """Return image tokens.

        Args:
            features: [P, N, W] of pictures of one size, row by row; or, with their grid, [R, 1, W] of one picture after
                the other, each in the tower's blocks.
            grid_V3: [V, 3] int64 on the host: frames, rows and columns of patches.

        Returns:
            [Q, N, E], or [Q * N, 1, E], picture by picture; a frame is a picture.
        """
        with get_fp8_context(self.config):  # nothing in bf16
            if grid_V3 is None:
                sizes, flat_R1W = (
                    [self.vision_grid] * features.size(1),
                    features.transpose(0, 1).reshape(-1, 1, features.size(2)),
                )
            else:
                sizes = [(rows, columns) for frames, rows, columns in grid_V3.tolist() for _ in range(frames)]
                flat_R1W = features
            tokens_QNE = self._look(flat_R1W, sizes)
        return tokens_QNE if grid_V3 is None else tokens_QNE.transpose(0, 1).flatten(0, 1).unsqueeze(1)

    def _look(self, flat_R1W: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Return [Q, N, E] of N pictures' patches, one picture after the other."""
        x_R1E = self._narrowed(flat_R1W)
        made = {size: self._positions(size, x_R1E) for size in set(sizes)}
        positions_RE = torch.cat([made[size] for size in sizes])
        lengths = [rows * columns for rows, columns in sizes]
        key_NHMD = self._filled(self.linear_k(x_R1E + positions_RE.unsqueeze(1))[0], lengths)
        value_NHMD = self._filled(self.linear_v(x_R1E)[0], lengths)
        query_HQD = self._queries().squeeze(1).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
        mask = None
        if min(lengths) < max(lengths):
            there = torch.tensor(lengths, device=x_R1E.device).unsqueeze(1)
            mask = (torch.arange(max(lengths), device=x_R1E.device) < there)[:, None, None]
        query_NHQD = query_HQD.expand(len(sizes), -1, -1, -1)
        context_NHQD = F.scaled_dot_product_attention(query_NHQD, key_NHMD, value_NHMD, attn_mask=mask)
        return self._behind(context_NHQD.permute(2, 0, 1, 3).flatten(2).contiguous())

    def _filled(self, x_R1A: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return [N, H, M, D], with zeros behind the patches of smaller pictures."""
        x_NMA = pad_sequence(list(x_R1A.squeeze(1).split(list(lengths))), batch_first=True)
        return x_NMA.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _positions(self, size: tuple[int, int], like: Tensor) -> Tensor:
        """Return [P, E], the first half of which encodes the column, the second the row, in the tower's blocks."""
        rows, columns = size
        line = _line(self.width // 2, -(-max(size) // _STEP) * _STEP, like.device)
        table_rcE = torch.cat([line[:columns].expand(rows, -1, -1), line[:rows, None].expand(-1, columns, -1)], dim=-1)
        m = self.merge
        blocks = table_rcE.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2)
        return blocks.reshape(rows * columns, -1).to(like.dtype)


@functools.lru_cache(maxsize=16)
def _line(width: int, count: int, device: torch.device) -> Tensor:
    """[count, width] fp32: the sines and cosines of positions along a side."""
    with torch.inference_mode(False), torch.no_grad():
        omega = 1.0 / 10000 ** (torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width / 2.0))
        angles = torch.arange(count, dtype=torch.float64, device="cpu").unsqueeze(1) * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1).float().to(device)


def build(model: ModelConfig, context: BuildContext) -> Resampler2D:
    """Build the connector (the function that every module of this folder has)."""
    return Resampler2D(model, context)
