"""Plain references of language models that Transformers has no class for, written from their published definitions.

* MiniCPM-2B: arXiv 2404.06395, section 4.1 and appendix A.1 (muP-like multipliers), and the names and keys of
  openbmb/MiniCPM-2B-sft-bf16 (``modeling_minicpm.py``, ``configuration_minicpm.py``): embeddings times ``scale_emb``,
  what attention and MLP give times ``scale_depth / sqrt(num_hidden_layers)``, and the last hidden state divided by
  ``hidden_size / dim_model_base`` in front of the (tied) head. All else is Llama's.
* InternLM2: arXiv 2403.17297, section 2.2 (``Wqkv`` of a head group interleaved: its queries, its key, its value), and
  the names and keys of internlm/internlm2-7b (``modeling_internlm2.py``): ``w1`` is the gate, ``w3`` the other.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


class _Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def _turned(x_NSD: Tensor, base: float) -> Tensor:
    """Rotary positions from 0, channels half a head apart as pairs (arXiv 2104.09864)."""
    length, width = x_NSD.shape[-2:]
    inverse = base ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(length).float(), inverse)
    a, b = x_NSD.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def _attended(q_NSD: Tensor, k_GSD: Tensor, v_GSD: Tensor, base: float) -> Tensor:
    """Causal attention of grouped queries; [S, N * D]."""
    share = q_NSD.size(0) // k_GSD.size(0)
    q, k = _turned(q_NSD, base), _turned(k_GSD, base).repeat_interleave(share, 0)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v_GSD.repeat_interleave(share, 0)
    return out.transpose(0, 1).flatten(1)


class _Reference(nn.Module):
    """A model with its configuration, which is called and saved as Transformers' are."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.settings = config
        self.base = float(config["rope_theta"])
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.hidden = config["hidden_size"]
        self.dim = self.hidden // self.heads

    def row(self, ids_S: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> Any:
        """Return what has ``logits`` [B, S, V]."""
        return type("Output", (), {"logits": torch.stack([self.row(ids) for ids in input_ids])})()

    def generate(self, input_ids: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        """Return the ids with as many behind them, each the likeliest."""
        with torch.no_grad():
            for _step in range(max_new_tokens):
                best = self(input_ids).logits[:, -1].argmax(-1, keepdim=True)
                input_ids = torch.cat([input_ids, best], dim=1)
        return input_ids

    def save_pretrained(self, directory: Path) -> None:
        """Write weights and ``config.json``."""
        directory.mkdir(parents=True)
        state = {name: value.detach().clone() for name, value in self.named_parameters()}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(self.settings, indent=2))


class _MiniCPMLayer(nn.Module):
    def __init__(self, config: dict[str, Any], dim: int) -> None:
        super().__init__()
        hidden, inner, eps = config["hidden_size"], config["intermediate_size"], config["rms_norm_eps"]
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, heads in (("q", config["num_attention_heads"]), *((n, config["num_key_value_heads"]) for n in "kv")):
            setattr(self.self_attn, f"{name}_proj", nn.Linear(hidden, heads * dim, bias=False))
        self.self_attn.o_proj = nn.Linear(config["num_attention_heads"] * dim, hidden, bias=False)
        self.mlp.gate_proj, self.mlp.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.mlp.down_proj = nn.Linear(inner, hidden, bias=False)
        self.input_layernorm, self.post_attention_layernorm = _Norm(hidden, eps), _Norm(hidden, eps)


class MiniCPM(_Reference):
    """MiniCPM-2B; with a head of its own where the configuration unties it (MiniCPM-V 2.0)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], self.hidden)
        layers = [_MiniCPMLayer(config, self.dim) for _ in range(config["num_hidden_layers"])]
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = _Norm(self.hidden, config["rms_norm_eps"])
        if not config.get("tie_word_embeddings", True):
            self.lm_head = nn.Linear(self.hidden, config["vocab_size"], bias=False)

    def row(self, ids_S: Tensor) -> Tensor:
        """Return the logits [S, V]."""
        return self.behind(self.words(ids_S))

    def words(self, ids_S: Tensor) -> Tensor:
        """Return the embeddings [S, E]."""
        embedded: Tensor = self.model.embed_tokens(ids_S) * self.settings["scale_emb"]
        return embedded

    def behind(self, x: Tensor) -> Tensor:
        """Return the logits [S, V] of embeddings [S, E]."""
        own, model = self.settings, self.model
        scale = own["scale_depth"] / math.sqrt(own["num_hidden_layers"])
        for layer in model.layers:
            normed, attention, mlp = layer.input_layernorm(x), layer.self_attn, layer.mlp
            q, k, v = (
                getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, self.dim)).transpose(0, 1)
                for name in "qkv"
            )
            x = x + scale * attention.o_proj(_attended(q, k, v, self.base))
            normed = layer.post_attention_layernorm(x)
            x = x + scale * mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        head = self.lm_head if hasattr(self, "lm_head") else model.embed_tokens
        return F.linear(model.norm(x) / (self.hidden / own["dim_model_base"]), head.weight)


class _InternLM2Layer(nn.Module):
    def __init__(self, config: dict[str, Any], dim: int) -> None:
        super().__init__()
        hidden, inner, eps = config["hidden_size"], config["intermediate_size"], config["rms_norm_eps"]
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.attention, self.feed_forward = nn.Module(), nn.Module()
        self.attention.wqkv = nn.Linear(hidden, (heads + 2 * groups) * dim, bias=False)
        self.attention.wo = nn.Linear(heads * dim, hidden, bias=False)
        self.feed_forward.w1, self.feed_forward.w3 = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.feed_forward.w2 = nn.Linear(inner, hidden, bias=False)
        self.attention_norm, self.ffn_norm = _Norm(hidden, eps), _Norm(hidden, eps)


class InternLM2(_Reference):
    """InternLM2."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(config["vocab_size"], self.hidden)
        layers = [_InternLM2Layer(config, self.dim) for _ in range(config["num_hidden_layers"])]
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = _Norm(self.hidden, config["rms_norm_eps"])
        self.output = nn.Linear(self.hidden, config["vocab_size"], bias=False)

    def row(self, ids_S: Tensor) -> Tensor:
        """Return the logits [S, V]."""
        x, share = self.model.tok_embeddings(ids_S), self.heads // self.groups
        for layer in self.model.layers:
            groups_SGHD = layer.attention.wqkv(layer.attention_norm(x)).unflatten(
                -1, (self.groups, share + 2, self.dim)
            )
            q = groups_SGHD[:, :, :share].flatten(1, 2).transpose(0, 1)
            k, v = groups_SGHD[:, :, share].transpose(0, 1), groups_SGHD[:, :, share + 1].transpose(0, 1)
            x = x + layer.attention.wo(_attended(q, k, v, self.base))
            normed, mlp = layer.ffn_norm(x), layer.feed_forward
            x = x + mlp.w2(F.silu(mlp.w1(normed)) * mlp.w3(normed))
        return self.output(self.model.norm(x))


def randomised(model: _Reference, seed: int = 5) -> _Reference:
    """Fill every parameter with numbers that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * (1.0 if "embed" in name else 0.1))
    return model
