"""Names of the weights in the family's checkpoints, and which layers adapters may stand beside."""

from __future__ import annotations

from megavlm.config.lora import Target
from megavlm.weights.rules import CONCAT, QKV, Aside, Table, both, row
from megavlm.weights.targets import targets_in
from quilt.config import ScaledDecoderConfig

TOWER = Table(
    part="vision",
    rest=(row("position", "places"), *(one for n in range(32) for one in both(f"layers.{n}", f"step.{n}"))),
    prefix="eyes.",
    aside=(Aside("counter", "steps of the original training"),),
)
CONNECTOR = Table(part="connector", rest=both("project", "bridge"))
LANGUAGE = Table(
    part="language",
    ours="decoder.layers.{}.",
    theirs="blocks.{}.",
    layer=(
        row("input_layernorm.weight", "norm1.scale"),
        row("self_attention.linear_qkv.weight", "attn.q.weight attn.k.weight attn.v.weight", QKV),
        row("self_attention.linear_proj.weight", "attn.o.weight"),
        row("pre_mlp_layernorm.weight", "norm2.scale"),
        row("mlp.linear_fc1.weight", "ffn.gate.weight ffn.up.weight", CONCAT),
        row("mlp.linear_fc2.weight", "ffn.down.weight"),
        row("mlp.gain.weight", "ffn.gain"),
    ),
    rest=(
        row("embedding.word_embeddings.weight", "words.weight"),
        row("decoder.final_layernorm.weight", "norm.scale"),
        row("output_layer.weight", "head.weight"),
    ),
)


def targets(_language: ScaledDecoderConfig) -> tuple[Target, ...]:
    """Return what ``lora.targets`` may name."""
    return targets_in(LANGUAGE)
