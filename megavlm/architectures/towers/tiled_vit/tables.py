"""Names of its weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import QKV, Table, both, row

_LAYER = (
    *both("input_layernorm", "input_layernorm"),
    *both("self_attention.linear_qkv", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", QKV),
    row("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    *both("pre_mlp_layernorm", "post_attention_layernorm"),
    *both("mlp.linear_fc1", "mlp.fc1"),
    *both("mlp.linear_fc2", "mlp.fc2"),
)  # fmt: skip

MLLAMA_VISION = Table(
    part="vision",
    ours="transformer.layers.{}.",
    theirs="transformer.layers.{}.",
    layer=_LAYER,
    rest=(
        row("patch_embed.weight", "patch_embedding.weight"),
        row("class_embedding", "class_embedding"),
        row("positional_embedding", "gated_positional_embedding.embedding"),
        row("positional_gate", "gated_positional_embedding.gate"),
        row("tile_positions", "gated_positional_embedding.tile_embedding.weight"),
        row("pre_tile", "pre_tile_positional_embedding.embedding.weight"),
        row("pre_tile_gate", "pre_tile_positional_embedding.gate"),
        row("post_tile", "post_tile_positional_embedding.embedding.weight"),
        row("post_tile_gate", "post_tile_positional_embedding.gate"),
        *both("ln_pre", "layernorm_pre"),
        *both("ln_post", "layernorm_post"),
    ),
)
"""Llama 3.2 Vision (``MllamaVisionModel``), without its gated layers."""

MLLAMA_GLOBAL = Table(
    part="vision",
    ours="global_transformer.layers.{}.",
    theirs="global_transformer.layers.{}.",
    layer=(*_LAYER, row("self_attn_bda.gate", "gate_attn"), row("mlp_bda.gate", "gate_ffn")),
)
"""Its gated layers."""
