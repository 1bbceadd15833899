"""From the features of views to those of image slots: reordered, interpolated, with the learned newline vector.

Where each goes is told by the image plan (``megavlm.data.media.Arrangement``), on the host.

Shape legend: V views, Q features of a view, T image slots of a pack, K features that a slot is made of, E width of the
language model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEWLINE = "image_newline"
"""Name of the newline vector, a parameter [E] of the connector: it is frozen, trained and saved with it."""


def add_newline(connector: nn.Module, hidden_size: int, dtype: torch.dtype, *, initialize: bool) -> None:
    """Give a connector the vector that stands at the end of a row of an image's features.

    It is the same on all tensor-parallel ranks, and so is its gradient: behind it the embeddings are scattered, or not,
    by Megatron-Core's mappings, whose backward gathers.
    """
    vector = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
    if initialize:
        nn.init.normal_(vector, std=hidden_size**-0.5)  # as LLaVA-1.6 begins
    connector.register_parameter(NEWLINE, vector)


def newline_of(connector: nn.Module) -> Tensor | None:
    """Return a connector's newline vector, if there is one."""
    return getattr(connector, NEWLINE, None)


def arrange_features(
    features_QVE: Tensor, index_TK: Tensor | None, weight_TK: Tensor | None, newline_E: Tensor | None
) -> Tensor:
    """Return the features [T, E] of the image slots.

    Args:
        features_QVE: what the connector made of the views.
        index_TK: rows of the views' features, view by view; -1 is the newline. None keeps their order.
        weight_TK: of these rows; None where K is 1.
        newline_E: the newline vector.
    """
    flat_FE = features_QVE.transpose(0, 1).flatten(0, 1)
    if index_TK is None:
        return flat_FE
    # Plain indexing, whose gradient is summed in a fixed order: tensor-parallel ranks must find the same.
    if weight_TK is None:
        slots_TE = flat_FE[index_TK[:, 0].clamp(min=0)]
    else:
        taken_TKE = flat_FE[index_TK.clamp(min=0)].float()
        slots_TE = (taken_TKE * weight_TK[..., None]).sum(1).to(flat_FE.dtype)
    if newline_E is None:
        return slots_TE
    # A mean of rows would round a bf16 gradient at each; a sum over those chosen does not.
    return torch.where(index_TK[:, :1] < 0, newline_E.to(slots_TE.dtype), slots_TE)
