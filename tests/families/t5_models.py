"""Small T5s by Transformers, whose output layer is a weight of its own.

Version 5 ties it, although T5 1.1 and UL2, which say ``tie_word_embeddings: false``, have two weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

VOCAB, WIDTH = 120, 64


def make(gate: str) -> Any:
    """Return the model, whose distances pass the last bucket."""
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=24, d_ff=96, num_layers=3, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=10, feed_forward_proj=gate, tie_word_embeddings=False, dropout_rate=0.0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layer_norm.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if name.endswith("relative_attention_bias.weight"):
                parameter.copy_(torch.randn_like(parameter))
    return model


def save(directory: Path, gate: str) -> Path:
    """Write a checkpoint as T5 1.1's are: both stacks have the embedding once more."""
    model = make(gate)
    model.config.save_pretrained(directory)
    path = directory / "config.json"
    own = {"tie_word_embeddings": False, "architectures": ["T5ForConditionalGeneration"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    weights = {key: value.detach().clone() for key, value in model.named_parameters()}
    for stack in ("encoder", "decoder"):
        weights[f"{stack}.embed_tokens.weight"] = weights["shared.weight"].clone()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


T5: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "t5": ("t5", partial(save, gate="gated-gelu")),
    "ul2": ("t5", partial(save, gate="gated-silu")),
}
"""What makes a checkpoint, by name, and its family."""
