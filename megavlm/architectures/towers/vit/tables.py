"""Names of a vision transformer's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import ONE_AXIS, QKV, QKV_BLOCKS, Aside, Table, both, row

_VIT_LAYER = "transformer.layers.{}."

QWEN_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="transformer.resblocks.{}.",
    layer=(
        *both("input_layernorm", "ln_1"),
        *both("self_attention.linear_qkv", "attn.in_proj"),  # already [q, k, v] per head
        *both("self_attention.linear_proj", "attn.out_proj"),
        *both("pre_mlp_layernorm", "ln_2"),
        *both("mlp.linear_fc1", "mlp.c_fc"),
        *both("mlp.linear_fc2", "mlp.c_proj"),
    ),
    rest=(
        row("conv1.weight", "conv1.weight"),
        row("positional_embedding", "positional_embedding"),
        *both("ln_pre", "ln_pre"),
    ),
    prefix="transformer.visual.",
)
"""The tower of Qwen-VL."""

TRANSFORMERS_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="encoder.layers.{}.",
    layer=(
        *both("input_layernorm", "layer_norm1"),
        *both("self_attention.linear_qkv", "self_attn.q_proj self_attn.k_proj self_attn.v_proj", QKV),
        *both("self_attention.linear_proj", "self_attn.out_proj"),
        *both("pre_mlp_layernorm", "layer_norm2"),
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
    ),
    rest=(
        row("class_embedding", "embeddings.class_embedding"),
        *both("conv1", "embeddings.patch_embedding"),
        row("positional_embedding", "embeddings.position_embedding.weight"),
        *both("ln_pre", "pre_layrnorm"),  # the slip is in the published names
        *both("ln_post", "post_layernorm"),
    ),
    aside=(
        Aside(r"embeddings\.position_ids", "position number buffer"),
        Aside(r"post_layernorm\.(weight|bias)", "norm behind layers that are not used", carried=True),
        Aside(
            r"encoder\.layers\.(\d+)\..*", "layer behind the one whose features are taken", carried=True, behind=True
        ),
        Aside(r"head\..*", "attention pooling head", carried=True),
    ),
    prefix="vision_model.",
)
"""CLIP and SigLIP as Transformers writes them."""

TIMM_VISION = Table(
    part="vision",
    ours=_VIT_LAYER,
    theirs="{tower}blocks.{}.",
    layer=(
        *both("input_layernorm", "norm1"),
        *both("self_attention.linear_qkv", "attn.qkv", QKV_BLOCKS),
        *both("self_attention.linear_proj", "attn.proj"),
        *both("pre_mlp_layernorm", "norm2"),
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
    ),
    rest=(
        *both("conv1", "{tower}patch_embed.proj"),
        row("positional_embedding", "{tower}pos_embed", ONE_AXIS),
        *both("ln_post", "{tower}norm"),
    ),
    aside=(
        Aside(r"{tower}blocks\.(\d+)\..*", "layer behind the one whose features are taken", carried=True, behind=True),
        Aside(r"{tower}attn_pool\..*", "attention pooling head", carried=True),
    ),
)
"""SigLIP as timm writes it, and code that is made after it (DeepSeek-VL's own)."""
