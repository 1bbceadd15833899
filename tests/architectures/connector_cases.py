"""Compare each connector with its single-device reference, at any tensor-parallel size."""

from __future__ import annotations

import torch
from connector_reference import (
    ReferenceResampler,
    fill,
    load_mlp,
    load_resampler,
    reference_mlp,
)
from samples import recipe
from torch import Tensor, nn

from megavlm.config.architecture import CONNECTORS
from megavlm.models.build import build_context

IMAGES, PATCHES, WIDTH, EMBED = 3, 16, 48, 64
# name: (settings of the connector, width of the tower)
CASES = {
    "resampler": ({"preset": "resampler", "num_queries": 4, "head_dim": 16}, WIDTH),
    "resampler-own-grid": ({"preset": "resampler", "num_queries": 16, "head_dim": 32}, WIDTH),
    "resampler-equal-width": ({"preset": "resampler", "num_queries": 9, "head_dim": 16}, EMBED),
    "linear": ({"preset": "linear"}, WIDTH),
    "mlp1x_gelu": ({"preset": "mlp1x_gelu"}, WIDTH),
    "mlp2x_gelu": ({"preset": "mlp2x_gelu"}, WIDTH),
    "mlp3x_gelu": ({"preset": "mlp3x_gelu"}, WIDTH),
}


def build(name: str, size: int, rank: int) -> tuple[nn.Module, nn.Module]:
    """Return the connector of this rank and its reference, with equal weights."""
    settings, width = CASES[name]
    tree = {"preset": "tiny", "connector": settings, "vision": {"image_size": 32, "hidden_size": width}}
    made = recipe(model={**tree, "language": {"hidden_size": EMBED}}, parallel={"tensor_model_parallel_size": size})
    connector = made.model.connector
    ours = CONNECTORS.find(connector.preset).build(made.model, build_context(made))
    if connector.preset == "resampler":
        assert connector.num_queries and connector.head_dim
        reference: nn.Module = ReferenceResampler(
            width, EMBED, EMBED // connector.head_dim, connector.num_queries, PATCHES
        )
        fill(reference)
        load_resampler(ours, reference, rank, size)
    else:
        reference = reference_mlp(1 if connector.preset == "linear" else int(connector.preset[3]), width, EMBED)
        fill(reference)
        load_mlp(ours, reference, rank, size)
    return ours, reference


def features(name: str) -> Tensor:
    """Return [P, N, W] patch features."""
    shape = (PATCHES, IMAGES, CASES[name][1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).requires_grad_()


def compare(name: str, size: int = 1, rank: int = 0) -> Tensor:
    """Compare output and input gradient, and with one rank all weight gradients; return the output."""
    ours, reference = build(name, size, rank)
    x, x_reference = features(name), features(name)
    got, expected = ours(x), reference(x_reference)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(8))
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-5, atol=1e-4)
    replicated = [
        n for n, p in reference.named_parameters() if n in {"query"} or "ln_" in n or n == "attn.out_proj.bias"
    ]
    for parameter in replicated:
        mine = ours.get_parameter(parameter.replace("attn.out_proj", "out_proj"))
        torch.testing.assert_close(mine.grad, reference.get_parameter(parameter).grad, rtol=1e-5, atol=1e-4)
    return got
