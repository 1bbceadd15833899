"""Pictures as flat patches, in the order in which towers for pictures of any size take them, and back.

Shape legend: t frames (in temporal patches), h and w rows and columns of patches, m side of a block of patches that
becomes one token, p side of a patch, T frames of a patch, C colours. F = C * T * p * p, in this order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from megavlm.data.media import PackedPlan


def patches_of(view_CHW: Tensor, plan: PackedPlan) -> Tensor:
    """Return [h * w, F] of a picture: block by block, within each row by row; each frame of a patch shows the same."""
    patches = patch_rows(view_CHW, plan.merge, plan.patch)
    return patches.unsqueeze(2).expand(-1, -1, plan.temporal, -1).flatten(1)


def patch_rows(view_CHW: Tensor, m: int, p: int) -> Tensor:
    """Return [h * w, C, p * p] of a picture or frame, in the order of its patches."""
    blocks = view_CHW.unflatten(2, (-1, m, p)).unflatten(1, (-1, m, p))  # [C, rows, m, p, columns, m, p]
    return blocks.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3).flatten(2)


def pictures_of(patches_PF: Tensor, grids: Sequence[Sequence[int]], plan: PackedPlan) -> Iterator[Tensor]:
    """Yield [C, H, W] of each picture (of a film: of its first frame)."""
    m, p, start = plan.merge, plan.patch, 0
    for frames, rows, columns in grids:
        first = patches_PF[start : start + rows * columns].view(-1, 3, plan.temporal, p, p)[:, :, 0]
        blocks = first.view(rows // m, columns // m, m, m, 3, p, p).permute(4, 0, 2, 5, 1, 3, 6)
        yield blocks.reshape(3, rows * p, columns * p)
        start += frames * rows * columns
