"""Names of a T5's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import CONCAT, KEY_VALUE, QKV, Aside, Row, Table, row


def _self_attention(theirs: str) -> tuple[Row, ...]:
    names = " ".join(f"{theirs}.SelfAttention.{one}.weight" for one in "qkv")
    return (
        row("input_layernorm.weight", f"{theirs}.layer_norm.weight"),
        row("self_attention.linear_qkv.weight", names, QKV),
        row("self_attention.linear_proj.weight", f"{theirs}.SelfAttention.o.weight"),
    )


def _mlp(theirs: str) -> tuple[Row, ...]:
    own = f"{theirs}.DenseReluDense."
    return (
        row("pre_mlp_layernorm.weight", f"{theirs}.layer_norm.weight"),
        row("mlp.linear_fc1.weight", f"{own}wi_0.weight {own}wi_1.weight", CONCAT),  # wi_0 is the gate
        row("mlp.linear_fc2.weight", f"{own}wo.weight"),
    )


_RELATIVE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
T5_ENCODER = Table(
    part="language",
    ours="decoder.encoder.layers.{}.",
    theirs="encoder.block.{}.",
    layer=(*_self_attention("layer.0"), *_mlp("layer.1")),
    rest=(
        row("decoder.encoder_relative.weight", f"encoder.{_RELATIVE}"),
        row("decoder.encoder.final_layernorm.weight", "encoder.final_layer_norm.weight"),
    ),
    aside=(Aside(r"encoder\.embed_tokens\.weight", "the embedding once more", same_as=r"shared\.weight"),),
)
"""The encoder of T5 1.1, and of UL2."""
T5_DECODER = Table(
    part="language",
    ours="decoder.layers.{}.",
    theirs="decoder.block.{}.",
    layer=(
        *_self_attention("layer.0"),
        row("pre_cross_attn_layernorm.weight", "layer.1.layer_norm.weight"),
        row("cross_attention.linear_q.weight", "layer.1.EncDecAttention.q.weight"),
        row(
            "cross_attention.linear_kv.weight",
            "layer.1.EncDecAttention.k.weight layer.1.EncDecAttention.v.weight",
            KEY_VALUE,
        ),
        row("cross_attention.linear_proj.weight", "layer.1.EncDecAttention.o.weight"),
        *_mlp("layer.2"),
    ),
    rest=(
        row("embedding.word_embeddings.weight", "shared.weight"),
        row("decoder.relative.weight", f"decoder.{_RELATIVE}"),
        row("decoder.final_layernorm.weight", "decoder.final_layer_norm.weight"),
        row("output_layer.weight", "lm_head.weight"),
    ),
    aside=(Aside(r"decoder\.embed_tokens\.weight", "the embedding once more", same_as=r"shared\.weight"),),
)
"""Its decoder, embedding and output layer."""
