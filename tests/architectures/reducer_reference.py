"""Connectors that shrink or widen tokens as plain torch modules, with the published names of their parameters.

Each takes and gives [P, N, ..] as ours do. Sources, by their papers and public code:

* row concatenation: MiniGPT-v2 (arXiv 2310.09478; ``minigpt4/models/minigpt_v2.py``, ``encode_img``);
* LDP, LDPv2: MobileVLM (arXiv 2312.16886, 2402.03766; ``mobilevlm/model/vision_projector.py`` of
  Meituan-AutoML/MobileVLM), made of torchvision's ``InvertedResidual`` and timm's ``LayerNormAct2d`` (epsilon 1e-5);
* C-Abstractor: Honeybee (arXiv 2312.06742; ``honeybee/projectors/projectors.py``), made of timm's ``RegStage``, whose
  blocks have a group per channel and squeeze to a quarter of the channels that come in;
* DenseConnector (arXiv 2405.13800; ``dc/model/multimodal_projector/dense_connector.py`` of HJYao00/DenseConnector);

* MiniCPM-V's resampler (``Resampler2_5``, and ``Resampler2`` of 2.0, in vLLM's ``models/minicpmv.py``).

Gemma 3's, Idefics3's and BLIP-2's Q-Former are Transformers' own classes.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector


class Named(nn.Module):
    """A module whose parameters have a prefix, and which takes images first inside."""

    def __init__(self, prefix: str, inner: nn.Module) -> None:
        super().__init__()
        self.prefix, self.inner = prefix, inner

    def named(self) -> dict[str, nn.Parameter]:
        """Return the parameters by their published names."""
        # LLaVA's projector is the sequence itself.
        names = ((name.removeprefix("projector."), one) for name, one in self.inner.named_parameters())
        return {self.prefix + name: one for name, one in names}

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1).contiguous()).transpose(0, 1)


def mapped(x: Tensor) -> Tensor:
    """[N, P, C] to [N, C, h, h]."""
    side = int(x.size(1) ** 0.5)
    return x.permute(0, 2, 1).reshape(x.size(0), x.size(2), side, side)


def listed(x: Tensor) -> Tensor:
    """[N, C, h, w] to [N, h * w, C]."""
    return x.flatten(2).permute(0, 2, 1)


class ChannelsNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Gate(nn.Module):
    """Squeeze and excitation with 1 x 1 convolutions."""

    def __init__(self, channels: int, squeezed: int, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.gate = activation, gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.activation(self.fc1(x.mean((2, 3), keepdim=True)))))


class MobileBlock(nn.Module):
    def __init__(self, channels: int, squeezed: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.block = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
                ChannelsNorm(channels),
                nn.Hardswish(),
            ),
            Gate(channels, squeezed, nn.ReLU(), nn.Hardsigmoid()),
            nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), ChannelsNorm(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x if self.stride == 1 else self.block(x)


class LDP(nn.Module):
    def __init__(self, width: int, embed: int, squeezed: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Identity(), nn.Linear(width, embed), nn.GELU(), nn.Linear(embed, embed))
        blocks = (MobileBlock(embed, squeezed, stride) for stride in (1, 2))
        self.mb_block = nn.Sequential(nn.Identity(), *blocks)

    def forward(self, x: Tensor) -> Tensor:
        return listed(self.mb_block(mapped(self.mlp(x))))


class LDPv2(nn.Module):
    def __init__(self, width: int, embed: int, side: int) -> None:
        super().__init__()
        self.mlp, self.peg = nn.Module(), nn.Module()
        self.mlp.mlp = nn.Sequential(nn.Linear(width, embed), nn.GELU(), nn.Linear(embed, embed))
        self.down = nn.AdaptiveAvgPool2d((side, side))
        self.peg.peg = nn.Sequential(nn.Conv2d(embed, embed, 3, 1, 1, groups=embed))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(mapped(self.mlp.mlp(x)))
        return listed(self.peg.peg(x) + x)


class Convolution(nn.Module):
    """A convolution without bias, its norm, and SiLU if wanted."""

    def __init__(self, size_in: int, size_out: int, kernel: int = 1, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(size_in, size_out, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn, self.act = ChannelsNorm(size_out), nn.SiLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, size_in: int, size: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Convolution(size_in, size), Convolution(size, size, 3, groups=size)
        self.se = Gate(size, round(size_in / 4), nn.SiLU(), nn.Sigmoid())
        self.conv3 = Convolution(size, size, act=False)
        self.downsample = nn.Identity() if size_in == size else Convolution(size_in, size, act=False)
        self.act3 = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act3(self.conv3(self.se(self.conv2(self.conv1(x)))) + self.downsample(x))


def stage(depth: int, size_in: int, size: int) -> nn.Sequential:
    found = nn.Sequential()
    for number in range(depth):
        found.add_module(f"b{number + 1}", Bottleneck(size if number else size_in, size))
    return found


class CAbstractor(nn.Module):
    def __init__(self, width: int, embed: int, patches: int, size: int, depth: int, side: int) -> None:
        super().__init__()
        self.pos_emb = nn.Parameter(torch.zeros(1, patches, width))
        pooled = nn.AdaptiveAvgPool2d((side, side))
        self.net = nn.Sequential(stage(depth, width, size), pooled, stage(depth, size, size))
        self.readout = nn.Sequential(nn.Linear(size, embed), nn.SiLU(), nn.Linear(embed, embed))

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(listed(self.net(mapped(x + self.pos_emb))))


class RowConcat(nn.Module):
    def __init__(self, width: int, embed: int, count: int) -> None:
        super().__init__()
        self.llama_proj, self.count = nn.Linear(count * width, embed), count

    def forward(self, x: Tensor) -> Tensor:
        return self.llama_proj(x.reshape(x.size(0), x.size(1) // self.count, x.size(2) * self.count))


class SquareMean(nn.Module):
    """Means of squares, two linear layers with GELU between them."""

    def __init__(self, width: int, embed: int, side: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(side)
        self.mlp = nn.Sequential(nn.Linear(width, embed), nn.GELU(), nn.Linear(embed, embed))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(listed(self.pool(mapped(x))))


class Dense(nn.Module):
    """DenseConnector on hidden states side by side, in the order in which the recipe names them."""

    def __init__(self, width: int, embed: int, kind: str, layers: int) -> None:
        super().__init__()
        self.kind, self.count = kind, layers
        size = width if kind == "sti" else 3 * width
        self.projector = nn.Sequential(nn.Linear(size, embed), nn.GELU(), nn.Linear(embed, embed))

    def forward(self, x: Tensor) -> Tensor:
        states = x.chunk(self.count, dim=-1)
        if self.kind == "sti":
            last, one, two = states
            pooling = nn.AvgPool1d(kernel_size=8, stride=8)
            pooled = [pooling(state.permute(0, 2, 1)).permute(0, 2, 1) for state in (one, two)]
            return self.projector(torch.cat([last, *pooled], dim=-2))
        if self.kind == "sci":
            return self.projector(torch.cat(states, dim=-1))
        # CLIP: of 24 states 0 to 11 and 12 to 23, the last of which is the feature; SigLIP: of 27 states 0 to 12 and
        # 13 to 25, and 26 is the feature.
        half = self.count // 2
        means = [torch.stack(states[:half]).sum(0) / half, torch.stack(states[half : 2 * half]).sum(0) / half]
        return self.projector(torch.cat([states[-1], *means], dim=-1))


def gemma3(width: int, embed: int, patches: int, side: int) -> nn.Module:
    """Return Transformers' connector of Gemma 3."""
    rows = int(patches**0.5)
    vision = SimpleNamespace(hidden_size=width, layer_norm_eps=1e-6, image_size=14 * rows, patch_size=14)
    text = SimpleNamespace(hidden_size=embed)
    tokens = (rows // side) ** 2
    return Gemma3MultiModalProjector(
        SimpleNamespace(vision_config=vision, text_config=text, mm_tokens_per_image=tokens)
    )


def idefics3(width: int, embed: int, side: int) -> nn.Module:
    """Return Transformers' connector of Idefics3."""
    parts = {"vision_config": SimpleNamespace(hidden_size=width), "text_config": SimpleNamespace(hidden_size=embed)}
    return Idefics3Connector(SimpleNamespace(scale_factor=side, **parts))


def sincos(width: int, rows: int, columns: int) -> Tensor:
    """Return [rows * columns, width], number by number: column then row, each sines then cosines."""
    quarter = width // 4
    table = torch.empty(rows, columns, width, dtype=torch.float64)
    for i in range(quarter):
        omega = 10000.0 ** (-i / quarter)
        wide, tall = torch.arange(columns).double() * omega, torch.arange(rows).double() * omega
        table[:, :, i], table[:, :, quarter + i] = wide.sin(), wide.cos()
        table[:, :, 2 * quarter + i], table[:, :, 3 * quarter + i] = tall.sin()[:, None], tall.cos()[:, None]
    return table.flatten(0, 1).float()


class Resampler(nn.Module):
    """``sizes``: rows and columns of each picture; inputs [N, P, W] are filled up with anything behind them."""

    def __init__(self, width: int, embed: int, head_dim: int, queries: int, positions: bool) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, embed))
        self.pos_embed = None
        if positions:
            self.pos_embed = nn.Parameter(torch.empty(queries, embed), requires_grad=False)
        self.kv_proj = nn.Identity() if width == embed else nn.Linear(width, embed, bias=False)
        self.attn = nn.MultiheadAttention(embed, embed // head_dim)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(embed, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(embed, embed))
        self.sizes: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.sizes or [(int(x.size(1) ** 0.5),) * 2] * x.size(0)
        x = self.ln_kv(self.kv_proj(x)).permute(1, 0, 2)
        mask = torch.zeros(x.size(1), x.size(0), dtype=torch.bool)
        positions = torch.zeros_like(x)
        for i, (rows, columns) in enumerate(sizes):
            mask[i, rows * columns :] = True
            positions[: rows * columns, i] = sincos(x.size(2), rows, columns)
        query = self.ln_q(self.query).unsqueeze(1).repeat(1, x.size(1), 1)
        if self.pos_embed is not None:
            query = query + self.pos_embed.unsqueeze(1)
        out = self.attn(query, x + positions, x, key_padding_mask=mask)[0].permute(1, 0, 2)
        return self.ln_post(out) @ self.proj


class QFormer(nn.Module):
    """Transformers' Q-Former with the queries and the layer that ``Blip2ForConditionalGeneration`` puts around it."""

    def __init__(self, width: int, embed: int, queries: int, **sizes: int) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            encoder_hidden_size=width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
        )
        self.query_tokens = nn.Parameter(torch.empty(1, queries, config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(config)
        self.language_projection = nn.Linear(config.hidden_size, embed)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.query_tokens.expand(x.size(0), -1, -1)
        return self.language_projection(self.qformer(queries, encoder_hidden_states=x).last_hidden_state)


class TwoLayers(nn.Module):
    """TinyGPT-V's (``encode_img`` in minigpt4/models/minigpt4.py of DLYuanGod/TinyGPT-V @ 83f6189b): no activation."""

    def __init__(self, first: QFormer, width: int, inside: int, embed: int) -> None:
        super().__init__()
        for name, module in first.named_children():
            setattr(self, name, module)
        self.query_tokens, self.first = first.query_tokens, [first]
        first.language_projection = self.language_projection = nn.Linear(width, inside)
        self.language_projection2 = nn.Linear(inside, embed)

    def forward(self, *given: Tensor) -> Tensor:
        found: Tensor = self.language_projection2(self.first[0](*given))
        return found
