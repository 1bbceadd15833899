"""Names of such a tower's weights in published checkpoints."""

from __future__ import annotations

import dataclasses

from megavlm.weights.rules import CONCAT, ONE_AXIS, PATCHES, QKV, QKV_BLOCKS, Aside, Table, both, row

_OURS = "transformer.layers.{}."
_LAYER = (
    *both("input_layernorm", "norm1"),
    *both("self_attention.linear_qkv", "attn.qkv", QKV_BLOCKS),
    *both("self_attention.linear_proj", "attn.proj"),
    *both("pre_mlp_layernorm", "norm2"),
)

QWEN2_VL_VISION = Table(
    part="vision",
    ours=_OURS,
    theirs="blocks.{}.",
    layer=(*_LAYER, *both("mlp.linear_fc1", "mlp.fc1"), *both("mlp.linear_fc2", "mlp.fc2")),
    rest=(row("patch_embed.weight", "patch_embed.proj.weight"),),
)
"""The tower of Qwen2-VL, without its merger."""

QWEN2_5_VL_VISION = Table(
    part="vision",
    ours=_OURS,
    theirs="blocks.{}.",
    layer=(
        *_LAYER,
        *both("mlp.linear_fc1", "mlp.gate_proj mlp.up_proj", CONCAT),
        *both("mlp.linear_fc2", "mlp.down_proj"),
    ),
    rest=(row("patch_embed.weight", "patch_embed.proj.weight"),),
)
"""The tower of Qwen2.5-VL, without its merger."""

GLM4V_VISION = Table(
    part="vision",
    ours=_OURS,
    theirs="blocks.{}.",
    layer=QWEN2_5_VL_VISION.layer,
    rest=(
        *both("patch_embed", "patch_embed.proj"),
        row("positional_embedding", "embeddings.position_embedding.weight"),
        row("ln_pre.weight", "post_conv_layernorm.weight"),
        row("ln_post.weight", "post_layernorm.weight"),
    ),
)
"""The tower of GLM-4.1V, without its merger."""

QWEN3_VL_VISION = Table(
    part="vision",
    ours=_OURS,
    theirs="blocks.{}.",
    layer=(*_LAYER, *both("mlp.linear_fc1", "mlp.linear_fc1"), *both("mlp.linear_fc2", "mlp.linear_fc2")),
    rest=(*both("patch_embed", "patch_embed.proj"), row("positional_embedding", "pos_embed.weight")),
)
"""The tower of Qwen3-VL, without its mergers."""

RICE_VISION = Table(
    part="vision",
    ours=_OURS,
    theirs="blocks.{}.",
    layer=QWEN2_VL_VISION.layer,
    rest=(
        *QWEN2_VL_VISION.rest,
        row("class_embedding", "class_embedding"),
        row("class_rotary", "class_pos_emb", ONE_AXIS),
        *both("ln_pre", "pre_layernorm"),
    ),
)
"""The tower of LLaVA-OneVision-1.5, without its merger."""

SIGLIP2_VISION = Table(
    part="vision",
    ours=_OURS,
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
        # A linear layer on pixels of which the colours come last.
        row("patch_embed.weight", "embeddings.patch_embedding.weight", PATCHES),
        row("patch_embed.bias", "embeddings.patch_embedding.bias"),
        row("positional_embedding", "embeddings.position_embedding.weight"),
        *both("ln_post", "post_layernorm"),
    ),
    aside=(
        Aside(r"post_layernorm\.(weight|bias)", "norm behind layers that are not used", carried=True),
        Aside(
            r"encoder\.layers\.(\d+)\..*", "layer behind the one whose features are taken", carried=True, behind=True
        ),
        Aside(r"head\..*", "attention pooling head", carried=True),
    ),
)
"""SigLIP 2's NaFlex tower as Transformers writes it."""

SIGLIP_VISION = dataclasses.replace(
    SIGLIP2_VISION,
    rest=(
        *both("patch_embed", "embeddings.patch_embedding"),
        row("positional_embedding", "embeddings.position_embedding.weight"),
        *both("ln_post", "post_layernorm"),
    ),
    aside=(Aside(r"embeddings\.position_ids", "position number buffer"),),
    prefix="vpm.",
)
"""SigLIP on pictures of any size as Transformers names it (Idefics2's), in MiniCPM-Llama3-V 2.5."""

TIMM_VISION = Table(
    part="vision",
    ours=_OURS,
    theirs="blocks.{}.",
    layer=QWEN2_VL_VISION.layer,
    rest=(
        *both("patch_embed", "patch_embed.proj"),
        *both("conv1", "patch_embed.proj"),  # of the tower on squares
        row("positional_embedding", "pos_embed", ONE_AXIS),
        *both("ln_post", "norm"),
    ),
    prefix="vpm.",
)
"""SigLIP as timm names it, in MiniCPM-V 1.0 and 2.0."""
